"""KTO runs: tuners, resume, the reference, held-out metrics, data, and what ``check`` reports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import on_two_processes
from run_folders import logged, record, weights

from alignkit.cli import main

RATINGS = [{"prompt": f"Say {n}", "completion": "good one" if n % 2 else "bad", "label": n % 2 == 1} for n in range(24)]
HALF = pytest.approx(0.5, abs=1e-6)

Command = Callable[..., list[str]]
Train = Callable[..., Path]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
def test_it_starts_at_the_sft_run_and_a_resumed_run_ends_in_the_same_weights(
    train_kto: Train, train: Train, tuner: str
) -> None:
    sft = train("--plugin", tuner, "train.max_steps=2", "train.learning_rate=0.01", output="sft")
    settings = ["--plugin", tuner, f"kto.policy={sft}", "train.max_steps=6", "train.learning_rate=0.003"]
    settings += ["train.save_steps=2", "train.eval_steps=2", "train.save_total_limit=9", "train.logging_steps=1"]
    whole, cut = train_kto(*settings, output="whole"), train_kto(*settings, output="cut")
    for name in ("alignkit.json", "README.md"):  # as if it had been killed after step 4
        (cut / name).unlink()
    shutil.rmtree(cut / "checkpoints" / "checkpoint-6")
    cut.rename(cut.with_name("kto.unfinished"))
    resumed = train_kto(*settings, "--resume", output="cut")

    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    assert (whole / "answers.jsonl").read_text() == (resumed / "answers.jsonl").read_text()
    metrics = record(whole)["metrics"]
    assert metrics["eval_kl"] == record(resumed)["metrics"]["eval_kl"] != 0
    assert metrics["first_eval_loss"] == HALF
    assert metrics["first_eval_kl"] == metrics["first_eval_margin"] == 0
    assert metrics["first_eval_accuracy"] == 0.5
    assert logged(whole, "loss")[0] == HALF
    assert metrics["eval_loss"] != HALF
    assert record(whole)["parents"]["policy"]["folder"] == str(sft)
    assert not (whole / "ref").exists()


def test_it_learns_from_the_base_and_reports_its_metrics(train_kto: Train) -> None:
    folder = train_kto("--plugin", "lora", "train.max_steps=20", "train.learning_rate=0.003", rows=RATINGS)
    metrics = record(folder)["metrics"]

    assert record(folder)["data"]["format"] == "rated"
    assert metrics["eval_accuracy"] > 0.9
    assert metrics["eval_answers"] == 4
    assert metrics["eval_loss"] < 0.45
    assert metrics["eval_margin"] > 0.5
    rewards = metrics["eval_rewards_good"] - metrics["eval_rewards_bad"]
    assert metrics["eval_margin"] == pytest.approx(rewards, abs=1e-5)
    moved = metrics["eval_logps_good"] - metrics["first_eval_logps_good"]
    assert metrics["eval_rewards_good"] == pytest.approx(0.1 * moved, abs=1e-3)
    assert {"rewards_good", "rewards_bad", "margin", "reference_point", "num_tokens"} <= {
        name for line in (folder / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)
    }


def test_two_processes_pair_the_answers_and_train_as_one(train_kto: Train, kto_command: Command) -> None:
    settings = ["--plugin", "full", "train.max_steps=6", "train.learning_rate=0.003", "train.bf16=false"]
    settings += ["train.logging_steps=1", "train.per_device_eval_batch_size={}"]
    one = train_kto(*settings[:-1], settings[-1].format(4), output="one")
    sizes = ["train.per_device_train_batch_size=2", settings[-1].format(5)]
    done = on_two_processes("train", *kto_command(*settings[:-1], *sizes, output="two"))
    two = one.parents[1] / "two" / "kto"

    assert done.returncode == 0, done.stderr[-2000:]
    assert max(logged(one, "eval_kl")) > 0
    for name in ("loss", "rewards_good", "reference_point", "eval_kl", "eval_margin", "eval_loss"):
        assert logged(one, name) == pytest.approx(logged(two, name), rel=2e-3, abs=1e-5), name


def test_a_precomputed_reference_gives_the_same_run(train_kto: Train, train: Train, sgd: None) -> None:
    sft = train("--plugin", "full", "train.max_steps=1", output="sft")
    settings = ["--plugin", "full", "--plugin", "sgd", f"kto.policy={sft}", "train.max_steps=3", "train.bf16=false"]
    live = train_kto(*settings, "train.learning_rate=0.1", output="live")
    before = train_kto(*settings, "train.learning_rate=0.1", "kto.precompute_ref_log_probs=true", output="before")

    assert record(before)["metrics"]["first_eval_loss"] == HALF
    assert "eval_kl" not in record(before)["metrics"]
    for name, tensor in weights(live).items():
        torch.testing.assert_close(weights(before)[name], tensor)


def test_accumulated_microbatches_weigh_every_answer_the_same(train_kto: Train, sgd: None, install: Any) -> None:
    """12 answers in one batch, and in microbatches of 5, 5 and 2, are the same step if the loss uses no KL."""
    install(
        "no-kl",
        """
        from alignkit import Loss, LossOutput, RatedLogps, hookimpl

        def build(config):
            def loss(batch):
                assert batch.ref_logps is None and batch.kl is None
                sign = 1 - 2 * batch.good.float()
                return LossOutput((sign * (batch.logps / batch.length).exp()).mean(), {"tokens": batch.length.sum()})
            return loss

        @hookimpl
        def alignkit_loss():
            return [Loss(name="no-kl", summary="", batch=RatedLogps, build=build, needs_reference=False)]
        """,
    )
    settings = ["--plugin", "full", "--plugin", "sgd", "--plugin", "no-kl", "train.max_steps=1", "train.bf16=false"]
    settings += ["train.learning_rate=10", "data.eval_size=0"]
    one = train_kto(*settings, "train.per_device_train_batch_size=12", rows=RATINGS[:12], output="one")
    micro = ["train.per_device_train_batch_size=5", "train.gradient_accumulation_steps=3"]
    many = train_kto(*settings, *micro, rows=RATINGS[:12], output="many")

    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(many)[name], tensor, rtol=1e-4, atol=1e-6)


def test_an_answer_that_is_too_long_is_an_error_or_left_out(
    train_kto: Train, kto_command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*RATINGS, {"prompt": "Long?", "completion": "long " * 90, "label": True}]

    assert main(["check", *kto_command("kto.max_length=80", "data.eval_size=0", rows=rows)]) == 2
    assert "error: 1 of 25 answers are over 80 tokens" in capsys.readouterr().err
    skip = ["kto.max_length=80", "kto.too_long=skip", "data.eval_size=0", "train.max_steps=1"]
    train_kto(*skip, rows=rows)
    output = capsys.readouterr().out
    assert "over 80 tokens, the longest" in output
    assert "12 good and 12 bad answers" in output


# --- check -----------------------------------------------------------------------------------------------------------


def labeled(**labels: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{label} {n}", "completion": "So.", "label": label == "good"}
        for label, number in labels.items()
        for n in range(number)
    ]


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (labeled(good=8), [], "kto needs good and bad answers: all 8 are good. Add bad ones. To imitate good answers"),
        (labeled(bad=8), [], "kto needs good and bad answers: all 8 are bad. Add good ones"),
        (RATINGS, ["train.per_device_train_batch_size=1"], "set train.per_device_train_batch_size to 2 or more"),
        ([{**row, "prompt": "Same?"} for row in RATINGS], [], "all training rows have the same prompt. Add rows"),
        ([{**RATINGS[0], "label": "yes"}], [], "line 1: 'label' is 'yes': it must be true or false (or 1 or 0)"),
        ([*RATINGS, {**RATINGS[0], "label": 0.5}], [], "line 25: 'label' is 0.5: it must be true or false (or 1 or 0)"),
        ([*RATINGS, {**RATINGS[0], "label": None}], [], "line 25: 'label' is missing"),
        (RATINGS, ["kto.train.train_sampling_strategy=group_by_length"], "the answers of a batch estimate its KL"),
        (
            [{"prompt": f"{n}", "responses": ["a", "b"], "ranks": [0, 0]} for n in range(4)],
            [],
            "no rated answer to train on: the answers of each ranking are tied",
        ),
    ],
    ids=["good", "bad", "batch", "prompt", "yes", "half", "null", "order", "ties"],
)
def test_check_reports_in_one_line_what_kto_cannot_learn_from(
    kto_command: Command, rows: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["check", *kto_command(*words, "data.eval_size=0", rows=rows)]
    capsys.readouterr()

    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_check_imports_no_torch(kto_command: Command) -> None:
    code = "import sys; from alignkit.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    words = kto_command("data.eval_size=0", rows=labeled(good=8))
    done = subprocess.run([sys.executable, "-c", code, "check", *words], capture_output=True, text=True)

    assert done.stdout.split() == ["2", "False"], done.stderr


@pytest.mark.parametrize(
    ("counts", "words", "note"),
    [
        ({"good": 9, "bad": 11}, [], "note  9 good and 11 bad answers\n"),
        (
            {"good": 4, "bad": 40},
            [],
            "note  4 good and 40 bad answers. Weighted, that is 0.1 good to 1 bad; KTO recommends 1 to 1.33: set "
            "loss.good_weight to a value from 10 to 13.3\n",
        ),
        (
            {"good": 40, "bad": 4},
            [],
            "is 10 good to 1 bad; KTO recommends 1 to 1.33: set loss.bad_weight to a value from",
        ),
        ({"good": 4, "bad": 40}, ["loss.good_weight=12"], "note  4 good and 40 bad answers\n"),
    ],
)
def test_the_plan_counts_ratings_and_recommends_weights(
    kto_command: Command, counts: dict[str, int], words: list[str], note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *kto_command(*words, "data.eval_size=0", rows=labeled(**counts))]) == 0
    assert note in capsys.readouterr().out


# --- what else reads rated answers -----------------------------------------------------------------------------------


def test_sft_reads_rated_answers_as_demonstrations(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bad ones are bad rows, as before there was a format for them."""
    file = tmp_path / "ratings.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in RATINGS))
    words = ["--plugin", "sft", "--model", str(tiny_model()), "--data", str(file)]

    assert main(["check", *words]) == 2
    assert "line 1: 'label' is false, which marks a bad answer" in capsys.readouterr().err
    assert main(["check", *words, "data.on_bad_row=skip"]) == 0
    assert "12 rows from" in capsys.readouterr().out


def test_a_stage_names_the_rows_that_it_expects(
    tiny_model: Callable[..., Path], tiny_data: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--plugin", "kto", "--model", str(tiny_model()), "--data", str(tiny_data("demonstrations"))]

    assert main(["check", *words]) == 2
    assert "contains demonstrations (format 'prompt-completion'); expected rated answers" in capsys.readouterr().err


def test_compare_takes_the_held_out_prompts_of_a_kto_run(
    train_kto: Train, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = train("--plugin", "lora", "train.max_steps=1", output="sft")
    folder = train_kto("--plugin", "lora", "train.max_steps=1", f"kto.policy={sft}", rows=RATINGS)
    words = ["--reward", "alignkit.bundled.guide:score", "--max-new-tokens", "4"]

    assert main(["compare", str(folder), str(sft), *words]) == 0
    assert "8 prompts, held out by the runs" in capsys.readouterr().out  # four of each
