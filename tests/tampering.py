"""Run folders that were tampered with, as Hypothesis strategies, and what no command may do with them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fuzzing import ANYTHING, fault, mistaken
from hypothesis import strategies as st

from alignkit import yaml
from alignkit.cli import main
from alignkit.errors import AlignkitError
from alignkit.runs import manifest
from alignkit.testing import DATA, SMALL

STAGES = ("sft", "rm", "dpo")
READ_BY_ALL = ("alignkit.json", "config.yaml", "metrics.jsonl", "answers.jsonl", "evaluation.json", "pairs.json")
LIMIT = 120  # seconds after which a command counts as hanging

READ = {  # commands that load no model
    "runs": ["runs", "runs"],
    "show": ["show", "runs/{stage}"],
    "watch": ["watch", "runs/{stage}"],
    "report": ["report", "runs", "--output", "report.html"],
    "clean": ["clean", "runs/{stage}", "--yes", "--unfinished"],
    "check": ["check", "--plugin", "dpo", "--data", "rankings.jsonl", "--output", "new", "dpo.policy=runs/{stage}"],
    "config": ["check", "--config", "runs/{stage}/config.yaml", "--output", "new"],
    "plan": ["train", "--plugin", "{stage}", "--output", "runs", "--resume", "--plan", "train.max_steps=3"],
}
LOAD = {
    "chat": ["chat", "runs/{stage}", "--prompt", "Hi", "--max-new-tokens", "1"],
    "compare": [
        *("compare", "runs/sft", "runs/dpo", "--reward", "runs/rm", "--data", "prompts.jsonl"),
        *("--limit", "1", "--max-new-tokens", "1"),
    ],
}
TRAIN = {"train": ["train", "--plugin", "{stage}", "--output", "runs", "--resume", "train.max_steps=3"]}


def make_runs(model: Path) -> Path:
    """Train an SFT run, and a reward run and a DPO run on it, in the folder ``whole/runs``; and data for commands."""
    for kind in ("demonstrations", "rankings", "prompts"):
        Path(f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA[kind]))
    common = ["--model", str(model), "--output", "whole/runs", *SMALL, "train.save_steps=1"]
    for stage in STAGES:
        kind = "demonstrations" if stage == "sft" else "rankings"
        policy = [] if stage == "sft" else [f"{stage}.policy=whole/runs/sft"]
        more = ["--plugin", "full", "dpo.response_length=2"] if stage == "dpo" else []
        assert main(["train", "--plugin", stage, *common, "--data", f"{kind}.jsonl", *policy, *more]) == 0
    assert main(["evaluate", "whole/runs/sft", "--limit", "1"]) == 0
    for file in Path("whole/runs").rglob("*"):
        if file.name in ("alignkit.json", "config.yaml", "adapter_config.json"):
            file.write_text(file.read_text().replace("whole/runs", "runs"))
    return Path("whole/runs")


class Change(NamedTuple):
    """What is done to a file of a run."""

    file: str  # its path in the run folder
    way: str
    place: float  # in the file, from 0 to 1


WAYS = ("cut", "empty", "delete", "folder", "bytes", "deep", "digits", "utf-16", "null", "zero", "self", "pipe")


class Case(NamedTuple):
    """A command on runs, of which one was changed."""

    command: str
    stage: str  # of the run that was changed
    is_finished: bool
    changes: list[Change]
    drawn: st.DataObject

    def fault(self, whole: Path, commands: Mapping[str, list[str]]) -> str | None:
        """What is wrong with how the command ends, and with what it leaves; None if nothing is."""
        runs = fresh(whole, Path("runs"))
        for change in self.changes:
            if change.way == "pipe" and self.command == "config":
                continue  # a file that the user names may be a pipe, such as <(command) in a shell
            tamper(runs / self.stage, change, self.drawn)
        if not self.is_finished and self.command in ("runs", "show", "watch", "report", "clean", "plan", "train"):
            (runs / self.stage).rename(runs / f"{self.stage}.unfinished")
        return fault_of(commands[self.command], self.stage, runs)


@st.composite
def tampered(draw: st.DrawFn, whole: Path, commands: Sequence[str]) -> Case:
    """One of the commands, and one or two changes of a run."""
    stage, made = draw(st.sampled_from(STAGES)), []
    files = files_of(whole / stage)
    for _ in range(draw(st.integers(1, 2))):
        file = draw(st.sampled_from(files) | st.sampled_from([name for name in READ_BY_ALL if name in files]))
        is_structured = file.endswith((".json", ".yaml", ".jsonl"))
        way = draw(st.sampled_from([*WAYS, *["value"] * (3 * len(WAYS))] if is_structured else WAYS))
        made.append(Change(file, way, draw(st.floats(0, 1))))
    return Case(draw(st.sampled_from(commands)), stage, draw(st.booleans()), made, draw(st.data()))


def tamper(folder: Path, change: Change, drawn: st.DataObject) -> None:
    """Make a change in a run folder."""
    file = folder / change.file
    if not file.is_file():
        return
    content = file.read_bytes()
    at = int(change.place * len(content))
    if change.way == "value":
        with contextlib.suppress(AlignkitError, ValueError, TypeError, RecursionError):  # changed before
            file.write_text(_with_mistake(file.suffix, content.decode(), drawn), "utf-8", "surrogatepass")
        return
    file.unlink()
    match change.way:
        case "cut":
            file.write_bytes(content[:at])
        case "empty":
            file.write_bytes(b"")
        case "folder":
            file.mkdir()
        case "bytes":
            file.write_bytes(content[:at] + b"\xff\x00[" + content[at + 3 :])
        case "deep":
            file.write_bytes(content[:at] + b"[" * 9000 + content[at:])
        case "digits":
            file.write_bytes(content[:at] + b"9" * 9000 + content[at:])
        case "utf-16":
            file.write_bytes(content.decode("latin-1").encode("utf-16"))
        case "null" | "zero":
            file.symlink_to(f"/dev/{change.way}")
        case "self":
            file.symlink_to(file)
        case "pipe":
            os.mkfifo(file)


def _with_mistake(suffix: str, content: str, drawn: st.DataObject) -> str:
    """A text with one of its values replaced, removed, or added; a value may become that of another file."""
    if suffix == ".yaml":
        return json.dumps(_mistaken(yaml.loads(content, ""), drawn))  # JSON is YAML
    if suffix == ".json":
        return json.dumps(_mistaken(json.loads(content), drawn))
    return "".join(json.dumps(_mistaken(json.loads(line), drawn)) + "\n" for line in content.splitlines())


def _mistaken(value: Any, drawn: st.DataObject) -> Any:
    return drawn.draw(mistaken(value) if drawn.draw(st.integers(0, 9)) else ANYTHING)


def files_of(folder: Path) -> list[str]:
    """The files in a folder, by their paths in it."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def fresh(source: Path, target: Path) -> Path:
    """A copy of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def fault_of(command: Sequence[str], stage: str, runs: Path) -> str | None:
    """What is wrong with how a command on these runs ends, and with what it leaves; None if nothing is."""
    before = contents(runs)
    with _limited():
        wrong = fault([word.format(stage=stage) for word in command])
    if wrong or command[0] == "clean":
        return wrong
    after = contents(runs)
    if command[0] != "train":
        return next((f"{command[0]} changed {name}" for name in _differing(before, after)), None)
    if any(name.startswith(f"{stage}/") for name in _differing(before, after)) and not _is_complete(runs / stage):
        return "a run is half-written"
    return next((f"{name} is left over" for name in after.keys() - before.keys() if name.startswith(".")), None)


def _is_complete(run: Path) -> bool:
    return manifest.is_run(run) and manifest.missing_file(run) is None and not list(run.rglob(".*"))


def contents(folder: Path) -> dict[str, str]:
    """What is in a folder: a hash of each file, and the target of each link."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
        if not path.name.endswith(".lock")
    }


def _differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


class Hang(BaseException):
    """A command took too long."""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def raise_hang(*_: Any) -> None:
        raise Hang(f"it did not end in {LIMIT} s")

    handler = signal.signal(signal.SIGALRM, raise_hang)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
