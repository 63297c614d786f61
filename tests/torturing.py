"""Small runs of every stage and tuner in forked processes, which end at a chosen moment, and their comparison.

The parent has imported everything and never trains, so a fork costs milliseconds. Importing this module imports no
torch; :func:`prepare` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("sft", "rm", "dpo", "ppo", "grpo", "kto", "rahf")
TUNERS = ("full", "lora", "qlora")
ONLINE = ("ppo", "grpo")
ROWS = {"sft": "demonstrations", "rm": "rankings", "dpo": "rankings", "kto": "rankings", "rahf": "rankings"}
LIMIT = 120.0  # seconds after which a command counts as hanging
REWARD = "def letters(prompts, answers):\n    return [answer.count('e') / 4 for answer in answers]\n"


def prepare(root: Path) -> None:
    """Write a tiny model, data and a reward to ``root``, and import what runs import."""
    import bitsandbytes  # noqa: F401
    import tqdm
    from trl import SFTTrainer  # noqa: F401

    import alignkit.online
    import alignkit.training.execution  # noqa: F401
    from alignkit.cli import sweep, train  # noqa: F401
    from alignkit.data import spool, token_cache
    from alignkit.runs import curves
    from alignkit.testing import DATA, tiny_model, tokenizer_folder

    tqdm.tqdm.monitor_interval = 0  # it is a thread, which a fork would not have

    class Folders:
        def mktemp(self, name: str) -> Path:
            (root / name).mkdir(parents=True)
            return root / name

    if not (pid := os.fork()):  # the threads of torch's operations stay in this process
        tiny_model.__wrapped__(tokenizer_folder.__wrapped__(Folders()), Folders())()  # in root / "llama"
        os._exit(0)
    os.waitpid(pid, 0)
    for kind, rows in DATA.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "letters.py").write_text(REWARD)
    sys.path.insert(0, str(root))
    token_cache.CACHED = spool.IN_MEMORY = 8  # sixteen rows count as many, and are cached
    curves.can_draw = lambda: False  # a picture takes longer than such a run
    gc.collect()
    gc.freeze()  # the garbage collector of a fork does not look at what was imported


def words(root: Path, stage: str, tuner: str) -> list[str]:
    """The command that trains a run of a few steps in the folder ``runs``, with a checkpoint every step or two."""
    data = root / f"{ROWS.get(stage, 'prompts')}.jsonl"
    given = ["train", "--plugin", stage, "--plugin", tuner, "--model", str(root / "llama"), "--data", str(data)]
    given += ["--output", "runs", "data.eval_size=4", "train.use_cpu=true", "train.learning_rate=1e-3"]
    given += ["train.per_device_train_batch_size=2", "train.per_device_eval_batch_size=4"]
    if tuner != "full" and stage in ("sft", "rm"):
        given.append("tuner.lora_dropout=0.1")
    if stage != "sft":
        given.append(f"{stage}.policy=base")
    if stage in ONLINE:
        settings = ["batch_size=4", "minibatches=2", "response_length=5", "iterations=3", "save_every=1"]
        settings += ["eval_every=2", "kl_target=0.1", "keep=best" if stage == "grpo" else "ema=0.9"]
        settings += ["samples_per_prompt=2"] if stage == "grpo" else []
        return [*given, "--trust", "reward.name=function", "reward.call=letters:letters"] + [
            f"{stage}.{setting}" for setting in settings
        ]
    given += [f"{stage}.response_length=4"] if stage in ("dpo", "kto", "rahf") else []
    steps = ["max_steps=6", "save_steps=2", "eval_strategy=steps", "eval_steps=3", "logging_steps=1"]
    return [*given, *(f"train.{step}" for step in steps)]


# --- processes -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a process is killed."""

    seconds: float = 0.0  # after the process began, or after the event
    event: int | None = None  # the number of the file operation, from 1

    def __str__(self) -> str:
        return (
            f"{self.seconds:.2f} s" if self.event is None else f"operation {self.event} + {self.seconds * 1000:.1f} ms"
        )


@dataclasses.dataclass
class Ended:
    """How a command ended."""

    status: int  # negative: the signal
    seconds: float
    operations: int  # file operations that write, rename or remove
    output: str
    last: str = ""  # the operation at which it was killed

    @property
    def was_killed(self) -> bool:
        return self.status == -signal.SIGKILL


def command(
    arguments: list[str],
    folder: Path,
    kill: Moment | None = None,
    before: Callable[[], None] = lambda: None,
    at_moment: Callable[[int], None] = lambda pid: os.kill(pid, signal.SIGKILL),
) -> Ended:
    """``alignkit`` with these arguments, in a forked process that works in ``folder``.

    ``before`` is called in that process first; ``at_moment`` is called with its id at the moment ``kill``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    ours, theirs = os.pipe()
    sys.stdout.flush()
    start = time.monotonic()
    if not (pid := os.fork()):
        os.close(ours)
        _child(arguments, folder, log, theirs, kill, before)
    os.close(theirs)
    operations = _watch(pid, ours, start, kill, at_moment)
    _, code = os.waitpid(pid, 0)
    os.close(ours)
    lines = operations.decode(errors="replace").splitlines()
    return Ended(
        os.waitstatus_to_exitcode(code),
        time.monotonic() - start,
        len(lines),
        log.read_text(errors="replace") if log.exists() else "",
        lines[-1] if lines else "",
    )


def _child(
    arguments: list[str], folder: Path, log: Path, pipe: int, kill: Moment | None, before: Callable[[], None]
) -> None:
    """The forked process. It reports each file operation in the pipe, and waits at the one where it is killed."""
    status = 70
    try:
        os.chdir(folder)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        import datasets

        from alignkit.cli import main

        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        count = 0
        at = kill.event if kill else None

        def audit(event: str, details: tuple[Any, ...]) -> None:
            nonlocal count
            if (operation := _operation(event, details)) is None:
                return
            count += 1
            os.write(pipe, f"{operation}\n".encode(errors="replace"))
            if count == at and kill is not None and not kill.seconds:
                signal.pause()  # until it is killed: the operation does not happen

        before()
        sys.addaudithook(audit)
        status = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def _operation(event: str, details: tuple[Any, ...]) -> str | None:
    """A file operation that changes the disk, from an event of Python's audit hooks; None for other events."""
    if event == "open":
        path, _, flags = details
        writes = flags & (os.O_WRONLY | os.O_RDWR) and isinstance(path, str | bytes)
        name = os.fsdecode(path) if writes else ""
        return f"write {name}" if writes and not name.startswith(("/dev/", "/proc/")) else None
    if event in ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir"):
        return f"{event[3:]} {os.fsdecode(details[0])}"
    return None


def _watch(pid: int, pipe: int, start: float, kill: Moment | None, at_moment: Callable[[int], None]) -> bytes:
    """Read the pipe until the process ends, and call ``at_moment`` at the moment. Kill it if it hangs."""
    operations, sent = b"", kill is None
    timed = kill is not None and kill.event is None
    process = os.pidfd_open(pid)
    try:
        while True:
            now = time.monotonic() - start
            until = kill.seconds if kill and timed and not sent else LIMIT
            ready, _, _ = select.select([pipe, process], [], [], max(until - now, 0))
            if not ready:
                if timed and not sent:
                    at_moment(pid)
                else:
                    os.kill(pid, signal.SIGABRT)
                sent = True
            if pipe in ready:
                operations += os.read(pipe, 65536)
                if kill and not sent and kill.event is not None and operations.count(b"\n") >= kill.event:
                    time.sleep(kill.seconds)
                    at_moment(pid)
                    sent = True
            if process in ready:
                while select.select([pipe], [], [], 0)[0] and (more := os.read(pipe, 65536)):
                    operations += more
                return operations
    finally:
        os.close(process)


# --- comparison ------------------------------------------------------------------------------------------------------

NOT_COMPARED = ("finished", "today", "the day it began")
TIMING = ("_runtime", "_per_second", "seconds", "runtime", "peak_memory")


def differences(whole: Path, other: Path) -> list[str]:
    """How two run folders differ, apart from times: files, tensors, metrics, answers, the manifest."""
    names = _files(whole), _files(other)
    found = [f"{name} is missing" for name in sorted(names[0] - names[1])]
    found += [f"{name} is left over" for name in sorted(names[1] - names[0])]
    for name in sorted(names[0] & names[1]):
        one, two = whole / name, other / name
        if one.is_file() and one.read_bytes() != two.read_bytes() and _content(one) != _content(two):
            found.append(f"{name} differs")
    return found


def _files(folder: Path) -> set[str]:
    """All files but locks, which nobody holds."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix != ".lock"}


def _content(file: Path) -> Any:
    """What a file says apart from times."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "np") as opened:
            return {name: opened.get_tensor(name).tobytes() for name in opened.keys()}  # noqa: SIM118
    if file.suffix in (".pt", ".pth"):
        import torch

        return _plain(torch.load(file, weights_only=False))
    if file.suffix == ".jsonl":
        return [_untimed(_without_summary(json.loads(line))) for line in file.read_text().splitlines()]
    if file.suffix == ".yaml":
        from alignkit import yaml

        return yaml.load(file)
    if file.suffix == ".json":
        record = json.loads(file.read_text())
        return _untimed({key: value for key, value in record.items() if key not in NOT_COMPARED})
    if file.name == "README.md" or file.suffix in (".svg", ".png"):  # with the time and the date
        return None
    return file.read_bytes()


def _without_summary(line: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's summary at the end has the mean loss since the run was started or resumed."""
    return {key: value for key, value in line.items() if key != "train_loss" or "train_runtime" not in line}


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(each) for key, each in value.items() if not _is_timing(key)}
    return [_untimed(each) for each in value] if isinstance(value, list) else value


def _is_timing(key: str) -> bool:
    return key.endswith(TIMING) or key.startswith("seconds_") or key in ("total_flos", "sampled_per_second")


def _plain(value: Any) -> Any:
    """Tensors as bytes, so that NaN equals NaN."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return (
        value.numpy().tobytes() if hasattr(value, "numpy") else value.tobytes() if hasattr(value, "tobytes") else value
    )
