"""MkDocs hook: a page for each package with public names, made of their docstrings."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
SECTION = "Python API"  # of the navigation
ROLE = re.compile(r":\w+:(?=`)")  # of reStructuredText, as in :func:`encode`


class PlainCode(griffe.Extension):
    """Shows references to functions and classes in docstrings as code. An extension of Griffe in ``mkdocs.yml``."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub("", obj.docstring.value)


def on_config(config: Any) -> Any:
    """Add the pages to the navigation."""
    section = next(pages for entry in config.nav for name, pages in entry.items() if name == SECTION)
    section += [{package: f"api/{package}.md"} for package in _packages()]
    return config


def on_files(files: Files, config: Any) -> Files:
    for name, package in _packages().items():
        files.append(File.generated(config, f"api/{name}.md", content=_page(package)))
    return files


@functools.cache
def _packages() -> dict[str, griffe.Module]:
    """The packages of alignkit with an ``__all__``, by name. Nothing is imported."""
    root = griffe.load("alignkit", search_paths=[ROOT], resolve_aliases=True)
    packages = [root, *(each for each in root.modules.values() if each.is_init_module)]
    return {package.path: package for package in sorted(packages, key=lambda each: each.path) if package.exports}


def _page(package: griffe.Module) -> str:
    names = sorted(map(str, package.exports or ()), key=str.lower)
    return "\n".join([f"# {package.path}\n", *(_section(package, name) for name in names)])


def _section(package: griffe.Module, name: str) -> str:
    try:
        path = package[name].canonical_path
    except griffe.AliasResolutionError as error:
        path = error.alias.target_path
    is_ours = path.split(".")[0] == package.path.split(".")[0]
    return f"::: {package.path}.{name}\n" if is_ours else f"## {name}\n\n`{path}`, as it is.\n"
