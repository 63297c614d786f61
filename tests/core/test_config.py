"""Layers, picks, types and messages of the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alignkit import ConfigError, yaml
from alignkit.config import resolve
from alignkit.config.resolve import RunConfig, parse_override
from alignkit.registry import Registry


def config(file: str = "", *cli: str, plugins: tuple[str, ...] = ("sft",)) -> RunConfig:
    from alignkit.config.settings import merge

    overrides = merge({"plugins": list(plugins)}, *(parse_override(text) for text in cli))
    return resolve(Registry(), yaml.loads(file, "run.yaml") or {}, overrides)


def test_a_plugin_picks_every_component_of_its_name() -> None:
    assert config(plugins=("sft", "qlora")).tuner.component.name == "qlora"
    assert config(plugins=("sft", "adafactor")).optimizer.component.name == "adafactor"
    assert config(plugins=("sft", "alpaca")).data.format == "alpaca"


def test_later_layers_win() -> None:
    file = "{train: {max_steps: 1, seed: 1, weight_decay: 1}, stages: {sft: {train: {max_steps: 2, seed: 2}}}}"
    train = config(file, "train.seed=3", "sft.train.weight_decay=4").train

    assert (train["max_steps"], train["seed"], train["weight_decay"]) == (2, 3, 4)


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo", "grpo"])
@pytest.mark.parametrize(
    "key", ["train", "data", "tuner", "optimizer", "loss", "reward", "rollout", "plugins", "stages"]
)
def test_a_table_without_keys_changes_nothing(stage: str, key: str) -> None:
    plain = config(plugins=(stage,)).to_dict()
    if key not in ("reward", "rollout") or stage in ("ppo", "grpo"):
        assert config(f"{key}:", plugins=(stage,)).to_dict() == plain
    if key in plain["stages"][stage]:
        assert config(f"stages: {{{stage}: {{{key}: null}}}}", plugins=(stage,)).to_dict() == plain


def test_the_command_line_wins_over_the_file_when_picking() -> None:
    assert config("tuner: {name: full}", plugins=("sft", "lora")).tuner.component.name == "lora"
    assert config("plugins: [qlora]", "tuner.name=full").tuner.component.name == "full"
    assert config("{plugins: [qlora], tuner: {name: full}}").tuner.component.name == "full"


def test_another_scheduler_leaves_the_stages_scheduler_settings_behind() -> None:
    assert config("", "train.lr_scheduler_type=linear").train.get("lr_scheduler_kwargs") is None
    assert config("", "train.lr_scheduler_kwargs={min_lr_rate: 0.5}").train["lr_scheduler_kwargs"] == {
        "min_lr_rate": 0.5
    }


def test_a_bundled_model_brings_settings_under_those_of_the_user() -> None:
    bundled, other = config(plugins=("ppo",)), config("model: some/model", plugins=("ppo",))
    assert (bundled.stage.config.iterations, other.stage.config.iterations) == (5, 100)
    assert config("", "ppo.iterations=7", plugins=("ppo",)).stage.config.iterations == 7

    lora, full = (config(plugins=("sft", tuner)).train for tuner in ("lora", "full"))
    assert (lora["num_train_epochs"], full["num_train_epochs"]) == (0.5, 0.5)
    assert lora["learning_rate"] == 10 * full["learning_rate"] == 5e-4
    assert config("train: {learning_rate: 1e-3}").train["learning_rate"] == 1e-3


def test_what_the_bundled_model_says_of_data_is_for_the_bundled_data() -> None:
    """16 held-out rows are a few of the bundled rankings, and may be all of a small file."""
    assert config(plugins=("dpo",)).data.eval_size == 16
    assert config("data: {path: bundled:rankings}", plugins=("dpo",)).data.eval_size == 16
    assert config("data: {path: mine.jsonl}", plugins=("dpo",)).data.eval_size is None
    assert config("", "dpo.data.path=mine.jsonl", plugins=("dpo",)).data.eval_size is None
    assert config("{data: {path: mine.jsonl}, dpo: {data: {eval_size: 3}}}", plugins=("dpo",)).data.eval_size == 3
    with pytest.raises(ConfigError, match=r"data\.path must be a path, a table with a path"):
        config("", "dpo.data.path=false", plugins=("dpo",))


def test_a_file_can_name_the_stage() -> None:
    assert config("plugins: [sft]", plugins=()).stage.component.name == "sft"


def test_a_table_written_for_another_tuner_keeps_what_fits() -> None:
    assert config("{plugins: [qlora], tuner: {r: 4, double_quant: false}}", plugins=("sft", "lora")).tuner.config.r == 4
    assert config("{plugins: [qlora], tuner: {r: 4}}", plugins=("sft", "full")).tuner.component.name == "full"


def test_the_dtype_of_trained_weights_is_not_that_of_a_frozen_base() -> None:
    assert config("tuner: {name: full, dtype: bfloat16}", plugins=("sft", "lora")).tuner.config.dtype is None
    assert config("tuner: {name: lora, dtype: bfloat16}", "tuner.name=full").tuner.config.dtype == "float32"
    assert config("tuner: {name: lora, dtype: bfloat16}", "tuner.name=qlora").tuner.config.dtype == "bfloat16"


def test_the_default_learning_rate_follows_the_tuner_and_gives_way_to_the_user() -> None:
    assert config("model: some/model", plugins=("sft", "full")).train["learning_rate"] == 2e-5
    assert config("model: some/model", plugins=("sft", "lora")).train["learning_rate"] == 2e-4
    assert config("train: {learning_rate: 1e-3}").train["learning_rate"] == 1e-3


def test_the_default_learning_rate_follows_the_optimizer_too(install: Callable[..., None]) -> None:
    install(
        "lion",
        """
        from alignkit import Optimizer, hookimpl

        @hookimpl
        def alignkit_optimizer():
            return [Optimizer(name="lion", summary="for a test", build=print, lr_scale=0.3)]
        """,
    )
    for tuner, rate in (("full", 0.3 * 2e-5), ("lora", 0.3 * 2e-4)):
        there = config("model: some/model", plugins=("sft", tuner, "lion")).train["learning_rate"]
        assert there == pytest.approx(rate)
    assert config("train: {learning_rate: 1e-3}", plugins=("sft", "lion")).train["learning_rate"] == 1e-3


@pytest.mark.parametrize("written", ["3e-4", "0.0003", "3.0E-4", "'3e-4'"])
def test_floats_are_floats(written: str) -> None:
    assert config(f"train: {{learning_rate: {written}}}").train["learning_rate"] == pytest.approx(3e-4)
    assert config("", f"train.learning_rate={written}").train["learning_rate"] == pytest.approx(3e-4)


def test_every_field_of_training_arguments_is_reachable() -> None:
    import dataclasses

    from transformers import TrainingArguments

    from alignkit.config import training_args

    theirs = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert set(training_args.fields()) == theirs - set(training_args.REFUSED) | set(training_args.OWN)


def test_what_the_parser_reads_of_training_arguments_is_true() -> None:
    from transformers import TrainingArguments

    from alignkit.config import training_args

    theirs = {field.name: field for field in TrainingArguments.__dataclass_fields__.values()}
    for name, field in training_args.fields().items():
        if field.default is not None:
            assert field.default == theirs[name].default, name


@pytest.mark.parametrize(
    ("file", "cli", "message"),
    [
        ("tunr: {}", [], "unknown key tunr. Did you mean 'tuner'?"),
        ("tuner: {rr: 3}", [], "unknown key tuner.rr. Did you mean 'r'?"),
        ("stages: {sftt: {}}", [], "unknown stage 'sftt' under stages. Did you mean 'sft'?"),
        ("", ["sft.maxlength=3"], "unknown key sft.maxlength. Did you mean 'max_length'?"),
        ("", ["data.pth=x"], "unknown key data.pth. Did you mean 'path'?"),
        ("", ["train.lerning_rate=1"], "unknown key train.lerning_rate. Did you mean 'learning_rate'?"),
        ("", ["train.optim=adamw"], "train.optim is not supported: set optimizer.name"),
        ("", ["tuner.r=many"], "tuner.r: Input should be a valid integer"),
        ("", ["train.max_steps=many"], "train.max_steps: Input should be a valid integer"),
        ("", ["data.on_bad_row=maybe"], "data.on_bad_row: Input should be 'error' or 'skip'"),
        ("", ["tuner=3"], "tuner must be a table, not 3"),
        ("", ["tuner.r=true"], "tuner.r must be a number, not True"),
        ("", ["train.max_steps=true"], "train.max_steps must be a number, not True"),
        ("", ["data.eval_size=true"], "data.eval_size must be a number, not True"),
        ("", ["data.path=[{path: a.jsonl, weight: true}]"], "data.path[0].weight must be a number, not True"),
        ("", ["max_steps"], "'max_steps' is not a setting. Write key.path=value"),
        ("", ["reward.name=x"], "reward has no effect: sft uses no reward"),
        ("", ["stage=sft"], "unknown key stage. Choose a stage with --plugin NAME"),
        ("", ["tuner.name=5"], "tuner.name must be a string, not 5"),
        ("", ["tuner.r=0"], "tuner.r: Input should be greater than 0"),
        ("stages: {sft: {plugins: [lora]}}", [], "unknown key sft.plugins"),
        ("{{ x }}: 1", [], "run.yaml"),
        ("1: 2", [], "run.yaml line 1: a key must be a string, not 1"),
        ("a: 1\na: 2", [], "run.yaml line 2: duplicate key 'a'"),
        ("a: [1", [], "run.yaml line 1: "),
    ],
)
def test_mistakes_are_errors_of_one_line(file: str, cli: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(file, *cli)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_stage_is_an_error_that_lists_them() -> None:
    with pytest.raises(ConfigError, match="no stage given. Add --plugin STAGE. Stages: .*sft"):
        config(plugins=())


def test_a_loss_of_another_batch_type_is_refused(install: Callable[..., None]) -> None:
    install(
        "pairs",
        """
        from alignkit import Loss, RankedScores, hookimpl

        @hookimpl
        def alignkit_loss():
            return [Loss(name="pairs", summary="", batch=RankedScores, build=lambda config: None)]
        """,
    )
    with pytest.raises(ConfigError, match="loss 'pairs' takes RankedScores, but stage 'sft' provides TokenLogps.*nll"):
        config(plugins=("sft", "pairs"))


def test_the_resolved_config_resolves_to_itself(install: Callable[..., None]) -> None:
    first = config("{plugins: [qlora], train: {learning_rate: 1e-5}}", "sft.packing=true", "tuner.r=4")
    again = resolve(Registry(), yaml.loads(first.to_yaml(), "config.yaml"), {})

    assert again.to_dict() == first.to_dict()


@pytest.mark.parametrize(
    "value", [3e-4, 1e22, "no", "3e-4", "1e5", "true", "null", "012", "2024-01-01", float("inf"), None, [1, "a"], {}]
)
def test_yaml_reads_back_what_it_writes(value: Any) -> None:
    assert yaml.loads(yaml.dumps({"v": value}), "") == {"v": value}
    assert yaml.loads(f"v: {yaml.dumps_inline(value)}", "") == {"v": value}


REWARDS = """
    from alignkit import Reward, hookimpl

    @hookimpl
    def alignkit_reward():
        return [Reward(name=name, summary="for a test", build=print) for name in ("rubric", "http")]
"""


def test_a_name_that_is_said_outright_wins_over_what_a_plugin_picks_beside_it(install: Callable[..., None]) -> None:
    install("rubric", REWARDS)
    both = ("ppo", "rubric")

    assert config(plugins=both).reward.component.name == "rubric"
    for said in ("reward.name=http", "ppo.reward.name=http"):
        assert config("", said, plugins=both).reward.component.name == "http"
    assert config("{plugins: [rubric], reward: {name: http}}", plugins=("ppo",)).reward.component.name == "http"
    assert config("reward: {name: http}", plugins=both).reward.component.name == "rubric"  # the command line wins


def of(stage: str, asked: str, *cli: str, plugins: tuple[str, ...] = ()) -> RunConfig:
    from alignkit.config.settings import merge

    overrides = merge({"plugins": [asked, *plugins]}, *(parse_override(text) for text in cli))
    return resolve(Registry(), {}, overrides, stage)


def test_a_shared_key_of_a_loss_goes_to_the_stages_whose_loss_has_it() -> None:
    assert of("dpo", "dpo", "loss.beta=0.3").loss.config.beta == 0.3
    assert of("sft", "dpo", "loss.beta=0.3").loss.component.name == "nll"
    with pytest.raises(ConfigError, match="unknown key loss.bet. Did you mean 'beta'"):
        of("dpo", "dpo", "loss.bet=0.3")


def test_a_shared_loss_goes_to_the_stages_that_it_fits_those_under_the_reward_too() -> None:
    for picked in ({"plugins": ("plackett-luce", "ppo-dual-clip")}, {"cli": ("loss.name=plackett-luce",)}):
        cli, plugins = picked.get("cli", ()), picked.get("plugins", ())
        losses = {stage: of(stage, "ppo", *cli, plugins=plugins).loss.component.name for stage in ("sft", "rm", "ppo")}
        assert losses == {"sft": "nll", "rm": "plackett-luce", "ppo": "ppo-dual-clip" if plugins else "ppo-clip"}
    with pytest.raises(ConfigError, match="takes RankedScores, but stage 'ppo' provides PolicyBatch"):
        of("ppo", "ppo", "loss.name=plackett-luce", "reward.path=runs/rm")  # no reward model is trained
    with pytest.raises(ConfigError, match="loss 'nll' takes TokenLogps, but stage 'dpo' provides PreferenceLogps"):
        of("dpo", "dpo", "loss.name=nll", "dpo.policy=runs/sft")  # no SFT is trained


def test_a_reward_that_no_stage_uses_is_refused(install: Callable[..., None]) -> None:
    install("rubric", REWARDS)

    with pytest.raises(ConfigError, match="reward has no effect: sft uses no reward"):
        config(plugins=("sft", "rubric"))
