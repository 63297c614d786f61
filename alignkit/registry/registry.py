"""Find installed plugins, import the active ones, look components up by name.

*Installed is not active.* Discovery reads package metadata only. The built-ins, which come in alignkit's own
distribution, are always active; any other plugin is imported only when a run names it, so that a broken one harms
nobody who does not use it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, cast

import pluggy

from alignkit import __version__, hookspecs
from alignkit.components import KINDS, Component, Stage
from alignkit.errors import AlignkitError, PluginError, did_you_mean, one_line
from alignkit.registry.handover import declared_components, expect, who
from alignkit.registry.plugin import GROUP, Plugin, bare, installed

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


class Registry:
    """The active plugins of one run and the components they gave. An object: two registries share nothing."""

    def __init__(self, plugins: list[Plugin] | None = None) -> None:
        self._installed: dict[str, list[Plugin]] = defaultdict(list)
        for plugin in installed() if plugins is None else plugins:
            self._installed[plugin.name].append(plugin)
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._components: dict[str, dict[str, list[tuple[Component, Plugin]]]] = {kind: {} for kind in KINDS}
        self._active: dict[str, Plugin] = {}  # by the name that pluggy knows it by
        self._picked: dict[str, str] = {}  # name -> the distribution that it shall come from
        self._asked: dict[str, None] = {}
        for plugin in self.installed:
            if plugin.builtin:
                self._activate(plugin)

    @property
    def installed(self) -> list[Plugin]:
        """Every plugin that this registry knows of, active or not."""
        return [plugin for plugins in self._installed.values() for plugin in plugins]

    @property
    def active(self) -> list[Plugin]:
        """The plugins that were activated, in order: the built-in ones, then those that were named."""
        return list(self._active.values())

    @property
    def asked(self) -> list[str]:
        """What was asked for beyond the built-in plugins, as it was spelt: activating it again gives this registry."""
        return list(self._asked)

    def activate(self, *asked: str) -> None:
        """Import the plugins of these names, in this order, and take their components in. Active ones stay as they are.

        A name may also be that of a component which an active plugin gives (``adafactor``). ``name@distribution`` says
        whose plugin or component is meant, where several distributions give that name.

        Raises:
            PluginError: no such plugin; two distributions give it; it cannot be imported; it declares nonsense.
        """
        for name in asked:
            if "@" in name:
                self._picked[bare(name)] = name.partition("@")[2]
        for name in sorted(asked, key=lambda name: "@" not in name and name not in self._installed):  # components last
            meant = self.meant(name)
            for plugin in meant:
                if plugin not in self.active:
                    self._activate(plugin)
            if "@" in name:
                self._check_gives(name, meant)
            if "@" in name or any(not plugin.builtin for plugin in meant):
                self._asked[name] = None

    def meant(self, name: str) -> list[Plugin]:
        """The plugins to activate for a name that was asked for; none where it is a component that is there."""
        distribution = self._picked.get(bare(name))
        candidates = self._installed.get(bare(name), [])
        if distribution:
            theirs = [plugin for plugin in self.installed if plugin.is_from(distribution)]
            if not theirs:
                known = sorted({plugin.distribution for plugin in self.installed})
                hint = did_you_mean(distribution, known)
                raise PluginError(f"{name}: no distribution '{distribution}' with plugins is installed.{hint}")
            return [plugin for plugin in theirs if plugin in candidates] or theirs
        if len(candidates) > 1:
            if len({plugin.distribution for plugin in candidates}) == 1:
                raise PluginError(
                    f"plugin '{name}' is given twice by {candidates[0].provider}: its entry points in the group "
                    f"alignkit need names of their own. Reinstall {candidates[0].distribution}, or tell its author"
                )
            givers = " and ".join(plugin.provider for plugin in candidates)
            which = " or ".join(f"--plugin {name}@{plugin.distribution}" for plugin in candidates)
            raise PluginError(f"plugin '{name}' is given by {givers}: say {which}")
        if not candidates and not any(name in named for named in self._components.values()):
            known = [plugin.name for plugin in self.installed]
            components = [component for named in self._components.values() for component in named]
            hint = did_you_mean(name, [*known, *components])
            raise PluginError(f"no plugin named '{name}' is installed.{hint} Installed: {', '.join(known)}")
        return candidates

    def _check_gives(self, asked: str, plugins: list[Plugin]) -> None:
        given = [component.name for plugin in plugins for component in self.given_by(plugin)]
        if bare(asked) not in [*given, *(plugin.name for plugin in plugins)]:
            hint = did_you_mean(bare(asked), given)
            raise PluginError(f"{plugins[0].distribution} gives no '{bare(asked)}'.{hint} It gives: {', '.join(given)}")

    def _activate(self, plugin: Plugin) -> None:
        away = f"Reinstall or remove {plugin.distribution}, or run without --plugin {plugin.name}"
        if not plugin.builtin:
            self._check_version(plugin)
            if missing := plugin.missing:
                raise PluginError(
                    f"{plugin} needs {' and '.join(missing)}: reinstall {plugin.distribution}, or run without --plugin "
                    f"{plugin.name}"
                )
        try:
            module = plugin.entry_point.load()
        except (Exception, SystemExit) as error:
            raise PluginError(f"{plugin} could not be imported: {one_line(error)}. {away}") from error
        hooks = [name for name in vars(hookspecs) if name.startswith("alignkit_")]
        marked = [name for name in dir(module) if self._manager.parse_hookimpl_opts(module, name)]
        if unknown := [name for name in marked if name not in hooks]:
            raise PluginError(f"{plugin} has a wrong hook: {unknown[0]}.{did_you_mean(unknown[0], hooks)} {away}")
        key = f"{plugin.name}@{plugin.distribution}"
        try:
            self._manager.register(module, name=key)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{plugin} has a wrong hook: {one_line(error)}. {away}") from error
        if not self._manager.get_hookcallers(module):
            raise PluginError(f"{plugin} implements no hook. Is @alignkit.hookimpl missing? {away}")
        try:
            declared = list(self._declared(key))
        except (Exception, SystemExit) as error:
            raise PluginError(f"{plugin} failed while declaring: {one_line(error)}. {away}") from error
        for kind, hook, given in declared:
            for component in declared_components(plugin, hook, KINDS[kind], given):
                self._add(component, plugin)
        self._active[key] = plugin

    @staticmethod
    def _check_version(plugin: Plugin) -> None:
        from packaging.specifiers import SpecifierSet

        if not SpecifierSet(plugin.built_for).contains(__version__, prereleases=True):
            raise PluginError(
                f"{plugin} is built for alignkit{plugin.built_for}, and this is {__version__}. Versions that fit: "
                f"pip install -U alignkit {plugin.distribution}. Or run without --plugin {plugin.name}"
            )

    def _declared(self, key: str) -> Iterator[tuple[str, str, Any]]:
        """What the declaration hooks of one plugin give: (kind, hook, that)."""
        for kind, hook in DECLARATIONS.items():
            for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                if implementation.plugin_name == key:
                    yield kind, hook, implementation.function()

    def _add(self, component: Component, plugin: Plugin) -> None:
        given = self._components[component.kind].setdefault(component.name, [])
        given.append((component, plugin))
        what = f"{component.kind} '{component.name}'"
        for _, other in given[:-1]:
            if other.distribution == plugin.distribution:
                both = plugin.name if other == plugin else f"{other.name} and {plugin.name}"
                raise PluginError(
                    f"{what} is given twice by {plugin.provider} ({both}), and no option can tell the two apart: "
                    "rename or remove one"
                )
        if len(given) > 1 and self._picked_among(component.name, given) is None:
            other = given[0][1]
            raise PluginError(
                f"{what} is given by both {other.name} ({other.provider}) and {plugin.name} ({plugin.provider}). Say "
                f"--plugin {component.name}@{other.distribution} or --plugin {component.name}@{plugin.distribution}"
            )

    def _picked_among(self, name: str, given: list[tuple[Component, Plugin]]) -> tuple[Component, Plugin] | None:
        """The one of the picked distribution, or the only one."""
        if len(given) == 1:
            return given[0]
        picked = self._picked.get(name, "")
        return next((pair for pair in given if pair[1].is_from(picked)), None)

    def call(
        self, hook: str, right: Callable[[Any], bool] = lambda result: True, expected: str = "", **arguments: Any
    ) -> Any:
        """Call a run hook of the active plugins, in the order in which they became active: a list of what they gave.

        A hook whose first result counts asks the plugin that was named last first, and gives its result or None.
        ``right`` says of each result whether it is what was ``expected``.

        Raises:
            AlignkitError: a plugin raised, or gave something else; names it.
        """
        first_counts = getattr(self._manager.hook, hook).spec.opts["firstresult"]
        implementations = self._implementations(hook)
        results = []
        for implementation in reversed(implementations) if first_counts else implementations:
            result = self._call_one(implementation, hook, right, expected, arguments)
            if first_counts and result is not None:
                return result
            results.append(result)
        return None if first_counts else results

    def call_all(self, hook: str, **arguments: Any) -> list[AlignkitError]:
        """As :meth:`call`, but every plugin is called, whatever another one raised: a list of the errors."""
        errors = []
        for implementation in self._implementations(hook):
            try:
                self._call_one(implementation, hook, lambda result: True, "", arguments)
            except AlignkitError as error:
                errors.append(error)
        return errors

    def _implementations(self, hook: str) -> list[Any]:
        """Those of the active plugins, in the order in which they became active."""
        return list(getattr(self._manager.hook, hook).get_hookimpls())

    def _call_one(
        self, implementation: Any, hook: str, right: Callable[[Any], bool], expected: str, arguments: dict[str, Any]
    ) -> Any:
        plugin = self._active[implementation.plugin_name]
        try:
            result = implementation.function(*(arguments[name] for name in implementation.argnames))
        except AlignkitError as error:
            raise type(error)(f"{plugin}, {hook}: {error}") from error
        except (Exception, SystemExit) as error:
            away = f"Run without --plugin {plugin.name}, or tell its author"
            raise PluginError(f"{plugin} failed in {hook}: {one_line(error)}. {away}") from error
        expect(f"{plugin}: {hook}", result, right(result), expected)
        return result

    def has(self, kind: str, name: str) -> bool:
        """Whether an active plugin gives a component of that kind and name."""
        return name in self._components[kind]

    def all(self, kind: str) -> list[Component]:
        """Every component of a kind, by name."""
        return [self.get(kind, name) for name in sorted(self._components[kind])]

    def given_by(self, plugin: Plugin) -> list[Component]:
        """The components that a plugin gave."""
        given = (pair for named in self._components.values() for pairs in named.values() for pair in pairs)
        return [component for component, giver in given if giver == plugin]

    def run_hooks_of(self, plugin: Plugin) -> list[str]:
        """The run hooks that an active plugin implements."""
        return [hook for hook in self.hooks_of(plugin) if hook not in DECLARATIONS.values()]

    def hooks_of(self, plugin: Plugin) -> list[str]:
        """The hooks that an active plugin implements."""
        module = self._manager.get_plugin(f"{plugin.name}@{plugin.distribution}")
        return [caller.name for caller in self._manager.get_hookcallers(module) or []]

    def get(self, kind: str, name: str) -> Component:
        """The component of that kind and name.

        Raises:
            PluginError: no active plugin gives it; says which installed plugins are not active.
        """
        if given := self._components[kind].get(name):
            return (self._picked_among(name, given) or given[0])[0]
        known = sorted(self._components[kind])
        idle = [p.name for p in self.installed if p not in self.active]
        hint = f". Installed but not active: {', '.join(idle)} (add --plugin NAME)" if idle else ""
        raise PluginError(
            f"no active plugin gives a {kind} named '{name}'.{did_you_mean(name, known)} "
            f"Known: {', '.join(known) or 'none'}{hint}"
        )

    def stage(self, name: str) -> Stage:
        """The stage of that name; raises as :meth:`get`."""
        return cast(Stage, self.get("stage", name))

    def who(self, component: Component, function: str = "", which: str = "") -> str:
        """A component, or one of its functions, with the plugin that gave it, for an error."""
        given = self._components[component.kind].get(component.name, [])
        giver = next((plugin for one, plugin in given if one is component), None)  # none: made by hand, as in a test
        return who(giver, component, function, which)

    def provider(self, component: Component) -> Plugin:
        """The plugin that gave a component."""
        return next(giver for given, giver in self._components[component.kind][component.name] if given is component)
