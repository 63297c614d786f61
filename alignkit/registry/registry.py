"""Finds installed plugins, imports the active ones, and looks up components by name.

An installed plugin is not necessarily active. Discovery reads package metadata only. The built-in plugins are always
active. Any other plugin is imported only when a command names it, so a broken plugin affects only the commands that use
it.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, cast

import pluggy

from alignkit import __version__, hookspecs
from alignkit.components import KINDS, Component, Stage
from alignkit.errors import AlignkitError, ConfigError, PluginError, did_you_mean, one_line
from alignkit.registry.blame import describe, other_version, upgrade
from alignkit.registry.checks import declared_components, expect
from alignkit.registry.plugin import GROUP, IN_MEMORY, Plugin, installed, plugin_name

# kind of component -> the hook that declares it
DECLARATIONS = {
    "stage": "alignkit_stage",
    "tuner": "alignkit_model",
    "loss": "alignkit_loss",
    "optimizer": "alignkit_optimizer",
    "format": "alignkit_data",
    "reward": "alignkit_reward",
    "judge": "alignkit_judge",
    "rollout": "alignkit_rollout",
}


class Registry:
    """The active plugins of a command and their components. Registries are independent of each other."""

    def __init__(self, plugins: list[Plugin] | None = None) -> None:
        self._installed: dict[str, list[Plugin]] = defaultdict(list)
        for plugin in installed() if plugins is None else plugins:
            self._installed[plugin.name].append(plugin)
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._components: dict[str, dict[str, list[tuple[Component, Plugin]]]] = {kind: {} for kind in KINDS}
        self._active: dict[str, Plugin] = {}  # by their names in pluggy
        self._picked: dict[str, str] = {}  # name -> the distribution that the user chose
        self._requested: dict[str, None] = {}
        for plugin in self.installed:
            if plugin.builtin:
                self._activate(plugin)

    @property
    def installed(self) -> list[Plugin]:
        """All plugins that this registry knows, active or not."""
        return [plugin for plugins in self._installed.values() for plugin in plugins]

    @property
    def active(self) -> list[Plugin]:
        """The active plugins, in order of activation: the built-in ones, then those that were named."""
        return list(self._active.values())

    @property
    def requested(self) -> list[str]:
        """The activated names, other than built-in plugins, as written. Activating them again gives this registry."""
        return list(self._requested)

    def activate(self, *requested: str) -> None:
        """Import plugins by name, in this order, and register their components. Plugins that are active are skipped.

        A name may also be that of a component of an active plugin (``adafactor``). If several distributions provide the
        name, ``name@distribution`` selects one.

        Raises:
            PluginError: no such plugin; several distributions provide it; it cannot be imported; its declarations are
                invalid.
        """
        for name in requested:
            if "@" in name:
                self._picked[plugin_name(name)] = name.partition("@")[2]
        for name in sorted(
            requested, key=lambda name: "@" not in name and name not in self._installed
        ):  # components last
            matches = self.matches(name)
            for plugin in matches:
                if plugin not in self.active:
                    self._activate(plugin)
            if "@" in name:
                self._check_provides(name, matches)
            if "@" in name or any(not plugin.builtin for plugin in matches):
                self._requested[name] = None

    def matches(self, name: str) -> list[Plugin]:
        """The plugins to activate for a name. Empty if it is the name of a registered component.

        Plugins in memory are always named with their distribution.
        """
        distribution = name.partition("@")[2] or self._picked.get(plugin_name(name))
        candidates = self._installed.get(plugin_name(name), [])
        if distribution:
            plugins = [plugin for plugin in self.installed if plugin.is_from(distribution)]
            if not plugins and distribution.startswith(IN_MEMORY):
                raise PluginError(
                    f"plugin {plugin_name(name)} was in the memory of a Python session, and this process has no plugin "
                    "of that name and code. In Python, pass it again: plugins=[...] of alignkit.train or alignkit.load"
                )
            if not plugins:
                known = sorted({plugin.distribution for plugin in self.installed})
                hint = did_you_mean(distribution, known)
                raise PluginError(f"{name}: no distribution '{distribution}' with plugins is installed.{hint}")
            return [plugin for plugin in plugins if plugin in candidates] or plugins
        candidates = [plugin for plugin in candidates if not plugin.distribution.startswith(IN_MEMORY)]
        if len(candidates) > 1:
            if len({plugin.distribution for plugin in candidates}) == 1:
                raise PluginError(
                    f"{candidates[0].provider} provides plugin '{name}' twice: its entry points in the group alignkit "
                    f"must have different names. Reinstall {candidates[0].distribution}, or report this to its author"
                )
            providers = " and ".join(plugin.provider for plugin in candidates)
            choices = " or ".join(f"--plugin {name}@{plugin.distribution}" for plugin in candidates)
            raise PluginError(f"{providers} both provide a plugin '{name}'. Use {choices}")
        if not candidates and not any(name in named for named in self._components.values()):
            known = [plugin.name for plugin in self.installed]
            components = [component for named in self._components.values() for component in named]
            hint = did_you_mean(name, [*known, *components])
            raise PluginError(f"no plugin named '{name}' is installed.{hint} Installed: {', '.join(known)}")
        return candidates

    def _check_provides(self, requested: str, plugins: list[Plugin]) -> None:
        provided = [component.name for plugin in plugins for component in self.components_of(plugin)]
        if plugin_name(requested) not in [*provided, *(plugin.name for plugin in plugins)]:
            hint = did_you_mean(plugin_name(requested), provided)
            raise PluginError(
                f"{plugins[0].distribution} provides no '{plugin_name(requested)}'.{hint} It provides: "
                f"{', '.join(provided)}"
            )

    def _activate(self, plugin: Plugin) -> None:
        remedy = plugin.remedy
        if not plugin.builtin:
            self._check_version(plugin)
            if missing := plugin.missing:
                raise PluginError(
                    f"{plugin} needs {' and '.join(missing)}. Reinstall {plugin.distribution}, or run without --plugin "
                    f"{plugin.name}"
                )
        try:
            module = plugin.load()
        except (Exception, SystemExit) as error:
            remedy = other_version(plugin, error) or remedy
            raise PluginError(f"{plugin} could not be imported: {one_line(error)}. {remedy}") from error
        hooks = [name for name in vars(hookspecs) if name.startswith("alignkit_")]
        marked = [name for name in dir(module) if self._manager.parse_hookimpl_opts(module, name)]
        if unknown := [name for name in marked if name not in hooks]:
            raise PluginError(f"{plugin} has an unknown hook {unknown[0]}.{did_you_mean(unknown[0], hooks)} {remedy}")
        key = f"{plugin.name}@{plugin.distribution}"
        try:
            self._manager.register(module, name=key)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{plugin} has an invalid hook: {one_line(error)}. {remedy}") from error
        if not self._manager.get_hookcallers(module):
            raise PluginError(f"{plugin} implements no hook. Is @alignkit.hookimpl missing? {remedy}")
        try:
            declared = list(self._declared(key))
        except (Exception, SystemExit) as error:
            remedy = other_version(plugin, error) or remedy
            raise PluginError(f"{plugin} failed to declare its components: {one_line(error)}. {remedy}") from error
        for kind, hook, result in declared:
            for component in declared_components(plugin, hook, KINDS[kind], result):
                self._add(component, plugin)
        self._active[key] = plugin

    @staticmethod
    def _check_version(plugin: Plugin) -> None:
        from packaging.specifiers import SpecifierSet

        if not SpecifierSet(plugin.built_for).contains(__version__, prereleases=True):
            raise PluginError(
                f"{plugin} requires alignkit{plugin.built_for}, but {__version__} is installed. {upgrade(plugin)}"
            )

    def _declared(self, key: str) -> Iterator[tuple[str, str, Any]]:
        """Call the declaration hooks of a plugin: (kind, hook, result)."""
        for kind, hook in DECLARATIONS.items():
            for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                if implementation.plugin_name == key:
                    yield kind, hook, implementation.function()

    def _add(self, component: Component, plugin: Plugin) -> None:
        registered = self._components[component.kind].setdefault(component.name, [])
        registered.append((component, plugin))
        described = f"{component.kind} '{component.name}'"
        for _, other in registered[:-1]:
            if other.distribution == plugin.distribution:
                plugins = plugin.name if other == plugin else f"{other.name} and {plugin.name}"
                raise PluginError(
                    f"{plugin.provider} provides {described} twice (in {plugins}), and no option can tell them apart. "
                    "Rename or remove one of them"
                )
        if len(registered) > 1 and self._picked_among(component.name, registered) is None:
            other = registered[0][1]
            raise PluginError(
                f"{other.name} ({other.provider}) and {plugin.name} ({plugin.provider}) both provide {described}. Use "
                f"--plugin {component.name}@{other.distribution} or --plugin {component.name}@{plugin.distribution}"
            )

    def _picked_among(self, name: str, registered: list[tuple[Component, Plugin]]) -> tuple[Component, Plugin] | None:
        """The component of the distribution that the user chose, or the only one."""
        if len(registered) == 1:
            return registered[0]
        picked = self._picked.get(name, "")
        return next((pair for pair in registered if pair[1].is_from(picked)), None)

    def call(
        self, hook: str, valid: Callable[[Any], bool] = lambda result: True, expected: str = "", **arguments: Any
    ) -> Any:
        """Call a run hook of the active plugins, in order of activation, and return the list of results.

        A ``firstresult`` hook calls the last activated plugin first, and returns the first result that is not None, or
        None. ``valid`` tells whether a result is what was ``expected``.

        Raises:
            AlignkitError: a plugin raised, or returned something else. The message names the plugin.
        """
        first_counts = getattr(self._manager.hook, hook).spec.opts["firstresult"]
        implementations = self._implementations(hook)
        results = []
        for implementation in reversed(implementations) if first_counts else implementations:
            result = self._call_one(implementation, hook, valid, expected, arguments)
            if first_counts and result is not None:
                return result
            results.append(result)
        return None if first_counts else results

    def call_all(self, hook: str, **arguments: Any) -> list[AlignkitError]:
        """Like :meth:`call`, but calls every plugin even if another one raises. Returns the errors."""
        errors = []
        for implementation in self._implementations(hook):
            try:
                self._call_one(implementation, hook, lambda result: True, "", arguments)
            except AlignkitError as error:
                errors.append(error)
        return errors

    def _implementations(self, hook: str) -> list[Any]:
        """The implementations of the active plugins, in order of activation."""
        return list(getattr(self._manager.hook, hook).get_hookimpls())

    def _call_one(
        self, implementation: Any, hook: str, valid: Callable[[Any], bool], expected: str, arguments: dict[str, Any]
    ) -> Any:
        plugin = self._active[implementation.plugin_name]
        try:
            result = implementation.function(*(arguments[name] for name in implementation.argnames))
        except AlignkitError as error:
            raise type(error)(f"{plugin}, {hook}: {error}") from error
        except (Exception, SystemExit) as error:
            in_memory = plugin.distribution.startswith(IN_MEMORY)
            remedy = plugin.remedy if in_memory else f"Run without --plugin {plugin.name}, or report this to its author"
            raise PluginError(f"{plugin} failed in {hook}: {one_line(error)}. {remedy}") from error
        expect(f"{plugin}: {hook}", result, valid(result), expected)
        return result

    def has(self, kind: str, name: str) -> bool:
        """Whether an active plugin provides a component of that kind and name."""
        return name in self._components[kind]

    def all(self, kind: str) -> list[Component]:
        """All components of a kind, sorted by name."""
        return [self.get(kind, name) for name in sorted(self._components[kind])]

    def components_of(self, plugin: Plugin) -> list[Component]:
        """The components of a plugin."""
        registered = (pair for named in self._components.values() for pairs in named.values() for pair in pairs)
        return [component for component, provider in registered if provider == plugin]

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
            PluginError: no active plugin provides it. The message lists installed plugins that are not active.
        """
        if registered := self._components[kind].get(name):
            return (self._picked_among(name, registered) or registered[0])[0]
        known = sorted(self._components[kind])
        inactive = [p.name for p in self.installed if p not in self.active]
        hint = f". Installed but not active: {', '.join(inactive)} (add --plugin NAME)" if inactive else ""
        raise PluginError(
            f"no active plugin provides {kind} '{name}'.{did_you_mean(name, known)} "
            f"Known: {', '.join(known) or 'none'}{hint}"
        )

    def stage(self, name: str) -> Stage:
        """The stage of that name. Raises as :meth:`get`."""
        return cast(Stage, self.get("stage", name))

    def describe(self, component: Component, function: str = "", which: str = "") -> str:
        """A component, or one of its functions, with its plugin, for an error message."""
        registered = self._components[component.kind].get(component.name, [])
        provider = next((plugin for each, plugin in registered if each is component), None)  # None: not registered
        return describe(provider, component, function, which)

    def provider(self, component: Component) -> Plugin:
        """The plugin that provides a component."""
        registered = self._components[component.kind][component.name]
        return next(plugin for each, plugin in registered if each is component)

    def check_requires(self, component: Component) -> None:
        """Check that the packages that a component needs are installed.

        Raises:
            ConfigError: a package is not installed.
        """
        for package in component.requires:
            try:
                is_installed = importlib.util.find_spec(package) is not None
            except ModuleNotFoundError:  # a submodule of a package that is not installed
                is_installed = False
            if not is_installed:
                distribution = package.partition(".")[0]
                raise ConfigError(
                    f"{self.describe(component)} needs {package}, which is not installed: pip install {distribution}"
                )
