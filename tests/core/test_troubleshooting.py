"""The page on troubleshooting quotes messages of the code, and names settings that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import transformers

from alignkit.config import resolve
from alignkit.registry import Registry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def test_every_quoted_message_is_one_of_the_code() -> None:
    files = [file for folder in ("alignkit", "plugins") for file in sorted((ROOT / folder).rglob("*.py"))]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    code = "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    quoted = re.findall(r'"([^"]+)"', PAGE)

    assert len(quoted) > 6
    assert [text for text in quoted if text not in code] == []


def test_every_setting_exists() -> None:
    named = set(re.findall(r"`((?:ppo|grpo|rm|loss|train|tuner|rollout|data)\.\w+)", PAGE))
    known = {f"train.{name}" for name in transformers.TrainingArguments.__dataclass_fields__}
    for stage in ("ppo", "grpo", "rm"):
        table = resolve(Registry(), {}, {"plugins": [stage, "lora"]}).to_dict()
        tables = {stage: table["stages"][stage], "tuner": table["tuner"], **table["stages"][stage]}
        known |= {f"{name}.{key}" for name, keys in tables.items() if isinstance(keys, dict) for key in keys}

    assert len(named) > 15
    assert named - known == set()
