"""Find installed plugins, import the active ones, look components up by name.

*Installed is not active.* Discovery reads package metadata only. The built-ins, which come in alignkit's own
distribution, are always active; any other plugin is imported only when a run names it, so that a broken one harms
nobody who does not use it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import pluggy

from alignkit import hookspecs
from alignkit.components import KINDS, Component, Stage
from alignkit.errors import PluginError, did_you_mean, one_line

GROUP = "alignkit"

# which hook declares which kind of component
DECLARATIONS = {
    "stage": "alignkit_stage",
    "tuner": "alignkit_model",
    "loss": "alignkit_loss",
    "optimizer": "alignkit_optimizer",
    "format": "alignkit_data",
    "reward": "alignkit_reward",
    "rollout": "alignkit_rollout",
}


@dataclass(frozen=True)
class Plugin:
    """An installed plugin, as its distribution's metadata describes it; not necessarily imported."""

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint

    @property
    def builtin(self) -> bool:
        """Whether it comes in alignkit's own distribution."""
        return self.distribution == "alignkit"

    @property
    def provider(self) -> str:
        """``"alignkit-simpo 0.2"``."""
        return f"{self.distribution} {self.version}"


def installed() -> list[Plugin]:
    """Every installed plugin, sorted by name; reads metadata and imports nothing."""
    found = []
    for ep in entry_points(group=GROUP):
        distribution, version = (ep.dist.name, ep.dist.version) if ep.dist else ("?", "?")
        found.append(Plugin(ep.name, distribution, version, ep))
    return sorted(found, key=lambda p: (p.name, p.distribution))


class Registry:
    """The active plugins of one run and the components they gave. An object: two registries share nothing."""

    def __init__(self, plugins: list[Plugin] | None = None) -> None:
        self._installed: dict[str, list[Plugin]] = defaultdict(list)
        for plugin in installed() if plugins is None else plugins:
            self._installed[plugin.name].append(plugin)
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._components: dict[str, dict[str, tuple[Component, Plugin]]] = {kind: {} for kind in KINDS}
        self._active: dict[str, Plugin] = {}
        for plugin in self.installed:
            if plugin.builtin:
                self._activate(plugin)

    @property
    def installed(self) -> list[Plugin]:
        """Every plugin that this registry knows of, active or not."""
        return [plugin for plugins in self._installed.values() for plugin in plugins]

    @property
    def active(self) -> list[Plugin]:
        """The plugins that were activated, in order."""
        return list(self._active.values())

    @property
    def hook(self) -> Any:
        """The run hooks of the active plugins, for ``alignkit.run``."""
        return self._manager.hook

    def activate(self, name: str) -> None:
        """Import the plugin of that name and take its components in. Does nothing where it is active already.

        ``name`` may also be that of a component which an active plugin gives (``adafactor``): it is there already.

        Raises:
            PluginError: no such plugin; two distributions give it; it cannot be imported; it declares nonsense.
        """
        candidates = self._installed.get(name, [])
        if not candidates:
            if any(name in named for named in self._components.values()):
                return
            known = [plugin.name for plugin in self.installed]
            components = [component for named in self._components.values() for component in named]
            hint = did_you_mean(name, [*known, *components])
            raise PluginError(f"no plugin named '{name}' is installed.{hint} Installed: {', '.join(known)}")
        if len(candidates) > 1:
            givers = " and ".join(plugin.provider for plugin in candidates)
            raise PluginError(f"plugin '{name}' is given by {givers}: uninstall one of them")
        if name not in self._active:
            self._activate(candidates[0])

    def _activate(self, plugin: Plugin) -> None:
        who = f"plugin {plugin.name} ({plugin.provider})"
        away = f"Reinstall or remove {plugin.distribution}, or run without --plugin {plugin.name}"
        try:
            module = plugin.entry_point.load()
        except (Exception, SystemExit) as error:
            raise PluginError(f"{who} could not be imported: {one_line(error)}. {away}") from error
        try:
            self._manager.register(module, name=plugin.name)
            self._manager.check_pending()  # a misspelt hook is an error, not silence
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{who} has a wrong hook: {one_line(error)}. {away}") from error
        if not self._manager.get_hookcallers(module):
            raise PluginError(f"{who} implements no hook. Is @alignkit.hookimpl missing? {away}")
        try:
            for component in self._declared(plugin):
                self._add(component, plugin)
        except PluginError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{who} failed while declaring: {one_line(error)}. {away}") from error
        self._active[plugin.name] = plugin

    def _declared(self, plugin: Plugin) -> Iterator[Component]:
        others = [module for name, module in self._manager.list_name_plugin() if name != plugin.name]
        for kind, hook in DECLARATIONS.items():
            for declared in self._manager.subset_hook_caller(hook, others)():
                for component in declared:
                    if not isinstance(component, KINDS[kind]):
                        raise TypeError(f"{hook} gave {component!r}, which is no {KINDS[kind].__name__}")
                    if not dataclasses.is_dataclass(component.config):
                        raise TypeError(f"the config of {kind} '{component.name}' is no dataclass")
                    yield component

    def _add(self, component: Component, plugin: Plugin) -> None:
        named = self._components[component.kind]
        if component.name in named:
            other = named[component.name][1]
            raise PluginError(
                f"{component.kind} '{component.name}' is given by both {other.name} ({other.provider}) and "
                f"{plugin.name} ({plugin.provider}). Run with one of the two"
            )
        named[component.name] = (component, plugin)

    def has(self, kind: str, name: str) -> bool:
        """Whether an active plugin gives a component of that kind and name."""
        return name in self._components[kind]

    def all(self, kind: str) -> list[Component]:
        """Every component of a kind, by name."""
        return [component for _, (component, _) in sorted(self._components[kind].items())]

    def given_by(self, plugin: Plugin) -> list[Component]:
        """The components that a plugin gave."""
        return [c for named in self._components.values() for c, giver in named.values() if giver == plugin]

    def get(self, kind: str, name: str) -> Component:
        """The component of that kind and name.

        Raises:
            PluginError: no active plugin gives it; says which installed plugins are not active.
        """
        try:
            return self._components[kind][name][0]
        except KeyError:
            pass
        known = sorted(self._components[kind])
        idle = [p.name for p in self.installed if p.name not in self._active]
        hint = f". Installed but not active: {', '.join(idle)} (add --plugin NAME)" if idle else ""
        raise PluginError(
            f"no active plugin gives a {kind} named '{name}'.{did_you_mean(name, known)} "
            f"Known: {', '.join(known) or 'none'}{hint}"
        )

    def stage(self, name: str) -> Stage:
        """The stage of that name; raises as :meth:`get`."""
        return cast(Stage, self.get("stage", name))

    def provider(self, component: Component) -> Plugin:
        """The plugin that gave a component."""
        return self._components[component.kind][component.name][1]
