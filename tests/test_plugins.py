"""`alignkit plugins`: listing, describing, and checking each plugin in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest

from alignkit.cli import main

LOSS = """
    from dataclasses import dataclass
    from typing import Annotated

    from alignkit import Loss, LossOutput, TokenLogps, hookimpl, option
    from annotated_types import Gt

    @dataclass(frozen=True)
    class FocalConfig:
        gamma: Annotated[float, Gt(0)] = option(2.0, "how much more")

    @hookimpl
    def alignkit_loss():
        return [Loss(name="focal", summary="hard tokens count more", batch=TokenLogps, config=FocalConfig, build=print)]

    @hookimpl
    def alignkit_run_end(run, result):
        pass
"""
Install = Callable[..., None]
Captured = pytest.CaptureFixture[str]


def test_the_list_names_every_plugin_and_imports_no_third_partys(install: Install, capsys: Captured) -> None:
    install("simpo", "import nosuchlib", version="0.2")
    assert main(["plugins", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}

    assert listed["sft"]["gives"] == {"stage": ["sft"], "loss": ["nll"]}
    assert (listed["simpo"]["version"], listed["simpo"]["gives"]) == ("0.2", {})
    assert main(["plugins"]) == 0
    assert "simpo       alignkit-simpo 0.2  simpo for a test\n" in capsys.readouterr().out
    assert "alignkit_simpo_plugin" not in sys.modules


@pytest.mark.parametrize("name", ["focal", "focal@alignkit-focal"])
def test_one_plugin_is_described_with_its_settings(install: Install, capsys: Captured, name: str) -> None:
    install("focal", LOSS)
    assert main(["plugins", name]) == 0

    assert capsys.readouterr().out.splitlines() == [
        "focal  alignkit-focal 0.1  focal for a test",
        "loss focal: hard tokens count more",
        "  gamma: 2.0  # how much more (float > 0)",
        "run hooks: alignkit_run_end",
    ]


def test_one_plugin_is_described_as_json(install: Install, capsys: Captured) -> None:
    install("focal", LOSS)
    assert main(["plugins", "focal", "ppo-dual-clip", "--json"]) == 0

    focal, dual_clip = json.loads(capsys.readouterr().out)
    assert focal == {
        **{"name": "focal", "distribution": "alignkit-focal", "version": "0.1", "summary": "focal for a test"},
        **{"builtin": False, "run_hooks": ["alignkit_run_end"]},
        "components": [
            {
                **{"kind": "loss", "name": "focal", "summary": "hard tokens count more"},
                "settings": [{"key": "gamma", "default": 2.0, "help": "how much more", "type": "float > 0"}],
            }
        ],
    }
    assert [component["name"] for component in dual_clip["components"]] == ["ppo-dual-clip"]


def test_a_component_is_described_by_its_own_name(capsys: Captured) -> None:
    assert main(["plugins", "ppo-dual-clip"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("loss ppo-dual-clip: ")
    assert not any(line.startswith("stage") for line in lines)


def test_a_plugin_is_described_whole_and_an_inactive_plugins_component_is_found(
    install: Install, capsys: Captured
) -> None:
    code = LOSS.replace("]\n", ", Loss(name='squared', summary='', batch=TokenLogps, build=print)]\n", 1)
    install("focal", code)
    install("simpo", "import nosuchlib")
    assert main(["plugins", "focal"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss")] == [
        "loss focal: hard tokens count more",
        "loss squared: ",
    ]

    assert main(["plugins", "squared"]) == 0  # of which no active plugin knows
    assert capsys.readouterr().out.splitlines()[:2] == ["focal  alignkit-focal 0.1  focal for a test", "loss squared: "]
    assert main(["plugins", "square"]) == 2
    assert "no plugin named 'square' is installed" in capsys.readouterr().err


def test_the_table_of_a_third_partys_component_is_as_a_built_ins(install: Install, capsys: Captured) -> None:
    install("focal", LOSS)
    asked = ["--plugin", "sft", "--plugin", "focal"]
    assert main(["config", *asked, "loss.gamma=3"]) == 0
    assert "      gamma: 3.0  # how much more" in capsys.readouterr().out.splitlines()

    for wrong, told in (
        ("loss.gama=3", "unknown key loss.gama. Did you mean 'gamma'? Valid keys: gamma"),
        (
            "loss.gamma=many",
            "loss.gamma: Input should be a valid number, unable to parse string as a number (got 'many')",
        ),
        ("loss.gamma=-1", "loss.gamma: Input should be greater than 0 (got -1)"),
    ):
        assert main(["config", *asked, wrong]) == 2
        assert capsys.readouterr().err.startswith(f"alignkit: error: {told}")


EVERY_KIND = """
    from dataclasses import dataclass
    from alignkit import Optimizer, Reward, Rollout, Stage, Text, TokenLogps, Tuner, hookimpl, option

    @dataclass(frozen=True)
    class Config:
        rate: float = option(0.5, "how fast")

    said = dict(name="thing", summary="for a test", config=Config)

    @hookimpl
    def alignkit_stage():
        return [Stage(**{**said, "name": "thing-stage"}, build=print, rows=(Text,), batch=TokenLogps, loss="nll")]

    @hookimpl
    def alignkit_model():
        return [Tuner(**said, load=print, wrap=print)]

    @hookimpl
    def alignkit_optimizer():
        return [Optimizer(**said, build=print)]

    @hookimpl
    def alignkit_reward():
        return [Reward(**said, build=print)]

    @hookimpl
    def alignkit_rollout():
        return [Rollout(**said, build=print)]
"""


@pytest.mark.parametrize(
    ("stage", "table"),
    [("thing-stage", "thing-stage"), ("sft", "tuner"), ("sft", "optimizer"), ("ppo", "reward"), ("ppo", "rollout")],
)
def test_every_kind_of_component_has_a_table_that_is_checked(
    install: Install, capsys: Captured, stage: str, table: str
) -> None:
    install("thing", EVERY_KIND)
    command = ["config", "--plugin", stage, "--plugin", "thing"]

    assert main([*command, f"{table}.rate=0.25"]) == 0
    assert "rate: 0.25  # how fast" in capsys.readouterr().out
    assert main([*command, f"{table}.rat=0.25"]) == 2
    assert capsys.readouterr().err.startswith(f"alignkit: error: unknown key {table}.rat. Did you mean 'rate'?")
    assert main([*command, f"{table}.rate=fast"]) == 2
    assert capsys.readouterr().err.startswith(f"alignkit: error: {table}.rate: Input should be a valid number")


# --- check -----------------------------------------------------------------------------------------------------------

HOOK = "from alignkit import hookimpl\n@hookimpl\ndef alignkit_run_end():\n    pass\n"
COMPONENT = """
from dataclasses import dataclass
from typing import TYPE_CHECKING
from alignkit import Optimizer, hookimpl, option
if TYPE_CHECKING:
    from nowhere import Thing

@dataclass
class Config:
    {field}

@hookimpl
def alignkit_optimizer():
    return [Optimizer(name="{name}", summary="{summary}", config=Config, build=print)]
"""


def component(field: str = "pass", name: str = "thing", summary: str = "for a test") -> str:
    return COMPONENT.format(field=field, name=name, summary=summary)


STAGE = """
from alignkit import Stage, Text, TokenLogps, hookimpl

@hookimpl
def alignkit_stage():
    return [Stage(name="thing", summary="for a test", build=print, rows=(Text,), batch=TokenLogps, {fields})]
"""
JUDGE = """
from alignkit import Judge, hookimpl

@hookimpl
def alignkit_judge():
    return [Judge(name="thing", summary="for a test", build=print, {more})]
"""
REWARD = """
from alignkit import Reward, hookimpl

@hookimpl
def alignkit_reward():
    return [Reward(name="thing", summary="for a test", build=print, needs=lambda config: {"reward": "rm"})]
"""


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import nosuchlib", "could not be imported: ModuleNotFoundError: No module named 'nosuchlib'"),
        ("import os; os._exit(7)", "its import ended the process with status 7"),
        (HOOK.replace("run_end", "run_and"), "has an unknown hook alignkit_run_and. Did you mean 'alignkit_run_end'"),
        (HOOK.replace("()", "(rum)"), "has an invalid hook: PluginValidationError"),
        (
            HOOK + "@hookimpl\ndef alignkit_loss():\n    []",
            "0.1  alignkit_loss returned None, expected a list of Loss. Is a",
        ),
        (HOOK + "def alignkit_loss():\n    return []", "alignkit_loss lacks @alignkit.hookimpl"),
        (HOOK + "def alignkit_los():\n    return []", "alignkit_los is not a hook. Did you mean 'alignkit_loss'?"),
        (component(name="adamw"), "both provide optimizer 'adamw'"),
        (component(name="my thing"), "optimizer 'my thing': a name may contain only letters, digits, '-' and '_'"),
        (component(summary=""), "optimizer 'thing': its summary must be one line"),
        (component("rate: float"), "optimizer 'thing': config.rate: Field required"),
        (
            component("rate: float = option('fast', '')"),
            "optimizer 'thing': config.rate: Input should be a valid number",
        ),
        (
            STAGE.format(fields="loss='nil'"),
            "stage 'thing': no active plugin provides loss 'nil'. Did you mean 'nll'",
        ),
        (STAGE.format(fields="loss='bradley-terry'"), "stage 'thing': loss 'bradley-terry' takes RankedScores, but"),
        (STAGE.format(fields="loss='nll', train={'max_step': 3}"), "stage 'thing': unknown key train.max_step."),
        (
            JUDGE.format(more='needs=lambda config: {"reward": "rm"}'),
            "judge 'thing': it needs a run, so its config must have a field `path: str | None`",
        ),
        (
            JUDGE.format(more="largest=lambda config: 1"),
            "judge 'thing': `largest` returns 1, expected None or 2",
        ),
        (
            REWARD.replace('needs=lambda config: {"reward": "rm"}', "judge='other'"),
            "reward 'thing': `judge` is `other`, but its config has no such field",
        ),
        (REWARD, "reward 'thing': it needs a run, so its config must have a field `path: str | None`"),
        (component("rate: 'Thing' = None"), "alignkit_odd_plugin.Config cannot be a config: "),
    ],
)
def test_a_problem_is_reported_in_one_line(install: Install, capsys: Captured, code: str, told: str) -> None:
    install("odd", code)

    assert main(["plugins", "check", "odd"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("odd  alignkit-odd 0.1  ")
    assert told in line
    assert "alignkit_odd_plugin" not in sys.modules


def test_a_plugin_for_another_version_is_reported(install: Install, capsys: Captured) -> None:
    install("odd", HOOK, requires="alignkit>=99")

    assert main(["plugins", "check", "odd"]) == 1
    assert "requires alignkit>=99, but " in capsys.readouterr().out


def test_an_import_of_torch_at_module_level_is_reported_with_its_line_and_cost(
    install: Install, capsys: Captured, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path_factory.mktemp("slow")  # in place of the real one, for its seconds
    (slow / "torch.py").write_text("import time\ntime.sleep(0.25)")
    (slow / "between.py").write_text("import torch")
    monkeypatch.syspath_prepend(str(slow))
    install("odd", "\n\nimport between\n" + HOOK)

    assert main(["plugins", "check", "odd"]) == 1
    told = capsys.readouterr().out
    seconds = float(told.split("adds ")[1].split(" s ")[0])
    assert "torch imported at module level (alignkit_odd_plugin.py line 3)" in told
    assert seconds >= 0.2


def test_duplicate_names_are_reported_with_how_to_pick_one(install: Install, capsys: Captured) -> None:
    install("one", component(), distribution="lib-one")
    install("two", component(), distribution="lib-two")
    install("two", HOOK, distribution="lib-three")

    assert main(["plugins", "check", "one", "two", "--json"]) == 1
    problems = {r["distribution"]: r["problems"] for r in json.loads(capsys.readouterr().out)}
    assert problems == {
        "lib-one": ["lib-two 0.1 also provides optimizer 'thing'. To select this one, use --plugin thing@lib-one"],
        "lib-two": [
            "lib-three 0.1 also provides plugin 'two'. To select this one, use --plugin two@lib-two",
            "lib-one 0.1 also provides optimizer 'thing'. To select this one, use --plugin thing@lib-two",
        ],
        "lib-three": ["lib-two 0.1 also provides plugin 'two'. To select this one, use --plugin two@lib-three"],
    }


def test_a_sound_plugin_and_every_built_in_one_pass(
    install: Install, capsys: Captured, check_plugin: Callable[[str], None]
) -> None:
    install("focal", LOSS)

    assert main(["plugins", "check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 11
    assert all(line.endswith("  ok") for line in lines)
    check_plugin("focal")


def test_the_fixture_says_what_the_command_says(install: Install, check_plugin: Callable[[str], None]) -> None:
    install("odd", component(summary=""))

    with pytest.raises(AssertionError, match="optimizer 'thing': its summary must be one line"):
        check_plugin("odd")


def test_an_unknown_name_is_an_error_with_the_closest_name(capsys: Captured) -> None:
    assert main(["plugins", "check", "lorra"]) == 2
    assert "no plugin named 'lorra' is installed. Did you mean 'lora'?" in capsys.readouterr().err
