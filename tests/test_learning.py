"""A run in which nothing is learned, or in which numbers are lost, says so and stops."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from alignkit.cli import main
from alignkit.runs import manifest

PLUGIN = """
    from alignkit import Loss, LossOutput, RankedScores, TokenLogps, Tuner, hookimpl

    def load(config, dtype):
        return {{}}

    def prompts(config, model, role):
        import peft
        return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))

    def unused(config, model, role):
        from torch import nn
        model.requires_grad_(False)
        model.unused = nn.Linear(2, 2)
        model.enable_input_require_grads()
        return model

    def nothing(config):
        return lambda batch: LossOutput(0 * batch.logps.sum())

    def third_is_nan(config):
        calls = []
        def loss(batch):
            calls.append(batch.logps.requires_grad)
            nan = float("nan") if sum(calls) == {nan_at} and calls[-1] else 1.0
            return LossOutput(-nan * (batch.logps * batch.mask).sum() / batch.num_tokens, {{"odd": float("nan")}})
        return loss

    def nan_held_out(config):
        def loss(batch):
            value = 1.0 if batch.logps.requires_grad else float("nan")
            return LossOutput(-value * (batch.logps * batch.mask).sum() / batch.num_tokens)
        return loss

    @hookimpl
    def alignkit_model():
        return [
            Tuner(name="prompts", summary="for a test", load=load, wrap=prompts, adapters=True, trains="inputs"),
            Tuner(name="undeclared", summary="for a test", load=load, wrap=prompts, adapters=True),
            Tuner(name="unused", summary="for a test", load=load, wrap=unused),
        ]

    @hookimpl
    def alignkit_loss():
        return [
            Loss(name="nothing", summary="for a test", batch=TokenLogps, build=nothing),
            Loss(name="nan", summary="for a test", batch=TokenLogps, build=third_is_nan),
            Loss(name="nan-held-out", summary="for a test", batch=TokenLogps, build=nan_held_out),
        ]
"""
Capture = pytest.CaptureFixture[str]
RunStage = Callable[..., Path]
Install = Callable[..., None]


@pytest.fixture
def odd(install: Install) -> list[str]:
    """A plugin of tuners and losses that do not learn, and the arguments that name it."""
    install("odd", PLUGIN.format(nan_at=3))
    return ["--plugin", "odd"]


# --- what is trained -------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_trains(run_stage: RunStage, tiny_model: Callable[..., Path], capsys: Capture) -> None:
    run_stage("sft", "--plugin", "lora", "tuner.target_modules=[q_proj, down_proj]", "tuner.r=2", "train.max_steps=1")
    trained = 2 * 2 * ((64 + 64) + (128 + 64))  # layers, rank, widths
    total = trained + sum(t.numel() for t in load_file(tiny_model() / "model.safetensors").values())
    told = f"policy: training {trained:,} of {total:,} parameters ({trained / total:.2%}): q_proj, down_proj\n"
    assert told in capsys.readouterr().out

    run_stage("sft", "--plugin", "full", "train.max_steps=1", "--overwrite")
    assert f"policy: training all {total - trained:,} parameters\n" in capsys.readouterr().out


def test_experts_that_stay_frozen_are_named(
    run_stage: RunStage, tiny_model: Callable[..., Path], capsys: Capture
) -> None:
    run_stage("sft", "--plugin", "lora", "--model", str(tiny_model("qwen2_moe")), "train.max_steps=1")
    assert "warning: the routed experts (gate_up_proj, down_proj) stay frozen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("tuner.lora_alpha=0", "lora_alpha"),
        (
            "tuner.target_modules=[q_proj, v_prj]",
            r"tuner.target_modules: no layer is named 'v_prj'. Did you mean 'v_proj'\?",
        ),
    ],
)
def test_settings_under_which_nothing_would_be_learnt_are_refused(run_stage: RunStage, setting: str, told: str) -> None:
    with pytest.raises(AssertionError, match=rf"alignkit: error: .*{told}"):
        run_stage("sft", "--plugin", "lora", setting)


# --- no gradient -----------------------------------------------------------------------------------------------------


def test_a_tuner_whose_weights_have_no_gradient_stops_the_run(run_stage: RunStage, odd: list[str]) -> None:
    told = "no weight of the policy has a gradient: the run cannot learn. What plugin odd .* tuner 'unused' trains"
    with pytest.raises(AssertionError, match=told):
        run_stage("sft", *odd, "tuner.name=unused")


def test_gradients_that_are_all_zero_stop_the_run(run_stage: RunStage, odd: list[str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="all gradients were zero: the run cannot learn"):
        run_stage("sft", *odd, "loss.name=nothing")
    with pytest.raises(AssertionError, match="all gradients of the first 10 steps are zero"):
        run_stage("sft", *odd, "loss.name=nothing", "train.max_steps=40", "--overwrite")
    assert not (tmp_path / "runs" / "sft").exists()


@pytest.mark.parametrize("stage", ["rm", "dpo", "ppo"])
def test_tuners_of_inputs_are_refused_by_the_plan_where_a_stage_cannot_use_them(
    run_stage: RunStage, odd: list[str], stage: str
) -> None:
    given = ["--plugin", "odd", "tuner.name=prompts", f"{stage}.policy=base"]
    given += ["reward.name=function", "reward.call=builtins:list"] if stage == "ppo" else []
    with pytest.raises(AssertionError, match=f"stage '{stage}' cannot use tuner 'prompts', which trains inputs"):
        run_stage(stage, *given)


def test_a_tuner_that_does_not_declare_its_inputs_is_refused_with_its_plugin(
    run_stage: RunStage, odd: list[str]
) -> None:
    told = "plugin odd .* tuner 'undeclared' trains inputs, but declares trains='weights'"
    with pytest.raises(AssertionError, match=told):
        run_stage("sft", *odd, "tuner.name=undeclared")


def test_sft_trains_inputs(run_stage: RunStage, odd: list[str]) -> None:
    folder = run_stage("sft", *odd, "tuner.name=prompts", "train.learning_rate=0.1", "train.max_steps=8")
    metrics = manifest.read(folder)["metrics"]

    assert main(["chat", str(folder), "--prompt", "Hi", "--max-new-tokens", "4"]) == 0
    assert metrics["eval_loss"] < metrics["first_eval_loss"]


# --- NaN -------------------------------------------------------------------------------------------------------------


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_a_loss_that_is_nan_stops_the_run_with_the_step_and_the_rows(
    run_stage: RunStage, odd: list[str], tmp_path: Path
) -> None:
    told = r"the loss of step 3 is nan on rows that begin '.*What is \d+ and one.*', '.*What is .*was not finished"
    with pytest.raises(AssertionError, match=told):
        run_stage("sft", *odd, "loss.name=nan", "train.max_steps=4")
    assert not (tmp_path / "runs" / "sft").exists()


def test_a_held_out_loss_that_is_nan_stops_the_run(run_stage: RunStage, odd: list[str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the held-out loss at step 0 is nan"):
        run_stage("sft", *odd, "loss.name=nan-held-out")
    assert not (tmp_path / "runs" / "sft").exists()


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_a_model_of_nan_is_refused(
    run_stage: RunStage, tiny_model: Callable[..., Path], tmp_path: Path, stage: str
) -> None:
    shutil.copytree(tiny_model(), tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    given = [] if stage == "sft" else [f"{stage}.policy=base"]
    given += ["reward.name=function", "reward.call=builtins:list"] if stage == "ppo" else []
    with pytest.raises(AssertionError, match="the model .*base has NaN or infinite values in .*model.norm.weight"):
        run_stage(stage, *given, "--model", str(tmp_path / "base"))


def test_weights_that_became_nan_in_the_last_step_are_not_finished(
    run_stage: RunStage, install: Install, tmp_path: Path
) -> None:
    install(
        "poison",
        """
        from alignkit import hookimpl

        @hookimpl
        def alignkit_callbacks():
            from transformers import TrainerCallback

            class Poison(TrainerCallback):
                def on_train_end(self, args, state, control, model, **kwargs):
                    model.lm_head.weight.data[5, 5] = float("inf")

            return [Poison()]
        """,
    )
    with pytest.raises(
        AssertionError,
        match="not finished: the trained model has NaN or infinite values in lm_head",
    ):
        run_stage("sft", "--plugin", "full", "--plugin", "poison", "data.eval_size=0")
    assert not (tmp_path / "runs" / "sft").exists()


def test_no_file_holds_what_is_no_json(run_stage: RunStage, install: Install) -> None:
    install("odd", PLUGIN.format(nan_at=99))
    folder = run_stage("sft", "--plugin", "odd", "loss.name=nan")
    metrics = strict((folder / "alignkit.json").read_text())["metrics"]
    logged = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    assert metrics["eval_odd"] is None
    assert any(line.get("odd", 0) is None for line in logged)
