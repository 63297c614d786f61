"""A run does not depend on whether its rows are encoded in memory, into the cache or read from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from alignkit.runs import manifest

TEMPLATE = (  # rewrites earlier turns, and trims
    "{% for m in messages %}{{ m.role + ':' + m.content | trim + ('' if loop.last else ' ') + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


ROWS: dict[str, list[Any]] = {
    "sft": [{"messages": messages(f"Q{n}?", "Yes." * (1 + 40 * (n % 5 == 0)), "So?", "No.")} for n in range(12)],
    "rm": [{"prompt": f"Q{n}?", "chosen": "Yes.", "rejected": ("Yes. ", "No.", "N" * 900)[n % 3]} for n in range(12)],
    "ppo": [{"prompt": f"Q{n // 2}?"} for n in range(12)],
}
ROWS["rm"] += [{"prompt": "Q0? ", "chosen": "Yes.", "rejected": "Never."}]
SETTINGS = {
    "sft": ["sft.max_length=64", "sft.too_long=cut", "sft.packing=false"],
    "rm": ["rm.policy=base", "rm.max_length=256", "rm.too_long=skip"],
    "dpo": ["dpo.policy=base", "dpo.max_length=256", "dpo.too_long=skip"],
    "ppo": [
        "ppo.policy=base",
        "reward.name=function",
        "reward.call=lengths:of",
        "ppo.response_length=4",
        "ppo.iterations=1",
        "ppo.ptx_coef=1",
        "ppo.ptx_data=texts.jsonl",
        "ppo.ptx_length=64",
    ],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield tmp_path / "cache"
    datasets.enable_progress_bars()


@pytest.mark.parametrize("stage", SETTINGS)
def test_a_run_is_the_same_with_rows_in_memory_and_from_the_cache(
    run_stage: Callable[..., Path],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS.get(stage, ROWS["rm"])))
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    (tmp_path / "lengths.py").write_text("def of(prompts, texts):\n    return [float(len(text)) for text in texts]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"Rain {n}. " * 9 * n}) + "\n" for n in range(1, 9))
    )
    settings = ["train.max_steps=1", f"chat_template={tmp_path / 't.jinja'}", "data.eval_size=2", *SETTINGS[stage]]

    def trained(name: str) -> tuple[dict[str, float], list[str]]:
        folder = run_stage(stage, "--data", str(data), "--output", str(tmp_path / name), *settings, "data.num_proc=2")
        metrics = {
            n: v for n, v in manifest.read(folder)["metrics"].items() if "second" not in n and "runtime" not in n
        }
        lines = capsys.readouterr().out.replace(str(tmp_path / name), "").splitlines()
        return metrics, [line for line in lines if re.search(r"\d+ of \d+|\d+ pairs", line)]

    expected = trained("memory")
    assert not cache.exists()
    if stage != "ppo":
        assert len(expected[1]) >= 2
    monkeypatch.setattr("alignkit.data.token_cache.CACHED", 1)
    monkeypatch.setattr("alignkit.data.token_cache.ROWS_A_PROCESS", 5)
    monkeypatch.setattr("alignkit.data.spool.IN_MEMORY", 2)
    assert trained("made") == expected
    assert list(cache.rglob("*-00000-of-00002.arrow"))
    for encoder in ("SequenceEncoder", "RankingEncoder", "PromptEncoder"):
        monkeypatch.setattr(f"alignkit.data.row_encoders.{encoder}.__call__", None)
    assert trained("read") == expected
