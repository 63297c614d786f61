"""A setting that would have no effect is refused with what to do instead, wherever that is declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alignkit import ConfigError
from alignkit.config import resolve
from alignkit.config.resolve import parse_override
from alignkit.config.settings import merge
from alignkit.config.unused_settings import holds
from alignkit.registry import Registry


def resolved(stage: str, *overrides: str) -> Any:
    return resolve(Registry(), {}, merge({"plugins": [stage]}, *map(parse_override, overrides)))


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("sft", ["train.optim=sgd"], "train.optim is not supported: set optimizer.name"),
        (
            "ppo",
            ["ppo.train.num_train_epochs=3"],
            "train.num_train_epochs has no effect in stage 'ppo': set ppo.",
        ),
        (
            "ppo",
            ["ppo.train.save_strategy=epoch"],
            "train.save_strategy=epoch has no effect in stage 'ppo': set ppo.save_every",
        ),
        (
            "sft",
            ["train.dataloader_prefetch_factor=2"],
            "train.dataloader_prefetch_factor has no effect without train.dataloader_num_workers",
        ),
        ("ppo", ["ppo.ptx_data=a.jsonl"], "ppo.ptx_data has no effect without ppo.ptx_coef"),
        ("ppo", ["ppo.ptx_data=a.jsonl", "ppo.ptx_coef=0"], "ppo.ptx_data has no effect without ppo.ptx_coef"),
        ("ppo", ["ppo.ptx_length=128"], "ppo.ptx_length has no effect without ppo.ptx_coef"),
        ("ppo", ["ppo.ptx_batch_size=2"], "ppo.ptx_batch_size has no effect without ppo.ptx_coef"),
        ("ppo", ["ppo.kl_horizon=100"], "ppo.kl_horizon has no effect without ppo.kl_target"),
        ("dpo", ["dpo.response_length=8", "dpo.eval_prompts=0"], "dpo.response_length has no effect without dpo.eval"),
        (
            "ppo",
            ["reward.name=ensemble", "reward.std_coef=2", "reward.by=min"],
            "reward.std_coef has no effect without reward.by=mean-std",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(stage: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolved(stage, *overrides)
    assert message in str(error.value)


def test_a_setting_that_acts_or_asks_for_nothing_is_accepted() -> None:
    ppo = resolved("ppo", "ppo.ptx_data=a.jsonl", "ppo.ptx_coef=0.1", "ppo.train.load_best_model_at_end=false")
    assert ppo.stage.config.ptx_data == "a.jsonl"
    assert resolved("ppo", "ppo.ptx_data=null", "ppo.train.save_strategy=steps").train["save_strategy"] == "steps"
    assert resolved("sft", "train.dataloader_num_workers=2", "train.dataloader_prefetch_factor=2").unused == {}
    ensemble = ["reward.name=ensemble", "reward.std_coef=1.0"]  # the default, as `alignkit config` writes it
    assert resolved("ppo", *ensemble).reward.config.std_coef == 1
    assert resolved("ppo", *ensemble, "reward.by=mean-std", "reward.std_coef=2").reward.config.std_coef == 2


def test_a_setting_of_a_recipe_without_effect_is_left_out() -> None:
    """The bundled model's recipe sets the length of answers that this run does not sample."""
    assert resolved("dpo").stage.config.response_length == 64
    assert resolved("dpo", "dpo.eval_prompts=0").stage.config.response_length == 128


def test_what_the_optimizer_does_not_use_is_reported() -> None:
    adafactor = resolved("sft", "optimizer.name=adafactor", "train.adam_beta1=0.8")
    assert adafactor.unused == {"adam_beta1": "Adafactor has no such setting"}


def test_a_condition_is_a_key_that_is_set_or_a_key_of_a_value() -> None:
    assert [holds("a", {"a": value}) for value in (1, "x", None, False, 0, 0.0)] == [True, True, *[False] * 4]
    assert holds("a=true", {"a": True})
    assert not holds("a=b", {"a": "c"})
    assert not holds("a=b", {})


LOSS = """
    from dataclasses import dataclass, field

    from alignkit import Loss, LossOutput, TokenLogps, hookimpl, option

    @dataclass(frozen=True)
    class Schedule:
        decay: bool = option(False, "whether the weight falls")
        steps: list = option([10], "at which steps", only_with="{condition}")

    @dataclass(frozen=True)
    class Config:
        schedule: Schedule = field(default_factory=Schedule)

    @hookimpl
    def alignkit_loss():
        return [Loss(name="mine", summary="a loss", batch=TokenLogps, config=Config, build=lambda config: None)]
"""


def test_a_plugin_declares_a_setting_that_acts_only_with_another(install: Callable[..., None]) -> None:
    install("mine", LOSS.replace("{condition}", "decay"))

    def steps(*overrides: str) -> Any:
        config = resolve(Registry(), {}, merge({"plugins": ["sft", "mine"]}, *map(parse_override, overrides)))
        return config.loss.config.schedule.steps

    assert steps() == [10]
    assert steps("loss.schedule.steps=[3]", "loss.schedule.decay=true") == [3]
    with pytest.raises(ConfigError, match=r"^loss.schedule.steps has no effect without loss.schedule.decay$"):
        steps("loss.schedule.steps=[3]")


def test_a_condition_on_no_setting_is_a_mistake_of_the_plugin(
    install: Callable[..., None], check_plugin: Callable[[str], None]
) -> None:
    install("mine", LOSS.replace("{condition}", "dekay"))

    with pytest.raises(AssertionError, match=r"schedule.steps: only_with is dekay, but .* has no such setting"):
        check_plugin("mine")
