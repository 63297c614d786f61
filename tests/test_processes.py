"""Training in several real processes, on nodes that differ.

That each stage trains in two processes as in one is tested with the stages, under ``two_processes``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_servers import free_port

from alignkit.testing import DEMONSTRATIONS

ON_CPU = ["train.use_cpu=true", "train.bf16=false"]


def launched(*arguments: str) -> subprocess.Popen[str]:
    """``alignkit launch`` with these arguments, in a process of its own."""
    command = [sys.executable, "-m", "alignkit", "launch", *arguments]
    env = {**os.environ, "ALIGNKIT_DEBUG": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def failed(process: subprocess.Popen[str]) -> str:
    """The line that a process prints before it ends with exit status 2."""
    _, errors = process.communicate()
    assert (process.returncode, errors.count("\n")) == (2, 1), errors
    return errors


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write rows to a file in the working directory, which is ``tmp_path``; return its name."""
    monkeypatch.chdir(tmp_path)

    def rows(name: str, content: list[dict[str, str]]) -> str:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return name

    return rows


def test_nodes_with_other_data_or_settings_are_refused(
    write: Callable[..., str], tiny_model: Callable[..., Path]
) -> None:
    train = ["train", "--plugin", "sft", "--plugin", "lora", "--model", str(tiny_model()), *ON_CPU]
    one, other = write("one.jsonl", DEMONSTRATIONS), write("other.jsonl", DEMONSTRATIONS[:-1])
    nodes = ["--processes", "1", "--nodes", "2", "--rendezvous", f"localhost:{free_port()}"]
    settings = {"0": ["--data", one, "train.max_steps=2"], "1": ["--data", other, "train.max_steps=3"]}
    node_0, node_1 = (
        launched(*nodes, "--node-rank", rank, "--", *train, *settings[rank], "--output", "runs") for rank in settings
    )

    error = failed(node_0)
    assert failed(node_1) == error
    assert "process 1 on " in error
    assert " differs from process 0 on " in error
    for difference in ("train.max_steps (3, not 2)", "data.path (other.jsonl, not one.jsonl)", "the data"):
        assert difference in error
    assert list(Path("runs").glob("*")) == []
