"""``alignkit compare``: several runs on the same prompts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_plugins import JUDGES

from alignkit.cli import main
from alignkit.evaluation import paired, standard_error
from alignkit.evaluation.checkpoints import Policy
from alignkit.evaluation.comparison import Asked
from alignkit.evaluation.paired import Answered
from alignkit.runs.lineage import Parent

RANKINGS = [{"prompt": f"p{n}", "responses": ["a", "bb", "c"], "ranks": [0, 1, 2]} for n in range(12)]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def runs(
    train: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, str]]:
    """``runs("lora")``: an SFT run of a tiny model and a DPO run that goes on from it -> their folders."""
    monkeypatch.chdir(tmp_path)
    Path("judges.py").write_text(
        "def longest(prompts, answers):\n    return [float(len(a)) for a in answers]\n"
        "def stop(prompts, answers):\n    raise KeyboardInterrupt\n"
    )

    def make(tuner: str, above: str | None = None) -> tuple[str, str]:
        sft = train("--plugin", tuner, "train.max_steps=2", "train.learning_rate=0.01", output="out")
        rows = write(tmp_path / "rankings.jsonl", RANKINGS)
        common = ["--model", str(tiny_model()), "--output", "out", "train.use_cpu=true", "data.eval_size=4"]
        settings = ["train.max_steps=2", "train.learning_rate=0.01", "train.per_device_train_batch_size=2"]
        settings += [f"dpo.policy={sft}", "dpo.eval_prompts=0", "--data", rows]
        assert main(["train", "--plugin", "dpo", "--plugin", above or tuner, *common, *settings]) == 0
        return "out/sft", "out/dpo"

    return make


def compare(*arguments: str) -> int:
    return main(["--debug", "compare", *arguments, "--max-new-tokens", "6", "--batch", "3"])


@pytest.mark.parametrize(("tuner", "above"), [("lora", "lora"), ("full", "lora"), ("lora", "full")])
def test_runs_are_compared_whatever_they_are_made_of(
    runs: Callable[..., tuple[str, str]], tuner: str, above: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sft, dpo = runs(tuner, above)
    capsys.readouterr()
    assert compare(sft, dpo, "--reward", "judges:longest", "-o", "table.jsonl", "-o", "points.png") == 0
    printed = capsys.readouterr().out
    first, second = read(Path("table.jsonl"))

    assert "8 prompts, held out by the runs; scores by judges:longest" in printed
    assert "compared with out/sft, prompt by prompt" in printed
    shares = [f"{second[share]:.1%}" for share in ("wins", "ties", "losses", "win_rate")]
    assert " ".join(shares) in " ".join(printed.split())
    assert first["win_rate"] is None
    assert first["kl"] == 0
    assert second["prompts"] == 8
    assert 0 <= second["win_rate"] <= 1
    assert second["kl"] != 0
    assert 1 <= second["length"] <= 6
    assert second["reward"] == "judges:longest"
    assert second["wins"] + second["ties"] + second["losses"] == pytest.approx(1)
    assert second["win_rate_interval"][0] <= second["win_rate"] <= second["win_rate_interval"][1]
    assert second["score_difference"] == pytest.approx(second["score"] - first["score"])
    assert Path("points.png").read_bytes().startswith(b"\x89PNG")

    assert compare(sft, dpo, "--reward", "judges:longest", "--temperature", "0.01", "-o", "cold.jsonl") == 0
    cold = read(Path("cold.jsonl"))[1]
    assert cold["temperature"] == 0.01
    assert cold["kl"] > 3 * second["kl"]  # log-probabilities are of the temperature too

    assert compare(sft, dpo, "--reward", "judges:stop", "-o", "stopped.jsonl") == 130  # Ctrl-C
    assert not Path("stopped.jsonl").exists()


def test_adapters_on_one_base_are_what_they_are_by_themselves(runs: Callable[..., tuple[str, str]]) -> None:
    """The adapter that is put onto the first run's model says what the run's own model says."""
    from alignkit.evaluation.answering import _logps, _open, _sharing_a_base
    from alignkit.runs import manifest

    found = [Policy(Parent("", Path(folder), manifest.read(Path(folder)))) for folder in runs("lora")]
    asked = Asked([[{"role": "user", "content": f"What is {n}?"}] for n in range(4)], 6, 2, 0)
    answers = [[7, 8, 9], [10], [11, 12], [13, 0]]
    together, adapters = _open(found)
    alone, (adapter,) = _open(found[1:])

    assert _sharing_a_base(found) == [[0, 1]]
    mine = torch.tensor(_logps(alone, adapter, asked, answers))
    torch.testing.assert_close(torch.tensor(_logps(together, adapters[1], asked, answers)), mine, rtol=1e-3, atol=1e-2)
    assert not torch.allclose(torch.tensor(_logps(together, adapters[0], asked, answers)), mine, atol=1e-2)


def test_a_reward_run_beside_the_runs_is_the_judge(
    runs: Callable[..., tuple[str, str]], tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sft, dpo = runs("lora")
    assert compare(sft, dpo) == 2
    assert "these runs were trained against no reward model" in capsys.readouterr().err
    common = ["--model", str(tiny_model()), "--output", "out", "--data", "rankings.jsonl", f"rm.policy={sft}"]
    assert main(["train", "--plugin", "rm", *common, "train.max_steps=1", "train.use_cpu=true"]) == 0
    prompts = write(Path("prompts.jsonl"), [{"prompt": f"p{n}"} for n in range(12)])
    capsys.readouterr()
    assert compare(sft, dpo, "--data", prompts, "-o", "table.jsonl", "--limit", "3") == 0
    said = capsys.readouterr()
    rows = read(Path("table.jsonl"))

    assert "3 prompts" in said.out
    assert "one of these runs was trained on" in said.err
    assert rows[0]["reward"] == "out/rm"
    assert all(math.isfinite(row["score"]) for row in rows)


def test_a_judge_compares_each_run_with_the_first(
    runs: Callable[..., tuple[str, str]],
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install("tests", JUDGES)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    sft, dpo = runs("lora")
    judge = [sft, dpo, "-p", "tests", "-o", "table.jsonl", "--judge"]
    capsys.readouterr()
    assert compare(*judge, "right", "--reward", "judges:longest") == 0
    printed = capsys.readouterr().out
    first, second = read(Path("table.jsonl"))

    assert "8 prompts, held out by the runs; scores by judges:longest; judged by right, at most 16 requests" in printed
    assert " out/dpo judges:longest " in " ".join(printed.split())
    assert " out/dpo right " in " ".join(printed.split())
    assert "kept 100.0% ± 0.0% of its verdicts when the answers were swapped" in printed
    assert first["judge_win_rate"] is None
    longer = second["judge_win_rate"]
    assert longer == second["win_rate"] > 0  # both prefer the longer answer
    assert second["judge_win_rate_error"] == pytest.approx(second["win_rate_error"])
    assert (second["judge"], second["judge_prompts"], second["judge_consistency"]) == ("right", 8, 1)

    assert compare(*judge, "first", "-o", "points.png") == 0
    printed = capsys.readouterr().out
    (_, second) = read(Path("table.jsonl"))
    assert (second["score"], second["win_rate"], second["reward"]) == (None, None, None)
    assert (second["judge_win_rate"], second["judge_consistency"]) == (0.5, 0)
    assert "warning: this judge is not reliable" in printed
    assert " score" not in printed
    assert Path("points.png").read_bytes().startswith(b"\x89PNG")

    assert compare(*judge, "silent", "judge.seed=1") == 0
    assert "left out 8 of 8 pairs: silent gave no verdict on them" in capsys.readouterr().out
    assert read(Path("table.jsonl"))[1]["judge_win_rate"] is None
    assert compare(*judge, "judges:longest") == 0  # a scorer is a judge too
    assert read(Path("table.jsonl"))[1]["judge_win_rate"] == longer


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["out/sft", "out/dpo", "--judge", "rihgt"], "--judge: 'rihgt' is neither module:function, nor a finished run"),
        (["out/sft", "out/dpo", "--judge", "function"], "judge 'function' needs judge.call=module:function"),
        (["out/sft", "out/dpo", "judge.call=x"], "judge.call=x has no effect without --reward NAME or --judge NAME"),
        (["out/sft"], "compare needs at least two runs"),
        (["out/sft", "out/sft"], "out/sft is named twice"),
        (["out/sft", "out/nosuch"], "compare: out/nosuch is not a finished run"),
        (["out/sft", "out/dpo", "--reward", "out/sft"], "--reward: out/sft is a policy (stage sft), not a reward"),
        (["out/sft", "out/dpo", "--reward", "judges:f"], "judges has no function f"),
        (
            ["out/sft", "out/dpo", "-o", "table.txt"],
            "the file must end in .jsonl (the table), .svg or .png (a picture)",
        ),
        (["out/sft", "out/dpo", "-o", "points.svg"], "needs matplotlib, which is not installed: pip install"),
        (["out/dpo", "--checkpoints"], "out/dpo keeps no checkpoints: it was trained with train.save_strategy=no"),
        (["--checkpoints", "--reward", "judge", "reward.label=1"], "compare needs at least one run"),
        (["out/sft", "out/dpo", "-o", "points.png"], "needs matplotlib, which is not installed: pip install"),
    ],
)
def test_mistakes_are_errors_before_anything_is_loaded(
    arguments: list[str],
    said: str,
    folders: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "alignkit.evaluation.answering", raising=False)

    assert main(["compare", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert "alignkit.evaluation.answering" not in sys.modules


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders with the manifests of policies and nothing else."""
    monkeypatch.chdir(tmp_path)
    Path("judges.py").write_text("def longest(prompts, answers):\n    return [len(a) for a in answers]\n")
    for stage in ("sft", "dpo"):
        folder = Path("out") / stage
        folder.mkdir(parents=True)
        record = {
            "manifest_version": 2,
            "stage": stage,
            "role": "policy",
            "parents": {},
            "finished": "2026-11-25T12:00Z",
        }
        prints = {"weights": stage, "tokenizer": "t", "chat_template": "c", "special_tokens": {}}
        (folder / "alignkit.json").write_text(json.dumps({**record, "fingerprints": prints}))


def test_metrics_by_hand() -> None:
    answered = Answered(["a", "bb", "c", "d"], [1, 2, 3, 4], [True, True, False, True], [0.0, 1.0, 2.0, 3.0])
    row = paired.run_metrics(Parent("dpo", Path("d"), {}), answered, [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 9.0, 1.0])

    assert (row["wins"], row["ties"], row["losses"]) == (0.5, 0.25, 0.25)
    assert row["win_rate"] == (0.5 + 1 + 0 + 1) / 4
    # deviations -.125, .375, -.625, .375: variance .6875 / 3, of the mean of four
    assert row["win_rate_error"] == pytest.approx(math.sqrt(0.6875 / 3 / 4))
    assert row["score"] == 2.5
    # differences 0, 1, -6, 3: mean -.5, squared deviations .25 + 2.25 + 30.25 + 12.25 = 45
    assert row["score_difference"] == -0.5
    assert row["score_difference_error"] == pytest.approx(math.sqrt(45 / 3 / 4))
    assert row["kl"] == 1.5
    assert row["length"] == 2.5
    assert row["eos_rate"] == 0.75


def test_the_error_of_a_difference_is_that_of_pairs_of_answers_to_a_prompt() -> None:
    """Prompts that differ in how hard they are do not add to it, as they would to the error of independent means."""
    answered = Answered([""] * 4, [1] * 4, [True] * 4, [0.0] * 4)
    first = [-10.0, 0.0, 10.0, 20.0]
    row = paired.run_metrics(Parent("dpo", Path("d"), {}), answered, [score + 1 for score in first], first)

    assert (row["score_difference"], row["score_difference_error"]) == (1, 0)
    assert row["score_error"] > 6
    assert row["win_rate_interval"][1] == 1


def test_an_interval_of_wins_by_hand() -> None:
    # 8 wins, 2 losses: Wilson's interval (1927) is .490 to .943
    assert paired.wilson_interval([1.0] * 8 + [0.0] * 2) == pytest.approx([0.490, 0.943], abs=5e-4)
    assert paired.wilson_interval([1.0] * 5) == pytest.approx([5 / (5 + 1.96**2), 1.0])
    assert paired.wilson_interval([0.5] * 4) == pytest.approx([0.150, 0.850], abs=5e-4)  # as of 2 wins and 2 losses
    assert paired.wilson_interval([]) is None


def test_json_is_one_object_and_nothing_else(
    runs: Callable[..., tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    sft, dpo = runs("lora")
    Path("printing.py").write_text(
        "def longest(prompts, answers):\n    print('a reward that prints')\n"
        "    return [float(len(a)) for a in answers]\n"
    )
    capsys.readouterr()
    assert compare(sft, dpo, "--reward", "printing:longest", "--json", "-o", "table.jsonl") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    table = read(Path("table.jsonl"))

    assert "a reward that prints" in printed.err
    assert "compared with out/sft" in printed.err
    assert result.pop("runs") == [
        {key: value for key, value in row.items() if key not in ("reward", "max_new_tokens", "temperature", "seed")}
        for row in table
    ]
    assert result == {
        **{"compared_with": "out/sft", "prompts": 8, "data": "held out by the runs", "reward": "printing:longest"},
        **{"max_new_tokens": 6, "temperature": 1.0, "seed": 0, "judge": None, "judge_report": None},
    }
    assert compare(sft, "out/nosuch", "--json") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("alignkit: error: compare: out/nosuch is not a finished run") == 1


def test_the_error_of_a_mean_by_hand() -> None:
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(math.sqrt(1 / 3))
    # two groups that sum to 2 * (1 - 2) = -2 and 1 * (4 - 2) = 2 about the mean of 2
    assert standard_error([1.0, 1.0, 4.0], [0, 0, 1]) == pytest.approx(math.sqrt(8 * 2) / 3)
    assert standard_error([1.0]) == math.inf
