"""What plugins hand over is looked at there: the error names plugin, distribution, version, value, and expectation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit import LossOutput, PluginError, SampledAnswers, Sampling, TokenLogps
from alignkit.cli import main
from alignkit.registry import checks

Install = Callable[..., None]
RunStage = Callable[..., Path]

ODD = """
from alignkit import *

def class_that_raises():
    import torch
    return torch.optim.SGD, {"lr": -1.0}

def only_a_class():
    import torch
    return torch.optim.SGD

def same(config, model, role):
    return model

def loss(name, build):
    return Loss(name=name, summary="for a test", batch=TokenLogps, build=build)

@hookimpl
def alignkit_loss():
    return [loss("none", lambda config: None), loss("tensor", lambda config: lambda batch: -batch.logps.sum())]

@hookimpl
def alignkit_optimizer():
    return [Optimizer(name="alone", summary="for a test", build=lambda config, args: only_a_class()),
            Optimizer(name="raises", summary="for a test", build=lambda config, args: class_that_raises())]

@hookimpl
def alignkit_model():
    return [Tuner(name="no-load", summary="for a test", load=lambda config, dtype: None, wrap=same),
            Tuner(name="no-wrap", summary="for a test", load=lambda config, dtype: {}, wrap=lambda *given: None)]

@hookimpl
def alignkit_stage():
    from alignkit_sft.config import SFTConfig
    return [Stage(name="no-trainer", summary="for a test", build=lambda run: None, rows=(Demonstration,),
                  batch=TokenLogps, loss="nll", config=SFTConfig)]

def silent(name, **more):
    return Reward(name=name, summary="for a test", build=lambda *given: lambda answers: None, **more)

@hookimpl
def alignkit_reward():
    return [silent("silent"), silent("no-needs", needs=lambda config: None)]

@hookimpl
def alignkit_rollout():
    return [Rollout(name="texts", summary="for a test", build=lambda *given: lambda policy, prompts: ["So."])]
"""
RETURN = "Is a `return` missing?"


@pytest.mark.parametrize(
    ("stage", "settings", "told"),
    [
        ("sft", "loss.name=none", f"build of its loss 'none' returned None, expected a function. {RETURN}"),
        ("sft", "loss.name=tensor", "its loss 'tensor' returned a Tensor, expected LossOutput(loss, metrics)"),
        (
            "sft",
            "optimizer.name=alone",
            "build of its optimizer 'alone' returned <class 'torch.optim.sgd.SGD'>, expected a tuple of a "
            "torch.optim.Optimizer class or a factory, and a dict of its arguments",
        ),
        (
            "sft",
            "optimizer.name=raises",
            "its optimizer 'raises' could not be created: ValueError: Invalid learning rate: -1.0",
        ),
        (
            "sft",
            "tuner.name=no-load",
            f"load of its tuner 'no-load' returned None, expected a dict of arguments of from_pretrained. {RETURN}",
        ),
        (
            "sft",
            "tuner.name=no-wrap",
            f"wrap of its tuner 'no-wrap' returned None, expected a torch.nn.Module. {RETURN}",
        ),
        (
            "no-trainer",
            "train.seed=1",
            f"build of its stage 'no-trainer' returned None, expected a transformers.Trainer. {RETURN}",
        ),
        (
            "ppo",
            "ppo.policy=base rollout.name=texts reward.name=function reward.call=alignkit.bundled.guide:score "
            "ppo.batch_size=4 ppo.minibatches=1 ppo.response_length=8",
            "its rollout 'texts' returned ['So.'], expected a list of answers, each a list of token ids",
        ),
        (
            "ppo",
            "ppo.policy=base reward.name=silent ppo.batch_size=4 ppo.minibatches=1 ppo.response_length=8",
            f"its reward 'silent' returned None, expected a list with one score per answer. {RETURN}",
        ),
        (
            "ppo",
            "reward.name=no-needs",
            f"needs of its reward 'no-needs' returned None, expected a dict of roles and stages, such as "
            f"{{'reward': 'rm'}}, or {{}}. {RETURN}",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_in_a_run(
    run_stage: RunStage, install: Install, stage: str, settings: str, told: str
) -> None:
    install("odd", ODD)

    with pytest.raises(AssertionError) as error:
        run_stage(stage, "--plugin", "odd", *settings.split(), "train.max_steps=1")
    assert str(error.value).splitlines()[0] == f"alignkit: error: plugin odd (alignkit-odd 0.1): {told}"


LOGPS = torch.full((1, 2), -1.0)


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (LossOutput(LOGPS.requires_grad_() * 1), r"returned a loss of shape \[1, 2\], expected a scalar tensor"),
        (LossOutput(0.5), "returned a loss of 0.5, expected a scalar tensor"),  # type: ignore[arg-type]
        (LossOutput(torch.tensor(0.5)), "returned a loss without a gradient. Is it detached"),
        (LossOutput(LOGPS.sum(), {"kl": 1.0}), "returned the metric 'kl', which the stages log themselves"),
        (
            LossOutput(LOGPS.sum(), {"eval_loss": 1.0}),
            "returned the metric 'eval_loss', which the stages log themselves",
        ),
        (LossOutput(LOGPS.sum(), {"each": LOGPS}), "returned the metric 'each' as a Tensor, expected a number"),  # type: ignore[dict-item]
    ],
)
def test_a_loss_is_a_scalar_with_a_gradient_and_its_metrics_are_numbers(output: LossOutput, told: str) -> None:
    batch = TokenLogps(LOGPS.clone().detach().requires_grad_(), LOGPS < 0, 2)

    with pytest.raises(PluginError, match=f"^loss 'x' {told}"):
        checks.loss("loss 'x'", lambda given: output)(batch)


def test_a_loss_needs_no_gradient_where_there_is_none_to_have() -> None:
    loss = checks.loss("loss 'x'", lambda batch: LossOutput(-batch.logps.detach().sum(), {"n": torch.tensor(1)}))  # type: ignore[dict-item]
    batch = TokenLogps(LOGPS.clone().detach().requires_grad_(), LOGPS < 0, 2)

    assert loss(TokenLogps(LOGPS.detach(), LOGPS < 0, 2)).loss == 2
    with torch.no_grad():
        assert loss(batch).loss == 2


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([[1], [2]], "returned 2 answers, expected 4 .2 per prompt."),
        ([[1], [2], [3], []], "returned an answer of 0 tokens, expected 1 to 3"),
        ([[1], [2], [3], [4, 4, 4, 4]], "returned an answer of 4 tokens, expected 1 to 3"),
        ([[1], [2], [3], [0, 4]], "returned an answer that continues after a stop token"),
        ([[1], [2], [3], [9]], "returned a token id outside the vocabulary of 9 tokens"),
        ([[1], [2], [3], [-1]], "returned a token id outside the vocabulary of 9 tokens"),
        (([1], [2], [3], [4]), r"returned \(\[1\], \[2\], \[3\], \[4\]\), expected a list of answers"),
        ([[1], [2], [3], torch.tensor([4])], "returned .*, expected a list of answers, each a list of token ids"),
        (None, f"returned None, expected a list of answers, each a list of token ids. {RETURN.replace('?', '')}"),
    ],
)
def test_a_rollout_engine_gives_as_many_answers_of_token_ids_as_it_was_asked_for(answers: Any, told: str) -> None:
    sampling = Sampling(max_new_tokens=3, temperature=1, stop_ids=(0,), samples=2)
    policy = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(9, 2))
    prompts = [[5], [6]]

    assert checks.engine("x", lambda *given: [[1], [2, 0], [3, 4, 5], [8]], sampling)(policy, prompts)
    with pytest.raises(PluginError, match=f"^engine 'x' {told}"):
        checks.engine("engine 'x'", lambda *given: answers, sampling)(policy, prompts)


@pytest.mark.parametrize("logps", [[[-1.0]], [[-1.0, 0.5]], [[-1.0, math.nan]], [[-1.0, -math.inf]], "-1"])
def test_log_probabilities_of_an_engine_are_one_number_for_each_token(logps: Any) -> None:
    policy = torch.nn.Module()
    policy.get_input_embeddings = lambda: torch.nn.Embedding(9, 1)  # type: ignore[assignment]
    sampling = Sampling(max_new_tokens=3, temperature=1.0, stop_ids=(0,))
    given = [SampledAnswers([[5, 6]], [[-1.0, -0.5]]), SampledAnswers([[5, 6]]), [[5, 6]]]

    checked = [checks.engine("it", lambda *_, answers=each: answers, sampling)(policy, [[1]]) for each in given]
    assert checked == [[[5, 6]]] * 3
    assert [each.logps for each in checked] == [[[-1.0, -0.5]], None, None]
    with pytest.raises(PluginError, match="^it returned log-probabilities that are not a number <= 0 for each token$"):
        checks.engine("it", lambda *_: SampledAnswers([[5, 6]], logps), sampling)(policy, [[1]])


def test_rewards_and_engines_get_the_roles_only_if_they_have_a_parameter_for_them() -> None:
    sampling = Sampling(max_new_tokens=1, temperature=1, stop_ids=())
    policy = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(9, 2))

    assert checks.with_roles(lambda answers: answers)("answers", roles="roles") == "answers"
    assert checks.with_roles(lambda answers, roles: (answers, roles))("answers", roles="roles") == (
        "answers",
        "roles",
    )
    assert checks.with_roles(len)("answers", roles="roles") == 7
    assert checks.engine("x", lambda policy, prompts: [[1]], sampling)(policy, [[5]], 3) == [[1]]
    assert checks.engine("x", lambda policy, prompts, roles: [[roles]], sampling)(policy, [[5]], 3) == [[3]]


FORMAT = """
from alignkit import DataFormat, fields_of, hookimpl

@hookimpl
def alignkit_data():
    return [DataFormat(name="quiz", summary="question", fits={fits}, convert=lambda row: None)]
"""


@pytest.mark.parametrize(
    ("fits", "told"),
    [
        (
            "fields_of('question')",
            f"its format 'quiz' returned None, expected a row, such as a Demonstration, or a list. {RETURN}",
        ),
        (
            "lambda row: None",
            f"fits of its format 'quiz' returned None, expected how many fields of the row it reads. {RETURN}",
        ),
    ],
)
def test_a_format_without_return_is_no_bad_row(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str], fits: str, told: str
) -> None:
    install("quiz", FORMAT.format(fits=fits))
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?"}\n' * 3)
    words = ["check", "--plugin", "sft", "--plugin", "quiz", "--data", str(tmp_path / "rows.jsonl")]

    assert main([*words, "data.on_bad_row=skip", *(["data.format=null"] if "lambda" in fits else [])]) == 2
    assert capsys.readouterr().err == (f"alignkit: error: rows.jsonl line 1: plugin quiz (alignkit-quiz 0.1): {told}\n")


def test_what_finish_gives_joins_the_manifest_or_is_nothing() -> None:
    assert checks.manifest_keys("x", None) == {}
    assert checks.manifest_keys("x", {"mean": 0.5}) == {"mean": 0.5}
    with pytest.raises(PluginError, match="finish of stage 'x' returned a value that cannot be written as JSON"):
        checks.manifest_keys("finish of stage 'x'", {"mean": torch.tensor(0.5)})
