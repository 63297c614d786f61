"""``alignkit plan --fit``: which settings are changed, in which order, and that the command with them is valid."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignkit import ConfigError, PluginError, planning
from alignkit.cli import common, main
from alignkit.planning import fit
from alignkit.runs.plan import pipeline

GIB = 2**30
REWARD = ("reward.name=function", "reward.call=json:dumps")


@pytest.fixture
def arguments(tiny_model: Callable[..., Path], tiny_data: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """``arguments("sft", "train.max_steps=2")``: what a command for a tiny model read from its arguments."""

    def read(stage: str, *overrides: str, plugins: tuple[str, ...] = (), data: str = "demonstrations") -> Any:
        base = [] if stage == "sft" else [f"{stage}.policy=base"]
        return common.read_arguments(
            [*plugins, stage],
            None,
            str(tiny_model("llama")),
            [str(tiny_data(data))],
            str(tmp_path / "out"),
            [*base, "data.eval_size=4", *overrides],
        )

    return read


def microbatch(plan: Any) -> int:
    """GiB that grow with the microbatch: half without stored activations."""
    train = plan.config.train
    rows = train["per_device_train_batch_size"]
    return int((rows / 2 if train.get("gradient_checkpointing") else rows) * GIB)


def overrides(found: fit.Fit) -> list[str]:
    return [setting.override for setting in found.settings]


@pytest.mark.parametrize(
    ("text", "size"), [("12GB", 12 * 10**9), ("12GiB", 12 * 2**30), ("16000MB", 16 * 10**9), ("1.5 gb", 15 * 10**8)]
)
def test_a_size_has_a_unit(text: str, size: int) -> None:
    assert fit.parse_size(text) == size


@pytest.mark.parametrize("text", ["12", "GB", "-3GB", "0GB", "12GX", "12Gbit", "", "12G"])
def test_other_sizes_are_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=f"'{text}' is not a size. Write a number and a unit, such as 12GB"):
        fit.parse_size(text)


def test_what_fits_is_left_as_it_is(arguments: Callable[..., Any]) -> None:
    found = fit.fit(*arguments("sft"), 8 * GIB, microbatch)

    assert found.settings == []
    assert found.peaks == {"sft": 8 * GIB}


def test_the_largest_microbatch_that_fits_makes_the_same_optimizer_step(arguments: Callable[..., Any]) -> None:
    found = fit.fit(*arguments("sft", "train.gradient_accumulation_steps=3"), 5 * GIB, microbatch)

    assert overrides(found) == [
        "sft.train.per_device_train_batch_size=4",
        "sft.train.gradient_accumulation_steps=6",
    ]
    assert {setting.changes for setting in found.settings} == {fit.NONE}
    (plan,) = found.pipeline.to_train
    assert (plan.config.train["per_device_train_batch_size"], found.peaks) == (4, {"sft": 4 * GIB})


def test_checkpointing_is_not_used_where_smaller_microbatches_suffice_and_both_where_they_must(
    arguments: Callable[..., Any],
) -> None:
    assert overrides(fit.fit(*arguments("sft"), GIB, microbatch)) == [
        "sft.train.per_device_train_batch_size=1",
        "sft.train.gradient_accumulation_steps=8",
    ]
    assert overrides(fit.fit(*arguments("sft"), GIB // 2, microbatch))[-1] == "sft.train.gradient_checkpointing=true"


def test_an_online_stage_keeps_its_minibatches(arguments: Callable[..., Any]) -> None:
    given = arguments("ppo", "ppo.batch_size=12", "ppo.minibatches=2", *REWARD, data="prompts")
    found = fit.fit(*given, 5 * GIB, microbatch)

    assert overrides(found) == ["ppo.train.per_device_train_batch_size=2"]  # 4 does not divide a minibatch of 6
    assert found.settings[0].changes == fit.NONE


def test_a_microbatch_that_estimates_the_kl_changes_the_result(arguments: Callable[..., Any]) -> None:
    found = fit.fit(*arguments("kto", data="ratings"), 4 * GIB, microbatch)
    assert overrides(found) == ["kto.train.gradient_checkpointing=true"]

    found = fit.fit(*arguments("kto", data="ratings"), 2 * GIB, microbatch)
    assert overrides(found)[0] == "kto.train.gradient_checkpointing=true"
    assert overrides(found)[1:] == [
        "kto.train.per_device_train_batch_size=4",
        "kto.train.gradient_accumulation_steps=2",
    ]
    assert [setting.changes for setting in found.settings] == [fit.NONE, fit.RESULT, fit.RESULT]


def test_a_microbatch_of_a_loss_that_compares_its_rows_changes_the_result(arguments: Callable[..., Any]) -> None:
    changes = {}
    for loss in ("sigmoid", "aot", "sft"):
        found = fit.fit(*arguments("dpo", f"loss.name={loss}", data="rankings"), GIB // 2, microbatch)
        changes[loss] = {setting.override.split("=")[0]: setting.changes for setting in found.settings}

    assert changes["sigmoid"]["dpo.train.per_device_train_batch_size"] == fit.NONE
    assert changes["aot"]["dpo.train.per_device_train_batch_size"] == fit.RESULT
    assert changes["sft"]["dpo.train.per_device_train_batch_size"] == fit.RESULT


def of_ppo(plan: Any) -> int:
    """GiB that every kind of setting lowers."""
    config = plan.config
    ppo, train = config.stage.config, config.train
    weights = 2 if config.tuner.component.name == "qlora" else 8
    states = 1 if "8bit" in config.optimizer.component.name else 2
    return int((weights + states + (ppo.value == "adapter") + ppo.response_length / 64) * GIB) + (
        train["per_device_train_batch_size"] * GIB // 8
    )


@pytest.mark.parametrize(
    ("limit", "changed"),
    [
        (14, []),
        (13.5, ["ppo.train.per_device_train_batch_size=4"]),
        (12.5, ["ppo.train.per_device_train_batch_size=4", "ppo.optimizer.name=adamw_8bit"]),
        (6.2, ["ppo.train.per_device_train_batch_size=1", "ppo.optimizer.name=adamw_8bit", "ppo.tuner.name=qlora"]),
    ],
)
def test_settings_come_in_the_order_of_what_they_change(
    arguments: Callable[..., Any], limit: float, changed: list[str]
) -> None:
    given = arguments("ppo", *REWARD, data="prompts")
    found = fit.fit(*given, int(limit * GIB), of_ppo)

    assert overrides(found) == changed
    assert [setting.changes for setting in found.settings] == [fit.NONE, fit.OPTIMIZER, fit.RESULT][: len(changed)]
    assert found.peaks["ppo"] <= limit * GIB


def test_the_value_head_comes_before_shorter_answers(arguments: Callable[..., Any]) -> None:
    given = arguments("ppo", *REWARD, data="prompts")
    found = fit.fit(*given, int(5.2 * GIB), of_ppo)
    assert "ppo.value=head" in overrides(found)
    assert not any("response_length" in each for each in overrides(found))

    found = fit.fit(*given, int(4.2 * GIB), of_ppo)
    assert overrides(found)[-1] == "ppo.response_length=64"
    assert found.settings[-1].help == "maximum tokens of an answer"


def test_what_nothing_fits_is_one_line_with_the_smallest_peak(arguments: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as error:
        fit.fit(*arguments("sft"), GIB // 4, microbatch)

    assert str(error.value) == "no settings fit into 0.25 GiB: the smallest peak is 0.50 GiB, of sft"


def test_every_stage_that_the_command_trains_fits(
    tiny_model: Callable[..., Path], tiny_data: Callable[..., Path], tmp_path: Path
) -> None:
    """Only the settings of the stages that do not fit change; stages that start from each other have one tuner."""
    file = tmp_path / "run.yaml"
    paths = {"sft": tiny_data("demonstrations"), "rm": tiny_data("rankings")}
    file.write_text(json.dumps({"stages": {stage: {"data": {"path": str(path)}} for stage, path in paths.items()}}))
    given = common.read_arguments(
        ["rm"], file, str(tiny_model("llama")), [], str(tmp_path / "out"), ["sft.train.per_device_train_batch_size=2"]
    )
    found = fit.fit(*given, 2 * GIB, microbatch)
    assert overrides(found) == ["rm.train.per_device_train_batch_size=2", "rm.train.gradient_accumulation_steps=4"]
    assert found.peaks == {"sft": 2 * GIB, "rm": 2 * GIB}

    def by_tuner(plan: Any) -> int:
        return GIB if plan.config.tuner.component.name == "qlora" else 2 * GIB

    assert overrides(fit.fit(*given, GIB, by_tuner)) == ["tuner.name=qlora"]


def test_settings_that_the_data_rule_out_are_not_proposed(arguments: Callable[..., Any]) -> None:
    """With ``too_long=error``, shorter sequences would be an error: rows over the limit are left out."""

    def by_length(plan: Any) -> int:
        return int(plan.config.stage.config.max_length * GIB / 1024)

    found = fit.fit(*arguments("sft"), GIB // 2, by_length)
    assert overrides(found) == ["sft.max_length=512", "sft.too_long=skip"]
    assert {setting.changes for setting in found.settings} == {fit.RESULT}


def test_a_plugin_names_its_own_settings(
    arguments: Callable[..., Any], install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(
        "cached",
        """
        from dataclasses import dataclass
        from alignkit import Optimizer, hookimpl, option

        @dataclass(frozen=True)
        class Config:
            cache: int = option(8, "states to keep", resume="may_change")

        def build(config, args):
            raise AssertionError

        @hookimpl
        def alignkit_optimizer():
            return [
                Optimizer(name="cached", summary="", config=Config, build=build,
                          less_memory=lambda config: [{"cache": 4}, {"cache": 1}]),
                Optimizer(name="odd", summary="", build=build, less_memory=lambda config: {"cache": 4}),
            ]
        """,
    )

    def by_cache(plan: Any) -> int:
        return int(plan.config.optimizer.config.cache * GIB)

    found = fit.fit(*arguments("sft", "optimizer.name=cached", plugins=("cached",)), 5 * GIB, by_cache)
    assert found.settings == [fit.Setting("sft.optimizer.cache=4", fit.NONE, "states to keep")]
    with pytest.raises(PluginError, match=r"less_memory of its optimizer 'odd' returned .*, expected a list"):
        fit.fit(*arguments("sft", "optimizer.name=odd", plugins=("cached",)), GIB, microbatch)


# --- the command -----------------------------------------------------------------------------------------------------

DATA = {
    **{"sft": "demonstrations", "rm": "rankings", "dpo": "rankings", "kto": "ratings", "rahf": "rankings"},
    **{"ppo": "prompts", "grpo": "prompts"},
}


@pytest.fixture
def words(tiny_model: Callable[..., Path], tiny_data: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """``words("ppo")``: the arguments of a command for a tiny model."""

    def make(stage: str) -> list[str]:
        given = ["--plugin", stage, "--model", str(tiny_model("llama")), "--data", str(tiny_data(DATA[stage]))]
        given += ["--output", str(tmp_path / "out"), "data.eval_size=4", "train.per_device_train_batch_size=8"]
        base = [] if stage == "sft" else [f"{stage}.policy=base"]
        return [*given, *base, *(REWARD if DATA[stage] == "prompts" else ())]

    return make


def printed_command(output: str) -> list[str]:
    program, train, *rest = shlex.split(output.splitlines()[-1])
    assert (program, train) == ("alignkit", "train")
    return rest


@pytest.mark.parametrize("stage", DATA)
def test_the_printed_command_is_valid_and_names_what_changes(
    stage: str, words: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def memory(plan: Any, device: str, limit: int) -> SimpleNamespace:
        rows = min(plan.config.train["per_device_train_batch_size"], 8)
        shared = plan.config.tuner.component.name == "qlora"
        return SimpleNamespace(peak=rows * 10**9 + (0 if shared else 10**9))

    monkeypatch.setattr(planning, "memory", memory)
    assert main(["plan", *words(stage), "--fit", "2GB"]) == 0
    output = capsys.readouterr().out

    command = printed_command(output)
    assert ("these settings change no result:" in output) == (stage != "kto")  # its microbatches estimate the KL
    assert any(word.endswith(("batch_size=1", "batch_size=2")) for word in command)
    assert main(["check", *command]) == 0
    assert main(["plan", *command, "--fit", "2GB"]) == 0
    assert "it fits as it is" in capsys.readouterr().out


def test_the_printed_command_fits(arguments: Callable[..., Any]) -> None:
    """By the memory that ``alignkit plan`` computes, with the largest microbatch."""

    def of_rows(rows: int) -> int:
        accumulated = f"train.gradient_accumulation_steps={8 // rows}"  # gradients are kept from one to the next
        given = arguments("sft", f"train.per_device_train_batch_size={rows}", accumulated)
        return peak(pipeline(*given).to_train[0])

    def peak(plan: Any) -> int:
        return planning.memory(plan, "cuda", 4 * GIB).peak

    limit = of_rows(2)
    found = fit.fit(*arguments("sft"), limit, peak)

    assert overrides(found)[0] == "sft.train.per_device_train_batch_size=2"
    assert peak(found.pipeline.to_train[0]) == found.peaks["sft"] <= limit < of_rows(4)


def test_options_that_contradict_each_other_and_bad_sizes_are_one_line(
    words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for more, said in (
        (["--fit", "12"], "'12' is not a size"),
        (["--fit", "2GB", "--json"], "--fit cannot be combined with --json"),
        (["--fit", "2GB", "--processes", "2"], "--processes cannot be combined with --fit"),
        (["--time", "--processes", "2"], "--processes cannot be combined with --time"),
    ):
        assert main(["plan", *words("sft"), *more]) == 2
        assert said in capsys.readouterr().err


def test_what_a_plan_does_not_count_is_said(
    words: Callable[..., list[str]],
    arguments: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (plan,) = pipeline(*arguments("sft")).to_train
    zero = {**plan.config.train, "deepspeed": {"zero_optimization": {"stage": 3}}}
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, train=zero))
    with pytest.raises(ConfigError, match=r"plan does not know the memory of train\.deepspeed"):
        planning.memory(plan, "cuda", processes=2)

    stub = SimpleNamespace(device="cuda", dtype="bfloat16", phases={"training": {"weights": 1}}, overhead=0, peak=1)
    monkeypatch.setattr(planning, "memory", lambda *arguments, **keywords: stub)
    assert main(["plan", "--plugin", "lora", *words("ppo"), "rollout.name=vllm"]) == 0
    assert "samples  in another process, by vllm, whose memory is not counted" in capsys.readouterr().out
