"""Training in several real processes: a killed one, nodes that differ, and caches that processes share.

That each stage trains in two processes as in one is tested with the stages, under ``two_processes``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from chat_servers import free_port
from conftest import on_two_processes

from alignkit.cli import main
from alignkit.testing import DEMONSTRATIONS, PROMPTS

ON_CPU = ["train.use_cpu=true", "train.bf16=false"]


def launched(*arguments: str, site: str = "") -> subprocess.Popen[str]:
    """``alignkit launch`` with these arguments, in a process of its own. It finds packages in ``site`` first."""
    command = [sys.executable, "-m", "alignkit", "launch", *arguments]
    env = {**os.environ, "ALIGNKIT_DEBUG": "", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [site, env.get("PYTHONPATH")]))
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


def test_nodes_with_other_data_settings_or_versions_are_refused(
    write: Callable[..., str], tiny_model: Callable[..., Path]
) -> None:
    metadata = Path("other/trl-99.0.dist-info/METADATA").absolute()
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: trl\nVersion: 99.0\n")
    train = ["train", "--plugin", "sft", "--plugin", "lora", "--model", str(tiny_model()), *ON_CPU]
    one, other = write("one.jsonl", DEMONSTRATIONS), write("other.jsonl", DEMONSTRATIONS[:-1])
    nodes = ["--processes", "1", "--nodes", "2", "--rendezvous", f"localhost:{free_port()}"]
    settings = {"0": ["--data", one, "train.max_steps=2"], "1": ["--data", other, "train.max_steps=3"]}
    sites = {"0": "", "1": str(Path("other").absolute())}
    node_0, node_1 = (
        launched(*nodes, "--node-rank", rank, "--", *train, *settings[rank], "--output", "runs", site=sites[rank])
        for rank in settings
    )

    error = failed(node_0)
    assert failed(node_1) == error
    assert "process 1 on " in error
    assert " differs from process 0 on " in error
    settings_and_versions = ("trl (99.0, not ", "train.max_steps (3, not 2)", "data.path (other.jsonl, not one.jsonl)")
    for difference in (*settings_and_versions, "the data"):
        assert difference in error
    assert list(Path("runs").glob("*")) == []


def test_a_killed_process_stops_the_others_and_the_run_continues(
    write: Callable[..., str],
    tiny_model: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result is that of a run that was not interrupted, bit for bit. Another number of processes is refused."""
    Path("site").mkdir()
    Path("site/count.py").write_text("def count(prompts, answers):\n    return [len(a) / 10 for a in answers]\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["site", os.environ.get("PYTHONPATH", "")]))
    train = ["train", "--plugin", "ppo", "--plugin", "lora", "--model", str(tiny_model()), *ON_CPU, "--trust"]
    train += ["--data", write("prompts.jsonl", PROMPTS), "ppo.policy=base", "data.eval_size=3", "ppo.save_every=1"]
    train += ["ppo.batch_size=4", "ppo.minibatches=1", "ppo.response_length=6", "ppo.iterations=16", "ppo.eval_every=8"]
    train += ["reward.name=function", "reward.call=count:count"]
    assert on_two_processes(*train, "--output", "whole").returncode == 0

    cut = launched("--processes", "2", "--", *train, "--output", "cut")
    while not list(Path("cut").glob("*/checkpoints/checkpoint-[2-9]/trainer_state.json")):
        assert cut.poll() is None, cut.communicate()
        time.sleep(0.002)
    _, last = sorted(psutil.Process(cut.pid).children(), key=lambda process: process.pid)
    last.kill()
    assert "process 1 was killed by SIGKILL, perhaps because memory ran out" in failed(cut)
    assert not Path("cut/ppo").exists()

    monkeypatch.syspath_prepend("site")
    assert main([*train, "--output", "cut", "--resume"]) == 2
    assert "changed since the run began: the number of processes" in capsys.readouterr().err
    assert on_two_processes(*train, "--output", "cut", "--resume").returncode == 0
    weights = [Path(f"{name}/ppo/adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_one_process_writes_the_caches_and_the_other_reads_them(
    write: Callable[..., str],
    tiny_model: Callable[..., Path],
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of converted rows and of token ids, which files of 20,000 rows have."""
    install(
        "writers",
        """
        import os, pathlib
        import datasets.arrow_writer
        import pyarrow
        from alignkit import hookimpl

        def recorded(name, function):
            def record(*args, **kwargs):
                with pathlib.Path("written.txt").open("a") as file:
                    file.write(f"{name} {os.environ['RANK']}\\n")
                return function(*args, **kwargs)
            return record

        pyarrow.ipc.new_file = recorded("rows", pyarrow.ipc.new_file)
        writer = datasets.arrow_writer.ArrowWriter
        writer.__init__ = recorded("tokens", writer.__init__)

        @hookimpl
        def alignkit_run_start(run):
            pass
        """,
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(Path("cache").absolute()))
    data = write("rows.jsonl", [{"prompt": str(n), "completion": "A"} for n in range(20_000)])
    train = ["train", "--plugin", "sft", "--plugin", "writers", "--model", str(tiny_model()), "--data", data, *ON_CPU]
    train += ["train.max_steps=1", "data.eval_size=2", "data.num_proc=1"]

    done = on_two_processes(*train)
    assert done.returncode == 0, done.stderr
    written = sorted(line.split()[0] for line in Path("written.txt").read_text().splitlines())
    assert written == ["rows", "tokens"]  # each by one process
