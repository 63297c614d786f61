"""What interruptions leave behind: signals of schedulers, kills at bad moments, and clocks that are set back."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from run_folders import record, weights
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from alignkit.cli import main
from alignkit.errors import AlignkitError
from alignkit.runs import resume, stopping
from alignkit.training import checkpoints

Train = Callable[..., Path]

STEPS = ("train.max_steps=6", "train.save_steps=2", "train.eval_steps=4", "train.logging_steps=1")

# run in a process without PyTorch, which forks quickly
FORKS = """
import multiprocessing, signal, time
from alignkit.runs import stopping

restore = stopping.handle(lambda number: None, *stopping.SIGNALS)
for _ in range(300):
    forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    forked.start()
    forked.terminate()
    forked.join(20)
    assert forked.exitcode == -signal.SIGTERM, forked.exitcode
restore()
assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
"""

SENDS = """
    import os, signal
    from alignkit import hookimpl

    @hookimpl
    def alignkit_run_start(run):
        if os.environ.get("AT") == "start":
            os.kill(os.getpid(), signal.SIGTERM)

    @hookimpl
    def alignkit_callbacks(run):
        from transformers import TrainerCallback

        class Send(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if os.environ.get("AT") == str(state.global_step):
                    os.kill(os.getpid(), signal.SIGTERM)

            def on_substep_end(self, args, state, control, **kwargs):
                if os.environ.get("AT") == "pool":
                    import multiprocessing
                    pool = multiprocessing.get_context("fork").Pool(1)
                    pool.terminate()
                    pool.join()

        return [Send()]
"""


@pytest.fixture
def sigterm_at(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``sigterm_at("3")``: a run with ``--plugin sends`` gets SIGTERM in its fourth step."""
    install("sends", SENDS)
    return lambda moment: monkeypatch.setenv("AT", moment)


@pytest.fixture
def command(tiny_model: Callable[..., Path], tiny_data: Callable[[str], Path], tmp_path: Path) -> list[str]:
    given = ["train", "--plugin", "sft", "--plugin", "sends", "--model", str(tiny_model()), "train.use_cpu=true"]
    given += ["--output", str(tmp_path / "out"), "--data", str(tiny_data("demonstrations")), "data.eval_size=4"]
    return [*given, "train.per_device_train_batch_size=2", *STEPS]


def test_forked_processes_have_the_handlers_of_the_operating_system() -> None:
    """A pool ends its processes with SIGTERM. One with a handler in Python sometimes missed it, and the pool hung."""
    before = [signal.getsignal(each) for each in stopping.SIGNALS]
    restores = [stopping.handle(lambda number: None, *stopping.SIGNALS) for _ in range(2)]
    try:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.map(signal.getsignal, stopping.SIGNALS) == before
        assert not set(before) & {signal.getsignal(each) for each in stopping.SIGNALS}
    finally:
        for restore in reversed(restores):
            restore()
    assert [signal.getsignal(each) for each in stopping.SIGNALS] == before


def test_a_process_that_is_terminated_right_after_its_fork_ends() -> None:
    """The signal comes before, between or after the two sets of handlers."""
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_sigterm_writes_a_checkpoint_and_ends_with_status_143(
    sigterm_at: Callable[[str], None],
    command: list[str],
    train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    sigterm_at("2")
    assert main(command) == 143
    printed = capsys.readouterr()
    assert "stopping after this step, with a checkpoint" in printed.out
    assert printed.err.strip().endswith("stopped by SIGTERM at step 3. To continue, add --resume to the same command")
    assert signal.getsignal(signal.SIGTERM) is before
    last = resume.last_checkpoint(tmp_path / "out" / "sft.unfinished")
    assert last is not None
    assert last.name == "checkpoint-3"

    sigterm_at("never")
    assert main([*command, "--resume"]) == 0
    whole = train("--plugin", "sends", *STEPS, output="whole")
    assert {n: t.tolist() for n, t in weights(tmp_path / "out" / "sft").items()} == {
        n: t.tolist() for n, t in weights(whole).items()
    }


def test_sigterm_before_the_first_step_leaves_nothing_behind(
    sigterm_at: Callable[[str], None], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sigterm_at("start")
    assert main(command) == 143
    assert "stopped by SIGTERM. To continue, add --resume to the same command" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_the_pools_of_a_reward_can_be_terminated_while_a_run_trains(
    sigterm_at: Callable[[str], None], command: list[str]
) -> None:
    """A process that is forked during training does not wait for a step's end when it gets SIGTERM."""
    sigterm_at("pool")
    assert main([*command, "train.max_steps=1", "train.gradient_accumulation_steps=2"]) == 0


# --- disks that are full ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may have more than 1000 bytes in this context."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_text("x" * 5000),
        lambda file: torch.save(torch.zeros(5000), file),
        lambda file: save_file({"x": torch.zeros(5000)}, file),
        lambda file: Tokenizer(models.WordLevel({str(n): n for n in range(500)}, "0")).save(str(file)),
    ],
    ids=["python", "torch", "safetensors", "tokenizers"],
)
def test_a_file_that_cannot_be_written_is_an_error_that_says_how_to_go_on(
    write: Callable[[Path], object], tmp_path: Path
) -> None:
    expected = r"cannot write to .*: (File too large|PyTorch could not save a file, and .* free)\. When"
    with pytest.raises(AlignkitError, match=expected), small_files(), checkpoints.writing(tmp_path / "sft.unfinished"):
        write(tmp_path / "file")


def test_other_errors_of_a_run_stay_what_they_are(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), FileNotFoundError(2, "No such file", "rows.jsonl"), ValueError("x")):
        with pytest.raises(type(error)) as raised, checkpoints.writing(tmp_path):
            raise error
        assert raised.value is error


# --- kills at bad moments --------------------------------------------------------------------------------------------


def killed_after_its_last_checkpoint(folder: Path) -> Path:
    """Turn a finished run into one that was killed just before it was saved."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    folder.rename(unfinished)
    (unfinished / "alignkit.json").unlink()
    return unfinished


def test_what_was_logged_after_the_last_checkpoint_is_logged_once(train: Train) -> None:
    """The final evaluation and the Trainer's summary have the step of the last checkpoint, and come after it."""

    def lines(folder: Path) -> list[tuple[int, list[str]]]:
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], sorted(row)) for row in rows]

    folder = train(*STEPS)
    before = lines(folder)
    assert before[-1][0] == 6
    killed_after_its_last_checkpoint(folder)
    train(*STEPS, "--resume")

    assert lines(folder) == before
    assert record(folder)["steps"] == 6


def test_a_resume_removes_what_a_killed_process_was_writing(train: Train) -> None:
    unfinished = killed_after_its_last_checkpoint(train(*STEPS))
    (unfinished / ".config.yaml.4711").write_text("plugins: [sf")
    (unfinished / ".rehearsal-x").mkdir()
    (unfinished / "checkpoints" / ".checkpoint-2").mkdir()

    folder = train(*STEPS, "--resume")
    assert [str(path) for path in folder.rglob(".*")] == []


def test_a_checkpoint_that_was_half_deleted_does_not_push_out_a_whole_one(train: Train) -> None:
    """The Trainer would keep it, as the newest by its time of change, and delete a complete one."""
    folder = train(*STEPS, "train.save_total_limit=2")
    assert [each.name for each in resume.checkpoints(folder)] == ["checkpoint-4", "checkpoint-6"]
    unfinished = killed_after_its_last_checkpoint(folder)
    shutil.copytree(unfinished / "checkpoints" / "checkpoint-4", unfinished / "checkpoints" / "checkpoint-2")
    now = time.time()
    for step, age in ((2, 0), (4, 60), (6, 30)):
        os.utime(unfinished / "checkpoints" / f"checkpoint-{step}", (now - age, now - age))
    # there is no state of step 2
    assert [each.name for each in resume.checkpoints(unfinished)] == ["checkpoint-4", "checkpoint-6"]

    train(*STEPS, "train.save_total_limit=2", "--resume")
    assert [each.name for each in resume.checkpoints(folder)] == ["checkpoint-4", "checkpoint-6"]


def test_a_clock_that_is_set_back_does_not_delete_the_newest_checkpoint(
    train: Train, install: Callable[..., None]
) -> None:
    install(
        "clock",
        """
        import os
        from alignkit import hookimpl

        @hookimpl
        def alignkit_callbacks(run):
            from transformers import TrainerCallback

            class SetBack(TrainerCallback):
                def on_save(self, args, state, control, **kwargs):
                    for checkpoint in run.folder.glob("checkpoints/checkpoint-*"):
                        at = 1e9 - 100 * int(checkpoint.name.split("-")[1])
                        os.utime(checkpoint, (at, at))

            return [SetBack()]
        """,
    )
    folder = train("--plugin", "clock", *STEPS, "train.save_steps=1", "train.save_total_limit=2")

    assert [each.name for each in resume.checkpoints(folder)] == ["checkpoint-5", "checkpoint-6"]


def test_a_run_that_was_killed_while_it_replaced_another_leaves_nothing_of_that(train: Train, tmp_path: Path) -> None:
    folder = train(*STEPS)
    former = folder.with_name("sft.former.unfinished")
    shutil.copytree(folder, former)

    train(*STEPS, "--resume")
    assert not former.exists()


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "3", '{"manifest_version": 3}', "[" * 3000, "9" * 5000, ""])
def test_a_file_that_is_no_manifest_is_a_one_line_error(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "alignkit.json").write_text(content)

    assert main(["chat", str(tmp_path), "Hello"]) == 2
    assert "unexpected" not in capsys.readouterr().err


def test_a_run_that_was_killed_after_its_last_checkpoint_trains_no_step_more(train: Train) -> None:
    """In the middle of an epoch, where the Trainer alone would train one."""
    whole = train("train.max_steps=2", "train.save_steps=2")
    cut = whole.parent.with_name("cut") / "sft.unfinished"
    shutil.copytree(whole, cut)
    (cut / "alignkit.json").unlink()
    resumed = train("train.max_steps=2", "train.save_steps=2", "--resume", output="cut")

    assert json.loads((resumed / "alignkit.json").read_text())["steps"] == 2
    left, right = (load_file(run / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(left[name], right[name]) for name in left)
