"""``alignkit sweep``: a run for every combination of settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ppo_runs import GOLD, SMALL

from alignkit.cli import main
from alignkit.config import grid
from alignkit.errors import ConfigError
from alignkit.runs import manifest, sweep_training
from alignkit.runs.sweep import Job

TINY = [
    *SMALL[:4],
    *SMALL[6:],
    *GOLD,
    "ppo.iterations=1",
    "ppo.batch_size=4",
    "ppo.response_length=4",
    "ppo.minibatches=1",
]
SWEEP = ["sweep", "--plugin", "ppo", "--output", "swept", *TINY]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


real = sweep_training._run


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Train in this process, which takes a tenth of the time. Returns the folders that are trained."""
    trained: list[Path] = []

    def run(job: Job, say: Callable[[str], None]) -> str | None:
        trained.append(job.folder)
        with job.log.open("a") as log:
            log.write("in the process of the test\n")
        status = main(["--debug", *sweep_training.arguments_of(job)])
        return "it failed" if status else None

    monkeypatch.setattr(sweep_training, "_run", run)
    return trained


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.02,0.05", ["0.02", "0.05"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("[a,[b,c]]", ["[a,[b,c]]"]),
        ("{name: x, weight: 2},{name: y}", ["{name: x, weight: 2}", "{name: y}"]),
        ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("it's,that", ["it's", "that"]),
        ("1, 2", ["1", "2"]),
        ("", [""]),
    ],
)
def test_commas_separate_values_except_inside_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert grid.split(text) == values


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.seed=1"], "no setting has several values. Separate them by commas"),
        (["train.seed=1,,2"], "train.seed=1,,2: a value is empty"),
        (["ppo.kl_coef=0.1,1e-1"], "the value 1e-1 is given twice"),
        (["train.seed=1,2", "train.seed=3,4"], "train.seed is given twice"),
        (["train.seed=1,2", "train.seed=3"], "train.seed is given twice"),
        (["train.seed=3", "train.seed=1,2"], "train.seed is given twice"),
    ],
)
def test_mistakes_in_values_are_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid.parse(overrides)


def test_folders_have_readable_names_that_differ() -> None:
    keys = ["ppo.kl_coef", "train.seed"]
    assert grid.folder_name({"ppo.kl_coef": "0.02", "train.seed": "1"}, keys) == "kl_coef=0.02_seed=1"
    keys = ["train.seed", "data.seed"]
    assert grid.folder_name({"train.seed": "1", "data.seed": "2"}, keys) == "train.seed=1_data.seed=2"
    names = {grid.folder_name({"data.path": path}, ["data.path"]) for path in ("[a/b,c]", "[a,b/c]", "a.jsonl")}
    assert len(names) == 3
    assert "path=a.jsonl" in names
    assert all("/" not in name and "," not in name for name in names)


def test_a_sweep_shares_its_parents_and_continues(
    folder: Path, in_this_process: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """SFT is trained once. Of a second sweep with another value, only its runs are trained."""
    Path("demos.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{n}", "response": "It is."}) + "\n" for n in range(8))
    )
    settings = [word for word in SWEEP if not word.startswith("ppo.policy")]
    settings += ["stages.sft.data.path=demos.jsonl", "sft.train.max_steps=1", "train.seed=1,2"]
    assert main([*settings, "ppo.kl_coef=0.1,0.3"]) == 0
    printed = capsys.readouterr().out
    rows = read(Path("swept/sweep.jsonl"))
    names = ["seed=1_kl_coef=0.1", "seed=1_kl_coef=0.3", "seed=2_kl_coef=0.1", "seed=2_kl_coef=0.3"]

    assert in_this_process == [Path("swept/sft"), *(Path("swept") / name / "ppo" for name in names)]
    assert [row["run"] for row in rows] == [f"swept/{name}/ppo" for name in names]
    assert rows[1]["settings"] == {"train.seed": 1, "ppo.kl_coef": 0.3}
    assert {row["state"] for row in rows} == {"finished"}
    configs = [manifest.read(Path(row["run"]))["config"]["stages"]["ppo"] for row in rows]
    assert [(config["train"]["seed"], config["kl_coef"]) for config in configs] == [
        (1, 0.1),
        (1, 0.3),
        (2, 0.1),
        (2, 0.3),
    ]
    assert {config["policy"] for config in configs} == {"swept/sft"}
    assert manifest.read(Path("swept/sft"))["config"]["stages"]["sft"]["train"].get("seed", 42) == 42
    scores = [row["metrics"]["eval_score"] for row in rows]
    mean = (scores[0] + scores[2]) / 2
    error = abs(scores[0] - scores[2]) / 2  # of two values: half their difference
    assert f"kl_coef=0.1 2 {mean:.3g} ± {error:.3g}" in " ".join(printed.split())
    assert "errors are standard errors over seeds" in printed
    curve = (Path("swept") / "sweep.svg").read_text()
    assert "kl_coef=0.1" in curve
    assert "kl_coef=0.3" in curve

    in_this_process.clear()
    assert main([*settings, "ppo.kl_coef=0.1,0.3,0.5"]) == 0
    assert [path.parent.name for path in in_this_process] == ["seed=1_kl_coef=0.5", "seed=2_kl_coef=0.5"]
    assert len(read(Path("swept/sweep.jsonl"))) == 6
    capsys.readouterr()
    assert main([*settings, "ppo.kl_coef=0.1,0.3", "ppo.gamma=0.9"]) == 2
    error_line = capsys.readouterr().err
    assert (
        "seed=1_kl_coef=0.1: swept/seed=1_kl_coef=0.1/ppo was trained with other settings. Choose another" in error_line
    )


def test_a_typo_in_a_later_value_is_found_before_anything_is_trained(
    folder: Path, in_this_process: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SWEEP, "ppo.kl_coef=0.1,0.2,o.3"]) == 2
    assert "alignkit: error: kl_coef=o.3: ppo.kl_coef: Input should be a valid number" in capsys.readouterr().err
    assert main([*SWEEP, "ppo.gamma=0.9,1", "ppo.kl_coeff=0.1"]) == 2
    assert "unknown key ppo.kl_coeff. Did you mean 'kl_coef'?" in capsys.readouterr().err
    assert main([*SWEEP, "output=a,b"]) == 2
    assert "output cannot have several values in a sweep" in capsys.readouterr().err
    assert main([*SWEEP, "train.seed=1,2", "stages.ppo.train.seed=3"]) == 2
    assert "train.seed is given twice: it is also ppo.train.seed" in capsys.readouterr().err
    assert in_this_process == []
    assert not Path("swept").exists()


def test_runs_that_fail_are_named_and_the_others_are_trained(
    folder: Path, in_this_process: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them in a real process, which is killed as the system kills one when memory runs out."""
    here = sweep_training._run
    monkeypatch.setattr(sweep_training, "_run", lambda job, say: (real if "deadly" in job.name else here)(job, say))
    Path("deadly.py").write_text("import os\ndef score(prompts, answers):\n    os.kill(os.getpid(), 9)\n")
    settings = [word for word in SWEEP if not word.startswith("reward.call")]
    assert main([*settings, "reward.call=gold:broken,deadly:score,gold:letters"]) == 1
    printed = capsys.readouterr()
    rows = read(Path("swept/sweep.jsonl"))

    assert [row["state"] for row in rows] == ["failed", "failed", "finished"]
    assert rows[1]["error"] == "killed by SIGKILL, perhaps because memory ran out"
    assert "2 of 3 runs failed" in printed.err
    assert "  call=gold-broken" in printed.err
    assert "call=gold:letters 1" in " ".join(printed.out.split())


def test_the_reason_of_a_failure_is_the_error_line_of_its_process(tmp_path: Path) -> None:
    log = tmp_path / "ppo.log"
    log.write_text("alignkit: error: an earlier attempt\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("step 1\nalignkit: error: train: out of luck\n\n")

    assert sweep_training._reason(log, start, 2) == "train: out of luck"
    assert sweep_training._reason(log, log.stat().st_size, 3) == "exit status 3"
    assert sweep_training._reason(log, log.stat().st_size, -15) == "killed by SIGTERM"


def test_a_run_whose_parent_failed_is_not_started(
    folder: Path, in_this_process: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_training, "_run", lambda job, say: "no")
    settings = [word for word in SWEEP if not word.startswith("ppo.policy")]
    assert main([*settings, "train.seed=1,2", "stages.sft.data.path=prompts.jsonl"]) == 2  # not demonstrations
    Path("demos.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{n}", "response": "It is."}) + "\n" for n in range(8))
    )
    assert main([*settings, "train.seed=1,2", "stages.sft.data.path=demos.jsonl"]) == 1
    assert "seed=1: it starts from swept/sft, which failed" in capsys.readouterr().err


COMMAND = [sys.executable, "-m", "alignkit", *SWEEP, "ppo.iterations=400", "ppo.eval_every=400", "train.seed=1,2"]


def steps(log: Path) -> int:
    """The number of steps that a run has printed."""
    return sum(line.startswith("step ") for line in log.read_text().splitlines()) if log.exists() else 0


def started(log: Path) -> subprocess.Popen[str]:
    """A sweep in a process, as soon as its first run trains."""
    before = steps(log)
    process = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while steps(log) < before + 2:
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline, log.exists() and log.read_text()
        time.sleep(0.05)
    return process


def test_ctrl_c_and_a_kill_leave_a_sweep_that_continues(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNKIT_DEBUG")
    log, unfinished = Path("swept/seed=1/ppo.log"), Path("swept/seed=1/ppo.unfinished")
    process = started(log)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "stopping after this step" in printed
    assert "stopped. To continue, run the same command again" in printed
    assert [row["state"] for row in read(Path("swept/sweep.jsonl"))] == ["waiting", "waiting"]
    assert list(unfinished.glob("checkpoints/checkpoint-*/trainer_state.json"))

    before = log.read_text().count("resuming from step")
    process = started(log)
    process.kill()
    process.communicate()
    assert log.read_text().count("resuming from") == before + 1
    pid = int(next(Path("swept/seed=1").glob(".*.lock")).read_text())  # of the run, which trains on
    second = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert second.stdout is not None
    for line in second.stdout:
        if "waiting for a process that trains in swept/seed=1/ppo" in line:
            break
    else:
        pytest.fail("the sweep did not wait for the process of the sweep that was killed")
    os.kill(pid, signal.SIGKILL)
    for line in second.stdout:
        if line.startswith("training swept/seed=1/ppo"):
            break
    else:
        pytest.fail("the sweep did not continue the run")
    second.send_signal(signal.SIGINT)
    time.sleep(0.2)
    second.send_signal(signal.SIGINT)
    second.communicate(timeout=60)


HOLDER = """
import sys
from pathlib import Path
from alignkit.runs import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_process_of_an_earlier_sweep_that_is_still_starting_is_waited_for(
    folder: Path, in_this_process: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes the lock of the run folder after the new sweep has found it free."""
    here, holders = sweep_training._run, list[subprocess.Popen[str]]()

    def taken(job: Job, say: Callable[[str], None]) -> str | None:
        if holders:
            return here(job, say)
        command = [sys.executable, "-c", HOLDER, str(manifest.unfinished(job.folder))]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        threading.Timer(0.5, holder.communicate).start()
        holders.append(holder)
        return "another process is training in the folder"

    monkeypatch.setattr(sweep_training, "_run", taken)
    assert main([*SWEEP, "train.seed=1,2"]) == 0
    assert "waiting for a process that trains in swept/seed=1/ppo" in capsys.readouterr().out
    assert [row["state"] for row in read(Path("swept/sweep.jsonl"))] == ["finished"] * 2


def test_ctrl_c_stops_a_sweep_even_if_its_run_ends_well(
    folder: Path, in_this_process: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended:
        """A process that Ctrl-C does not stop any more, because it is about to end."""

        def __init__(self, command: list[str], **_: Any) -> None:
            self.arguments = command[command.index("train") :]
            self.signals: list[int] = []

        def wait(self) -> int:
            if not self.signals:
                raise KeyboardInterrupt
            return main(["--debug", *self.arguments])

        def send_signal(self, number: int) -> None:
            self.signals.append(number)

    monkeypatch.setattr(sweep_training, "_run", real)
    monkeypatch.setattr(sweep_training.subprocess, "Popen", Ended)
    assert main([*SWEEP, "train.seed=1,2"]) == 130
    assert [row["state"] for row in read(Path("swept/sweep.jsonl"))] == ["finished", "waiting"]


def test_the_process_of_a_sweep_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom alignkit.cli import main\n"
        f"assert main({[*SWEEP, 'train.seed=1,2', '--plan']!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "2 runs of ppo in swept: train.seed = 1 | 2" in done.stdout
