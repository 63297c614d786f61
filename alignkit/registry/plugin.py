"""Installed plugins, as the metadata of their distributions describe them. Nothing here imports one."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

GROUP = "alignkit"  # of entry points; also the name of the distribution that brings the built-in ones


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
        return self.distribution == GROUP

    def is_from(self, distribution: str) -> bool:
        """Whether the distribution of that name brings it."""
        return same(self.distribution, distribution)

    @property
    def provider(self) -> str:
        """``"alignkit-simpo 0.2"``."""
        return f"{self.distribution} {self.version}"

    def __str__(self) -> str:
        return f"plugin {self.name} ({self.provider})"

    @property
    def summary(self) -> str:
        """The line with which its distribution describes itself."""
        return str((self.entry_point.dist.metadata["Summary"] if self.entry_point.dist else None) or "")

    @property
    def built_for(self) -> str:
        """The versions of alignkit that its distribution asks for, such as ``">=0.1,<0.2"``; empty: any."""
        return ",".join(str(each.specifier) for each in self._requires() if each.name == GROUP)

    @property
    def missing(self) -> list[str]:
        """What its distribution requires and this environment lacks: ``"einops>=0.8, and 0.7 is installed"``."""
        found = []
        for each in self._requires():
            try:
                there = version(each.name)
            except PackageNotFoundError:
                found.append(f"{each}, which is not installed")
                continue
            if each.name != GROUP and not each.specifier.contains(there, prereleases=True):
                found.append(f"{each}, and {there} is installed")
        return found

    def _requires(self) -> list[Requirement]:
        """The requirements of its distribution that hold here, without those of extras."""
        from packaging.requirements import Requirement

        lines = (self.entry_point.dist.requires if self.entry_point.dist else None) or []
        every = map(Requirement, lines)
        return [each for each in every if not each.marker or each.marker.evaluate({"extra": ""})]


def installed() -> list[Plugin]:
    """Every installed plugin, sorted by name; reads metadata and imports nothing."""
    found = []
    for ep in entry_points(group=GROUP):
        distribution, version = (ep.dist.name, ep.dist.version) if ep.dist else ("?", "?")
        found.append(Plugin(ep.name, distribution, version, ep))
    return sorted(found, key=lambda p: (p.name, p.distribution))


def same(distribution: str, other: str) -> bool:
    """Whether two spellings name one distribution: ``alignkit_KTO`` is ``alignkit-kto``."""
    one, two = (re.sub(r"[-_.]+", "-", name).lower() for name in (distribution, other))
    return one == two


def bare(name: str) -> str:
    """``"muon"`` of ``"muon@alignkit-muon"``."""
    return name.partition("@")[0]


def culprit(error: BaseException) -> str | None:
    """``"plugin focal (alignkit-focal 0.1) failed in alignkit_focal.py line 8"``, where it was third-party code."""
    theirs = {plugin.entry_point.module.split(".")[0]: plugin for plugin in installed() if not plugin.builtin}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if plugin := theirs.get(str(frame.f_globals.get("__name__")).split(".")[0]):
            return f"{plugin} failed in {Path(frame.f_code.co_filename).name} line {line}"
    return None
