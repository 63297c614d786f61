"""What ``docs/security.md`` says about run folders from other people, and about the network."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from alignkit.api import libraries, row_files
from alignkit.cli import label, main, serve
from alignkit.config import named_code
from alignkit.errors import AlignkitError, ConfigError
from alignkit.runs import fingerprints, lock, manifest
from alignkit.runs import weights as run_weights

AUDITED = Path(__file__).with_name("audited.py")
NOWHERE = "http://127.0.0.1:9"
LEAVES_A_TRACE = "import pathlib; pathlib.Path('owned').touch()"


class Payload:
    """Writes the file ``owned`` when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("owned", "w")


def set_traps(run: Path) -> None:
    """Add to a run folder what could run code."""
    for name in ("training_args.bin", "adapter_model.bin", "pytorch_model.bin", "optimizer.pt", "scheduler.pt"):
        (run / name).write_bytes(pickle.dumps(Payload()))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        settings = json.loads((run / name).read_text()) if (run / name).exists() else {}
        auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoTokenizer": ["tokenization_evil.Evil", None]}
        (run / name).write_text(json.dumps({**settings, "auto_map": auto_map, "trust_remote_code": True}))
    record = json.loads((run / "alignkit.json").read_text())
    record["fingerprints"]["config"] = fingerprints.config(run)  # a stranger's is right
    (run / "alignkit.json").write_text(json.dumps(record))
    set_modules(run)


def set_modules(folder: Path) -> None:
    """Add modules with the names of others, and a plugin that looks as if it was installed."""
    for name in ("sitecustomize", "configuration_evil", "tokenization_evil", "torch", "peft"):
        (folder / f"{name}.py").write_text(f"{LEAVES_A_TRACE}\n")
    info = folder / "evil.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[alignkit]\nevil = configuration_evil\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """A folder with two SFT runs, an adapter and a full model, and a reward run, each full of traps."""
    output = tmp_path_factory.mktemp("trained")
    demonstrations, rankings = output / "demonstrations.jsonl", output / "rankings.jsonl"
    rows = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(12)]
    demonstrations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"What is {n}?", "responses": ["It.", "No, no."], "ranks": [0, 1]} for n in range(12)]
    rankings.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", str(tiny_model()), "train.max_steps=1", "data.eval_size=4", "train.use_cpu=true"]
    for name, words in {
        "lora": ["--plugin", "sft", "--data", str(demonstrations)],
        "full": ["--plugin", "sft", "--plugin", "full", "--data", str(demonstrations)],
        "rm": ["--plugin", "rm", "--data", str(rankings), "rm.policy=base"],
    }.items():
        assert main(["train", *words, *common, "--output", str(output / name)]) == 0
    for run in ("lora/sft", "full/sft", "rm/rm"):
        set_traps(output / run)
    return output


@pytest.fixture
def stranger(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder of traps, in which commands are run."""
    folder = tmp_path / "received"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder


def test_commands_on_run_folders_of_others_run_nothing_of_them_and_use_no_network(stranger: Path) -> None:
    """In one process, which records what Python audits: imports, pickles, sockets, processes, files to write."""
    commands = [
        ["check", "--plugin", "rm", "--data", "rankings.jsonl", "rm.policy=lora/sft", "--output", "new"],
        ["config", "--config", "lora/sft/config.yaml"],
        ["plan", "--plugin", "rm", "--data", "rankings.jsonl", "rm.policy=lora/sft", "--output", "new"],
        ["plugins"],
        ["runs", "."],
        ["show", "lora/sft"],
        ["watch", "lora/sft"],
        ["report", "."],
        ["chat", "lora/sft", "--prompt", "Hello?", "--max-new-tokens", "2"],
        ["chat", "full/sft", "--prompt", "Hello?", "--max-new-tokens", "2"],
        ["sample", "lora/sft", "rankings.jsonl", "--output", "samples.jsonl", "-k", "1", "--max-new-tokens", "2"],
        ["score", "rm/rm", "rankings.jsonl"],
        ["compare", "lora/sft", "full/sft", "--reward", "rm/rm", "--limit", "2", "--max-new-tokens", "2"],
        ["evaluate", "lora/sft", "--limit", "2"],
        ["train", "--config", "lora/sft/config.yaml", "--output", "again"],
    ]
    set_modules(stranger)
    audited = stranger / "audited.json"
    done = subprocess.run(
        [sys.executable, "-P", AUDITED, str(audited), json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=stranger / "lora" / "sft" / ".." / "..",
        env={
            **os.environ,
            "TMPDIR": str(stranger),
            "MPLCONFIGDIR": str(stranger),
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": NOWHERE,
        },
        input="y\n" * 20,
    )
    assert done.returncode == 0, done.stderr
    recorded = json.loads(audited.read_text())

    assert [status for _, status in recorded["statuses"]] == [0] * len(commands), (recorded["statuses"], done.stderr)
    assert not (stranger / "owned").exists()
    assert not {"configuration_evil", "tokenization_evil", "sitecustomize"} & set(recorded["imported"])
    assert recorded["sockets"] == []
    looks = "'fc-list'", "'/sbin/ldconfig'"  # of Matplotlib for fonts, and of Python for the libraries of CUDA
    assert [each for each in recorded["processes"] if not any(look in each for look in looks)] == []
    assert recorded["unpickled"] == []
    assert {file for file in recorded["written"] if not Path(file).is_relative_to(stranger)} <= {os.devnull}


def test_a_model_that_needs_its_own_code_is_an_error_and_not_a_question(
    stranger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    file = stranger / "full/sft/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "evil"}))

    assert main(["chat", "full/sft", "--prompt", "Hello?"]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not Path("owned").exists()


def test_weights_that_are_pickles_are_not_opened(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stranger / "lora/sft/adapter_model.safetensors").unlink()
    (stranger / "full/sft/model.safetensors").unlink()

    for run in ("lora/sft", "full/sft"):
        assert main(["chat", run, "--prompt", "Hello?"]) == 2
        assert f"{run} has no weights in safetensors" in capsys.readouterr().err
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_config": {"x": 1}, "megatron_core": "evil"},
        {"tokenizer_kwargs": {"trust_remote_code": True}},
        {"nested": [{"auto_map": {"AutoModel": "evil.Model"}}]},
    ],
    ids=["megatron", "tokenizer", "nested"],
)
def test_an_adapter_may_not_name_code(settings: dict[str, Any], stranger: Path) -> None:
    config = stranger / "lora/sft/adapter_config.json"
    run_weights.check(config.parent)
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))

    with pytest.raises(AlignkitError, match=r"adapter_config.json sets \w+, which makes libraries run code"):
        run_weights.check(config.parent)


def test_a_kernel_that_a_config_names_is_not_downloaded(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = stranger / "full/sft/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attn_implementation": "evil/kernel"}))

    assert main(["chat", "full/sft", "--prompt", "Hello?"]) == 2
    assert "kernel" in capsys.readouterr().err
    assert not Path("owned").exists()


def test_a_base_in_the_old_format_is_read_without_running_code(
    stranger: Path, tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = stranger / "base"
    shutil.copytree(tiny_model(), base)
    (base / "model.safetensors").unlink()
    torch.save(load_file(tiny_model() / "model.safetensors"), base / "pytorch_model.bin")
    chat = ["chat", "base", "--prompt", "Hello?", "--max-new-tokens", "2"]

    assert main(chat) == 0
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    capsys.readouterr()
    assert main(chat) == 2
    assert "Weights only load failed" in capsys.readouterr().err
    assert not Path("owned").exists()


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_pickle_that_runs_code_is_not_resumed(
    file: str, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Optimizer states are pickles, which PyTorch reads without running code."""
    checkpoint = stranger / "lora/sft/checkpoints/checkpoint-1"
    assert (checkpoint / file).exists()
    (checkpoint / file).write_bytes(pickle.dumps(Payload()))
    words = ["--plugin", "sft", "--output", "lora", "--resume", "train.max_steps=2"]

    assert main(["train", *words]) == 2
    assert "Weights only load failed" in capsys.readouterr().err
    assert not Path("owned").exists()


def test_training_adds_the_current_folder_to_the_search_path_only_for_a_function_that_is_named(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries that import an optional package would import a file of that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    (tmp_path / "gold.py").write_text("def letters(prompts, answers): return [0.0 for _ in answers]\n")
    before = list(sys.path)

    train("train.max_steps=1")
    assert named_code.fingerprints({"reward": {"call": "gold:letters"}}).keys() == {"gold:letters"}
    assert sys.path == before


def test_links_in_a_run_folder_are_not_followed_by_writes(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    for name in ("report.html", f".report.html.{os.getpid()}", ".sft.lock"):
        (tmp_path / name).symlink_to(target)

    manifest.write_atomically(tmp_path / "report.html", "page")
    assert (target.read_text(), (tmp_path / "report.html").read_text()) == ("mine", "page")
    with pytest.raises(ConfigError, match="is a link"), lock.held(tmp_path / "sft"):
        pass
    assert target.read_text() == "mine"


def test_what_is_written_is_private_if_the_umask_says_so(
    run_stage: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o077)
    try:
        run = run_stage("sft", "--plugin", "lora", "train.max_steps=1", "train.use_cpu=true", "train.bf16=false")
        assert main(["report", str(run)]) == 0
        assert main(["export", str(run), "--to", str(tmp_path / "exported"), "--dtype", "float32"]) == 0
        row_files.write([{"prompt": "Why?"}], tmp_path / "rows")
    finally:
        os.umask(before)
    folders = (run, *(tmp_path / name for name in ("exported", "rows", "cache")))
    written = [each for folder in folders for each in (folder, *folder.rglob("*"))]

    assert len(written) > 20
    assert [each for each in written if each.exists() and each.stat().st_mode & 0o077] == []


OFF = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "DISABLE_SAFETENSORS_CONVERSION": "1"}


@pytest.mark.parametrize("use", [lambda: main(["--version"]), libraries.set_environment], ids=["command", "python"])
def test_requests_of_libraries_are_off_unless_the_user_sets_them(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[], Any]
) -> None:
    for name in OFF:
        monkeypatch.setenv(name, "")
        del os.environ[name]
    use()
    assert {name: os.environ[name] for name in OFF} == OFF
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    use()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"


@pytest.mark.parametrize("command", [label.label, serve.serve], ids=["label", "serve"])
def test_servers_listen_on_this_machine_only(command: Callable[..., None]) -> None:
    from alignkit.labeling.serve import listen

    host = inspect.signature(command).parameters["host"].default.default
    with listen(host, 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        assert listening.family == socket.AF_INET


def test_processes_that_train_together_connect_on_all_addresses() -> None:
    """The page warns of it. This is how PyTorch listens, whatever address it is given."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    listening = [each for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]

    assert [each.laddr.ip for each in listening if each.laddr.port == store.port] in (["::"], ["0.0.0.0"])
