"""Installed plugins, as described by package metadata. Nothing here imports a plugin."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packaging.requirements import Requirement

GROUP = "alignkit"  # the entry point group, and the distribution of the built-in plugins
IN_MEMORY = "in-memory-"  # begins the distribution of a plugin that a Python session registered


@dataclass(frozen=True)
class Plugin:
    """An installed plugin, as described by the metadata of its distribution. It may not be imported."""

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint

    @property
    def builtin(self) -> bool:
        """Whether it is part of alignkit."""
        return self.distribution == GROUP

    def is_from(self, distribution: str) -> bool:
        """Whether it belongs to that distribution."""
        return same_distribution(self.distribution, distribution)

    @property
    def provider(self) -> str:
        """Its distribution and version: ``"alignkit-simpo 0.2"``."""
        return f"{self.distribution} {self.version}"

    def __str__(self) -> str:
        return f"plugin {self.name} ({self.provider})"

    def load(self) -> Any:
        """Import it: the module or the object that implements its hooks."""
        return self.entry_point.load()

    @property
    def remedy(self) -> str:
        """Advice if it cannot be used."""
        return f"Reinstall or remove {self.distribution}, or run without --plugin {self.name}"

    @property
    def summary(self) -> str:
        """The summary of its distribution."""
        return str((self.entry_point.dist.metadata["Summary"] if self.entry_point.dist else None) or "")

    @property
    def built_for(self) -> str:
        """The versions of alignkit that its distribution requires, such as ``">=0.1,<0.2"``. Empty: any."""
        return ",".join(str(each.specifier) for each in self._requires() if each.name == GROUP)

    @property
    def missing(self) -> list[str]:
        """Requirements of its distribution that are not met: ``"einops>=0.8 (installed: 0.7)"``."""
        unmet = []
        for requirement in self._requires():
            try:
                present = version(requirement.name)
            except PackageNotFoundError:
                unmet.append(f"{requirement} (not installed)")
                continue
            if requirement.name != GROUP and not requirement.specifier.contains(present, prereleases=True):
                unmet.append(f"{requirement} (installed: {present})")
        return unmet

    def _requires(self) -> list[Requirement]:
        """The requirements of its distribution on this platform, without those of extras."""
        from packaging.requirements import Requirement

        lines = (self.entry_point.dist.requires if self.entry_point.dist else None) or []
        requirements = map(Requirement, lines)
        return [each for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})]


registered: dict[tuple[str, str], Plugin] = {}  # in memory, by name and distribution


def installed() -> list[Plugin]:
    """All installed plugins, and those in memory, sorted by name. Reads metadata only."""
    plugins = list(registered.values())
    named: dict[int, tuple[str, str]] = {}  # each distribution is asked once: it parses its metadata at every access
    for ep in entry_points(group=GROUP):
        if id(ep.dist) not in named:
            named[id(ep.dist)] = (ep.dist.name, ep.dist.version) if ep.dist else ("?", "?")
        plugins.append(Plugin(ep.name, *named[id(ep.dist)], ep))
    return sorted(plugins, key=lambda p: (p.name, p.distribution))


def same_distribution(distribution: str, other: str) -> bool:
    """Whether two spellings are the same distribution: ``alignkit_Muon`` is ``alignkit-muon``."""
    first, second = (re.sub(r"[-_.]+", "-", name).lower() for name in (distribution, other))
    return first == second


def in_memory(names: Iterable[str]) -> list[str]:
    """The names of plugins in memory among those in a config."""
    return [plugin_name(name) for name in names if name.partition("@")[2].startswith(IN_MEMORY)]


def plugin_name(name: str) -> str:
    """The name without a distribution: ``"muon"`` for ``"muon@alignkit-muon"``."""
    return name.partition("@")[0]
