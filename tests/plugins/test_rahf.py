"""Runs of RAHF: tuners and contrasts, learning, exact resume across both phases, what is saved, and bad input."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import on_two_processes
from run_folders import logged, record, weights

from alignkit.cli import main
from alignkit.models import open_run
from alignkit.runs import fingerprint

ROWS = [
    {"prompt": f"Say {n}", "responses": ["good one", "bad", "so so"][: 2 + n % 2], "ranks": [0, 2, 1][: 2 + n % 2]}
    for n in range(16)
]


@pytest.fixture
def words(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """``words("train.max_steps=4")``: the words of a small run; settings of ``rahf`` take precedence."""
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")

    def make(*more: str, output: str = "out", rows: Any = ROWS) -> list[str]:
        data = tmp_path / "rankings.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["--plugin", "rahf", "--model", str(tiny_model()), "--output", str(tmp_path / output)]
        given += ["--data", str(data), "train.per_device_train_batch_size=4", "train.use_cpu=true", "data.eval_size=4"]
        base = [] if any("rahf.policy" in argument for argument in more) else ["rahf.policy=base"]
        return [*given, *base, "rahf.response_length=4", "train.learning_rate=1e-3", *more]

    return make


@pytest.fixture
def rahf(words: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Path]:
    """``rahf("--plugin", "full")``: a run in this process -> its folder."""

    def run(*more: str, output: str = "out", **others: Any) -> Path:
        assert main(["--debug", "train", *words(*more, output=output, **others)]) == 0
        return tmp_path / output / "rahf"

    return run


# --- tuners, contrasts and resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tuner", "contrast"), [("full", "dual"), ("lora", "single"), ("qlora", "dual")])
def test_a_run_resumed_in_either_phase_ends_in_the_same_weights(
    rahf: Callable[..., Path], train: Callable[..., Path], tuner: str, contrast: str
) -> None:
    """Six steps, three of each phase; cut after 2, 3 (the boundary) and 4."""
    sft = train("--plugin", tuner, "train.max_steps=2", "train.learning_rate=0.01", output="sft")
    settings = ["--plugin", tuner, f"rahf.policy={sft}", "train.max_steps=6", f"rahf.contrast={contrast}"]
    settings += ["train.save_steps=1", "train.eval_steps=1", "train.save_total_limit=9"]
    whole = rahf(*settings, output="whole")
    for step in (2, 3, 4):
        cut = whole.parent.with_name(f"cut{step}") / "rahf.unfinished"
        shutil.copytree(whole, cut)
        for name in ("alignkit.json", "README.md"):  # as if it had been killed after this step
            (cut / name).unlink()
        for later in range(step + 1, 7):
            shutil.rmtree(cut / "checkpoints" / f"checkpoint-{later}")
        resumed = rahf(*settings, "--resume", output=f"cut{step}")

        assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
        assert record(resumed)["metrics"] == record(whole)["metrics"]
        assert (whole / "answers.jsonl").read_text() == (resumed / "answers.jsonl").read_text()
    assert len(logged(whole, "contrast_loss")) == len(logged(whole, "fit_loss")) == 3
    assert record(whole)["weights"] == ("model" if tuner == "full" else "adapter")
    assert not [name for name in weights(whole) if "role_" in name]


def test_the_base_is_unchanged_and_only_the_policy_is_saved(
    rahf: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    before = fingerprint(tiny_model())
    folder = rahf("--plugin", "lora", "train.max_steps=4", "train.learning_rate=0.01")
    model, base = (open_run(folder, record(folder), torch.float32), open_run(folder, record(folder), torch.float32))
    ids = torch.arange(1, 9)[None]
    with base.disable_adapter():
        untrained = base(ids).logits

    assert fingerprint(tiny_model()) == before
    assert set(model.peft_config) == {"default"}
    assert not torch.equal(model(ids).logits, untrained)
    trained = {
        name.split(".layers.")[1][0] for name, tensor in weights(folder).items() if "lora_B" in name and tensor.any()
    }
    assert trained == {"0"}  # the first of two layers, whose output moves


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("contrast", "tuner"), [("dual", "lora"), ("single", "lora"), ("dual", "full")])
def test_it_learns_what_is_good_and_moves_the_policy(rahf: Callable[..., Path], contrast: str, tuner: str) -> None:
    rate = {"lora": 0.003, "full": 0.0003}[tuner]
    settings = [f"rahf.contrast={contrast}", "train.max_steps=60", f"train.learning_rate={rate}", "rahf.layers=[1,2]"]
    settings += ["rahf.alpha=1", "rahf.eval_prompts=4"]
    folder = rahf("--plugin", tuner, *settings, "train.logging_steps=1")
    metrics = record(folder)["metrics"]

    assert metrics["first_eval_accuracy"] == 0.5
    assert contrast == "single" or metrics["first_eval_contrast_accuracy"] == 0.5  # good and bad begin as the same
    assert metrics["first_eval_margin"] == metrics["first_eval_kl"] == 0
    assert metrics["eval_contrast_accuracy"] == 1
    assert metrics["eval_contrast_loss"] < metrics["first_eval_contrast_loss"]
    assert metrics["eval_accuracy"] == 1
    assert metrics["eval_margin"] > 5 * metrics["eval_margin_error"] > 0
    fit, shift = logged(folder, "fit_loss"), logged(folder, "shift")
    assert fit[0] == pytest.approx(shift[0], rel=1e-3)  # the policy is its start
    assert fit[-1] < 0.85 * fit[0]
    assert metrics["eval_pairs"] == 4
    assert record(folder)["layers"] == [1, 2]


def test_the_learning_rate_follows_the_schedule_in_each_phase(rahf: Callable[..., Path]) -> None:
    """Half a cosine from 1 to a tenth over four steps each; LoRA beside a full policy learns ten times as fast."""
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    for tuner, scale in (("lora", 1), ("full", 10)):
        settings = ["train.max_steps=8", "train.logging_steps=1", "data.eval_size=0", "train.learning_rate=1e-4"]
        folder = rahf("--plugin", tuner, *settings, output=tuner)

        rates = [1e-4 * scale * factor for factor in cosine] + [1e-4 * factor for factor in cosine]
        assert logged(folder, "learning_rate") == pytest.approx(rates)


def test_accumulated_microbatches_are_the_same_step(rahf: Callable[..., Path], sgd: None) -> None:
    """12 pairs in one batch, and in microbatches of 5, 5 and 2, in both phases."""
    rows = [{"prompt": f"Say {n}", "chosen": "good " * (n % 3 + 1), "rejected": "bad"} for n in range(12)]
    settings = ["--plugin", "lora", "--plugin", "sgd", "train.max_steps=2", "train.bf16=false", "data.eval_size=0"]
    settings += ["train.learning_rate=0.1", "rahf.contrast=single", "train.logging_steps=1"]
    one = rahf(*settings, "train.per_device_train_batch_size=12", rows=rows, output="one")
    micro = ["train.per_device_train_batch_size=5", "train.gradient_accumulation_steps=3"]
    many = rahf(*settings, *micro, rows=rows, output="many")

    for name in ("loss", "contrast_loss", "fit_loss", "shift"):
        assert logged(one, name) == pytest.approx(logged(many, name), rel=1e-3), name
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(many)[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_loss_of_a_plugin_trains(rahf: Callable[..., Path], install: Callable[..., None]) -> None:
    install(
        "squared",
        """
        from alignkit import HiddenStates, Loss, LossOutput, hookimpl

        def build(config):
            def loss(batch):
                squares = (batch.hidden - batch.target).square().sum(-1).mean(0)
                return LossOutput(squares.sum() / batch.num_tokens, {"largest": squares.max()})
            return loss

        @hookimpl
        def alignkit_loss():
            return [Loss(name="squared", summary="squared distances", batch=HiddenStates, build=build)]
        """,
    )
    folder = rahf("--plugin", "squared", "train.max_steps=2", "train.logging_steps=1")

    assert record(folder)["loss"] == "squared"
    assert len(logged(folder, "largest")) == 1


def test_other_stages_start_from_it(
    rahf: Callable[..., Path], words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = rahf("--plugin", "lora", "train.max_steps=2")
    data, answers = str(run.parents[1] / "rankings.jsonl"), run.parents[1] / "answers.jsonl"
    assert main(["sample", str(run), data, "--max-new-tokens", "4", "-k", "1", "--output", str(answers)]) == 0
    given = words(f"dpo.policy={run}", "dpo.response_length=4", "train.max_steps=1")
    given = ["--plugin", "dpo", *(word for word in given[2:] if not word.startswith("rahf."))]
    assert main(["train", *given]) == 0

    assert len(answers.read_text().splitlines()) == 16
    assert record(run.parent / "dpo")["parents"]["policy"]["folder"] == str(run)


def test_two_processes_train_as_one(rahf: Callable[..., Path], words: Callable[..., list[str]]) -> None:
    settings = ["--plugin", "lora", "train.max_steps=4", "train.bf16=false", "train.logging_steps=1"]
    one = rahf(*settings, output="one")
    done = on_two_processes("train", *words(*settings, "train.per_device_train_batch_size=2", output="two"))
    two = one.parents[1] / "two" / "rahf"

    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("contrast_loss", "fit_loss", "eval_margin", "eval_contrast_loss"):
        assert logged(one, name) == pytest.approx(logged(two, name), rel=2e-3, abs=1e-5), name


# --- bad input -------------------------------------------------------------------------------------------------------

TIES = [{"prompt": f"Say {n}", "responses": ["a", "b"], "ranks": [1, 1]} for n in range(8)]
ONE = [{"prompt": f"Say {n}", "responses": ["a"], "ranks": [0]} for n in range(8)]


@pytest.mark.parametrize(
    ("settings", "rows", "message"),
    [
        (["rahf.layers=[1,3]"], ROWS, "rahf.layers: the model has layers 1 to 2, and no layer 3"),
        (["rahf.layers=[0]"], ROWS, "rahf.layers.0: Input should be greater than or equal to 1 (got 0)"),
        (["rahf.layers=[]"], ROWS, "rahf.layers"),
        (["rahf.alpha=0"], ROWS, "rahf.alpha: Input should be greater than 0 (got 0)"),
        (["rahf.alpha=-1"], ROWS, "rahf.alpha: Input should be greater than 0 (got -1)"),
        (["rahf.contrast=single", "rahf.label_smoothing=0.5"], ROWS, "label_smoothing: Input should be less than 0.5"),
        (["rahf.label_smoothing=0.1"], ROWS, "rahf.label_smoothing has no effect without rahf.contrast=single"),
        (["rahf.contrast=none"], ROWS, "rahf.contrast: Input should be 'dual' or 'single'"),
        (["rahf.contrast_share=1"], ROWS, "rahf.contrast_share: Input should be less than 1"),
        (["rahf.contrast=single", "rahf.bad_instruction=x", "rahf.good_instruction=x"], ROWS, "are the same"),
        ([], TIES, "rankings are ties"),
        ([], ONE, "answers"),
        (["train.load_best_model_at_end=true"], ROWS, "train.load_best_model_at_end has no effect in stage 'rahf'"),
        (["rahf.train.lr_scheduler_type=greedy"], ROWS, "lr_scheduler_type=greedy has no effect in stage 'rahf'"),
    ],
)
def test_check_refuses_what_cannot_be(
    words: Callable[..., list[str]], settings: list[str], rows: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *words(*settings, rows=rows)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "settings"),
    [("check", ["train.max_steps=1"]), ("train", ["train.num_train_epochs=1", "train.gradient_accumulation_steps=3"])],
)
def test_a_run_of_one_step_is_refused(
    words: Callable[..., list[str]], command: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *words(*settings)]) == 2
    assert "rahf needs at least two optimizer steps" in capsys.readouterr().err


def test_the_plan_names_the_models(words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    for tuner, line in (("lora", "policy, reference, good, bad on one base"), ("full", "policy by itself, reference,")):
        assert main(["check", *words("--plugin", tuner)]) == 0
        assert line in capsys.readouterr().out
