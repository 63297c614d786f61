"""Discovery without import, activation by name, conflicts and breakage told in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from alignkit import API_VERSION, AlignkitError, PluginError, __version__
from alignkit.registry import Registry
from alignkit.registry.plugin import installed

OPTIMIZER = """
    from alignkit import Optimizer, hookimpl

    @hookimpl
    def alignkit_optimizer():
        return [Optimizer(name="{name}", summary="for a test", build=lambda config, args: None)]
"""


def test_builtins_are_declared_by_entry_points_like_any_plugin() -> None:
    builtin = {plugin.name for plugin in installed() if plugin.builtin}

    assert builtin >= {"sft", "full", "lora", "qlora", "formats", "optimizers"}


def test_installed_is_not_active(install: Callable[..., None]) -> None:
    install("lion", OPTIMIZER.format(name="lion"))
    registry = Registry()

    assert "lion" in [plugin.name for plugin in registry.installed]
    assert "alignkit_lion_plugin" not in sys.modules
    with pytest.raises(PluginError, match="no active plugin provides optimizer 'lion'.*not active: lion"):
        registry.get("optimizer", "lion")

    registry.activate("lion")
    assert registry.get("optimizer", "lion").name == "lion"


def test_registries_share_nothing(install: Callable[..., None]) -> None:
    install("lion", OPTIMIZER.format(name="lion"))
    Registry().activate("lion")

    assert not Registry().has("optimizer", "lion")


def test_an_unknown_plugin_is_an_error_with_the_closest_name() -> None:
    with pytest.raises(
        PluginError, match=r"no plugin named 'sftt' is installed. Did you mean 'sft'\? Installed: .*lora"
    ):
        Registry().activate("sftt")


def test_a_component_of_an_active_plugin_can_be_named_too() -> None:
    Registry().activate("adafactor")


def test_a_broken_plugin_harms_nobody_until_it_is_named(install: Callable[..., None]) -> None:
    install("simpo", "import nosuchlib", distribution="alignkit-simpo", version="0.2")
    registry = Registry()

    with pytest.raises(PluginError) as error:
        registry.activate("simpo")
    assert str(error.value) == (
        "plugin simpo (alignkit-simpo 0.2) could not be imported: ModuleNotFoundError: No module named 'nosuchlib'. "
        "Reinstall or remove alignkit-simpo, or run without --plugin simpo"
    )


def test_a_misspelt_hook_is_an_error(install: Callable[..., None]) -> None:
    install("typo", "from alignkit import hookimpl\n@hookimpl\ndef alignkit_optimiser():\n    return []")

    with pytest.raises(
        PluginError, match="plugin typo .* has an unknown hook alignkit_optimiser. Did you mean 'alignkit_optimizer'"
    ):
        Registry().activate("typo")


def test_a_plugin_without_any_hook_is_an_error(install: Callable[..., None]) -> None:
    install("bare", "def alignkit_loss():\n    return []")

    with pytest.raises(PluginError, match="plugin bare .* implements no hook. Is @alignkit.hookimpl missing"):
        Registry().activate("bare")


def test_a_plugin_that_exits_does_not_take_the_tool_with_it(install: Callable[..., None]) -> None:
    install("exits", "import sys\nsys.exit()")

    with pytest.raises(PluginError, match="plugin exits .* could not be imported: SystemExit"):
        Registry().activate("exits")


def test_a_config_that_is_no_dataclass_names_its_component(install: Callable[..., None]) -> None:
    install("loose", OPTIMIZER.format(name="loose").replace("build=", "config=dict, build="))

    with pytest.raises(PluginError, match="plugin loose .*the config of optimizer 'loose' is .*expected a dataclass"):
        Registry().activate("loose")


def test_a_hook_that_raises_names_its_plugin(install: Callable[..., None]) -> None:
    install("boom", "from alignkit import hookimpl\n@hookimpl\ndef alignkit_loss():\n    return 1 / 0")
    install("bang", "from alignkit import *\n@hookimpl\ndef alignkit_loss():\n    raise PluginError('no.')")

    with pytest.raises(PluginError, match="plugin boom .* failed to declare its components: ZeroDivisionError"):
        Registry().activate("boom")
    with pytest.raises(PluginError, match="plugin bang .* failed to declare its components: PluginError: no."):
        Registry().activate("bang")


def test_a_plugin_may_be_an_object(install: Callable[..., None], check_plugin: Callable[[str], None]) -> None:
    code = "from alignkit import hookimpl\nclass P:\n    @hookimpl\n    def alignkit_run_start(self, run):\n        {}"
    install("object", code.format("run.append(self)") + "\nplugin = P()", attribute=":plugin")
    registry, run = Registry(), list[object]()
    registry.activate("object")
    registry.call("alignkit_run_start", run=run)

    assert len(run) == 1
    check_plugin("object")


def test_a_hook_that_declares_the_wrong_thing_names_it(install: Callable[..., None]) -> None:
    install("odd", "from alignkit import hookimpl\n@hookimpl\ndef alignkit_loss():\n    return ['nll']")

    with pytest.raises(PluginError, match=r"plugin odd .*: alignkit_loss returned \['nll'\], expected a list of Loss"):
        Registry().activate("odd")


def test_a_declaration_hook_without_return_is_named(install: Callable[..., None]) -> None:
    install("odd", "from alignkit import hookimpl\n@hookimpl\ndef alignkit_loss():\n    []")

    with pytest.raises(PluginError) as error:
        Registry().activate("odd")
    assert str(error.value) == (
        "plugin odd (alignkit-odd 0.1): alignkit_loss returned None, expected a list of Loss. Is a `return` missing?"
    )


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("build=None", "the build of reward 'odd' is None, expected a function"),
        ("build=print, summary=None", "the summary of reward 'odd' is None, expected a string"),
        ("build=print, requires=('nosuchlib')", "the requires of reward 'odd' is 'nosuchlib', expected a tuple"),
        ("build=print, check=3", "the check of reward 'odd' is 3, expected a function"),
    ],
)
def test_a_component_with_a_field_of_the_wrong_kind_is_named(
    install: Callable[..., None], field: str, told: str
) -> None:
    fields = f"**dict(dict(name='odd', summary=''), {field})"
    code = f"from alignkit import Reward, hookimpl\n@hookimpl\ndef alignkit_reward():\n    return [Reward({fields})]"
    install("odd", code)

    with pytest.raises(PluginError) as error:
        Registry().activate("odd")
    assert str(error.value).startswith(f"plugin odd (alignkit-odd 0.1): {told}")


@pytest.mark.parametrize(
    ("requires", "lacks"),
    [
        ("numpy>=99", r"needs numpy>=99 \(installed: [\d.]+\). Reinstall alignkit-lion"),
        ("alignkit>=0.0,<0.1", r"requires alignkit<0.1,>=0.0, but [\d.]+ is installed. To upgrade both: pip"),
        ("alignkit>=0.1,<0.2", None),
        ("nosuchlib>=2", r"needs nosuchlib>=2 \(not installed\). Reinstall alignkit-lion"),
        ("nosuchlib; python_version < '3'", None),
        ("nosuchlib; extra == 'test'", None),
        ("numpy", None),
    ],
)
def test_what_a_plugin_requires_is_looked_for_before_it_is_imported(
    install: Callable[..., None], requires: str, lacks: str | None
) -> None:
    install("lion", OPTIMIZER.format(name="lion"), requires=requires)

    if lacks is None:
        Registry().activate("lion")
        return
    with pytest.raises(PluginError, match=lacks):
        Registry().activate("lion")
    assert "alignkit_lion_plugin" not in sys.modules


def test_the_version_of_the_api_is_the_versions_first_two_numbers() -> None:
    assert __version__.startswith(f"{API_VERSION}.")


RUN_HOOK = """
    from alignkit import ConfigError, hookimpl

    @hookimpl
    def alignkit_run_start(run):
        {body}
"""


def test_run_hooks_are_called_in_the_order_of_naming(install: Callable[..., None]) -> None:
    for name in ("one", "two", "three"):
        install(name, RUN_HOOK.format(body=f"run.append('{name}')"))
    registry, run = Registry(), list[str]()
    registry.activate("two", "three", "one")
    registry.call("alignkit_run_start", run=run)

    assert run == ["two", "three", "one"]


def test_the_plugin_that_was_named_last_loads_the_model(install: Callable[..., None]) -> None:
    code = "from alignkit import hookimpl\n@hookimpl\ndef alignkit_load_model(role):\n    return {gives}"
    for name, gives in (("one", "'first'"), ("two", "'second'"), ("three", "None")):
        install(name, code.format(gives=gives))
    registry = Registry()
    registry.activate("one", "two", "three")

    assert registry.call("alignkit_load_model", run=None, role="policy", kwargs={}) == "second"
    assert Registry().call("alignkit_load_model", run=None, role="policy", kwargs={}) is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("run.nothing", "plugin late (alignkit-late 0.1) failed in alignkit_run_start: AttributeError: 'list' object"),
        ("raise ConfigError('no.')", "plugin late (alignkit-late 0.1), alignkit_run_start: no."),
        ("raise SystemExit(3)", "plugin late (alignkit-late 0.1) failed in alignkit_run_start: SystemExit: 3"),
    ],
)
def test_a_plugin_that_raises_in_a_run_hook_is_named(install: Callable[..., None], body: str, message: str) -> None:
    install("late", RUN_HOOK.format(body=body))
    registry = Registry()
    registry.activate("late")

    with pytest.raises(AlignkitError) as error:
        registry.call("alignkit_run_start", run=[])
    assert str(error.value).startswith(message)


def test_every_kind_of_component_comes_through_its_hook(install: Callable[..., None]) -> None:
    install(
        "all",
        """
        from alignkit import *

        nothing = lambda *args: None

        @hookimpl
        def alignkit_stage():
            return [Stage(name="s", summary="", build=nothing, rows=(Text,), batch=TokenLogps, loss="l", data="d")]

        @hookimpl
        def alignkit_model():
            return [Tuner(name="t", summary="", load=nothing, wrap=nothing)]

        @hookimpl
        def alignkit_loss():
            return [Loss(name="l", summary="", batch=TokenLogps, build=nothing)]

        @hookimpl
        def alignkit_optimizer():
            return [Optimizer(name="o", summary="", build=nothing)]

        @hookimpl
        def alignkit_data():
            return [DataFormat(name="f", summary="", fits=nothing, convert=nothing)]

        @hookimpl
        def alignkit_reward():
            return [Reward(name="r", summary="", build=nothing)]

        @hookimpl
        def alignkit_judge():
            return [Judge(name="j", summary="", build=nothing)]

        @hookimpl
        def alignkit_rollout():
            return [Rollout(name="e", summary="", build=nothing)]
        """,
    )
    registry = Registry()
    registry.activate("all")

    given = {"stage": "s", "tuner": "t", "loss": "l", "optimizer": "o"}
    given |= {"format": "f", "reward": "r", "judge": "j", "rollout": "e"}
    for kind, name in given.items():
        assert registry.get(kind, name).name == name
    assert len(registry.components_of(registry.active[-1])) == len(given)
