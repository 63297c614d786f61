"""The page that shows an iteration of PPO names functions that exist, where it says, and settings that exist."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from alignkit_ppo.config import PPOConfig
from alignkit_ppo.losses import ClipConfig

ROOT = Path(__file__).parents[2]
(CODE,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ppo-step.md").read_text(encoding="utf-8"), re.S)
NAMED = re.findall(r"# (\w+/\w+\.py) ([\w.]+)$", CODE, re.M)


def definitions(file: str) -> set[str]:
    """The functions and classes of a file, and the methods of its classes as ``Class.method``."""
    root = ROOT / "plugins" if file.startswith("alignkit_") else ROOT / "alignkit"
    kinds = (ast.FunctionDef, ast.ClassDef)
    top = [node for node in ast.parse((root / file).read_text(encoding="utf-8")).body if isinstance(node, kinds)]
    inner = [f"{each.name}.{node.name}" for each in top for node in each.body if isinstance(node, kinds)]
    return {*(node.name for node in top), *inner}


def test_every_function_on_the_page_is_where_it_says() -> None:
    assert len(NAMED) > 25
    for file, name in NAMED:
        assert name in definitions(file), f"{file} has no {name}"


def test_the_page_is_one_page() -> None:
    assert len(CODE.splitlines()) <= 60
    assert max(map(len, CODE.splitlines())) <= 130


def test_the_steps_are_numbered_from_1_to_12() -> None:
    numbers = {int(number) for number in re.findall(r"# (\d+)\b", CODE)}

    assert numbers == set(range(1, 13))


def test_settings_on_the_page_exist() -> None:
    settings = {field.name for cls in (PPOConfig, ClipConfig) for field in dataclasses.fields(cls)}
    shown = {"missing_eos_penalty", "kl_coef", "gamma", "lam", "kl_target", "epochs", "minibatches", "ptx_coef"}
    shown |= {"cliprange", "value_coef", "entropy_coef", "ema", "eval_every", "save_every"}

    assert shown <= settings
    assert all(re.search(rf"\b{name}\b", CODE) for name in shown)


def test_the_functions_that_an_iteration_is_made_of_are_on_the_page() -> None:
    """A function that joins these files has to be put on the page, or be one that an iteration does not need."""
    on_page = {(file, name.split(".")[-1]) for file, name in NAMED}
    for file in ("alignkit_ppo/gae.py", "online/kl.py"):
        assert definitions(file) <= {name for of, name in on_page if of == file}
