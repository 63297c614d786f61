"""What has one name twice: both providers are named, and a distribution picks one."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from alignkit import PluginError
from alignkit.registry import Registry
from alignkit.registry.plugin import installed

OPTIMIZER = """
    from alignkit import Optimizer, hookimpl

    @hookimpl
    def alignkit_optimizer():
        return [Optimizer(name="{name}", summary="for a test", build=lambda config, args: None)]
"""


def test_a_component_given_twice_names_both_providers(install: Callable[..., None]) -> None:
    install("mine", OPTIMIZER.format(name="adamw"), distribution="alignkit-mine")

    with pytest.raises(
        PluginError, match=r"optimizers \(alignkit .*mine \(alignkit-mine 0.1\) both provide optimizer 'adamw'"
    ):
        Registry().activate("mine")


def test_a_plugin_given_by_two_distributions_names_both_and_is_picked_by_one(install: Callable[..., None]) -> None:
    install("lion", OPTIMIZER.format(name="lion"), distribution="lion-a")
    install("lion", OPTIMIZER.format(name="lion"), distribution="lion-b", version="0.2")

    with pytest.raises(PluginError, match="lion-a 0.1 and lion-b 0.2 both provide a plugin 'lion'. Use --plugin"):
        Registry().activate("lion")
    for distribution in ("lion-a", "lion-b", "Lion_B"):
        registry = Registry()
        registry.activate("sft", f"lion@{distribution}", "lion")
        assert registry.provider(registry.get("optimizer", "lion")).is_from(distribution)
    with pytest.raises(PluginError, match="lion@lion-c: no distribution 'lion-c' with plugins is installed. Did you"):
        Registry().activate("lion@lion-c")


def test_a_component_given_twice_is_picked_by_its_distribution(install: Callable[..., None]) -> None:
    install("mine", OPTIMIZER.format(name="adamw"), distribution="alignkit-mine")

    for distribution, who in (("alignkit-mine", "mine"), ("alignkit", "optimizers")):
        registry = Registry()
        registry.activate("mine", f"adamw@{distribution}")
        assert registry.provider(registry.get("optimizer", "adamw")).name == who
        assert registry.requested == ["mine", f"adamw@{distribution}"]


def test_a_component_given_twice_by_one_distribution_is_for_its_author(install: Callable[..., None]) -> None:
    twice = OPTIMIZER.format(name="lion").replace("return [", "return 2 * [")
    install("twice", twice, distribution="alignkit-twice")

    for asked in (["twice"], ["twice", "lion@alignkit-twice"]):
        with pytest.raises(
            PluginError, match=r"alignkit-twice 0.1 provides optimizer 'lion' twice \(in twice\), and no .* Rename or"
        ):
            Registry().activate(*asked)


def test_a_plugin_given_twice_by_one_distribution_is_for_its_author(install: Callable[..., None]) -> None:
    install("lion", OPTIMIZER.format(name="lion"))
    (lion,) = (plugin for plugin in installed() if plugin.name == "lion")

    with pytest.raises(PluginError, match="alignkit-lion 0.1 provides plugin 'lion' twice: its entry points .* must"):
        Registry([lion, lion]).activate("lion")


def test_what_is_uninstalled_is_named_as_what_is_picked(install: Callable[..., None]) -> None:
    from alignkit.cli.install import _provider

    install("lion", OPTIMIZER.format(name="lion"), distribution="lion-a")
    install("lion", OPTIMIZER.format(name="lion"), distribution="lion-b", version="0.2")

    assert _provider("lion@lion_B") == _provider("lion-b") == ("lion-b 0.2", "lion")
    with pytest.raises(
        PluginError, match="both provide a plugin 'lion'. Run alignkit uninstall lion@lion-a or alignkit uninstall"
    ):
        _provider("lion")
    with pytest.raises(PluginError, match="no plugin 'lion@lion-c' is installed"):
        _provider("lion@lion-c")


def test_a_distribution_without_that_name_is_an_error_that_lists_its_names(install: Callable[..., None]) -> None:
    install("big", OPTIMIZER.format(name="lion"))

    with pytest.raises(PluginError, match="alignkit-big provides no 'lyon'. Did you mean 'lion'. It provides: lion"):
        Registry().activate("lyon@alignkit-big")


@pytest.mark.parametrize(
    ("requires", "fits"),
    [
        ("alignkit", True),
        ("alignkit>=0.1,<0.2", True),
        ("alignkit>=99", False),
        ("alignkit<0.1", False),
        ("numpy", True),
    ],
)
def test_a_plugin_for_another_version_is_not_imported(install: Callable[..., None], requires: str, fits: bool) -> None:
    install("lion", OPTIMIZER.format(name="lion"), distribution="alignkit-lion", requires=requires)

    if fits:
        Registry().activate("lion")
        return
    built_for = requires.removeprefix("alignkit")
    with pytest.raises(PluginError, match=rf"plugin lion \(alignkit-lion 0.1\) requires alignkit{built_for}, but "):
        Registry().activate("lion")
    assert "alignkit_lion_plugin" not in sys.modules
