"""MkDocs hook: a page for each package with public names, made of their docstrings."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from mkdocs.structure.files import File, Files

import alignkit

SECTION = "Python API"  # of the navigation


def on_config(config: Any) -> Any:
    """Add the pages to the navigation."""
    section = next(pages for entry in config.nav for name, pages in entry.items() if name == SECTION)
    section += [{package: f"api/{package}.md"} for package in packages()]
    return config


def on_files(files: Files, config: Any) -> Files:
    for package in packages():
        files.append(File.generated(config, f"api/{package}.md", content=_page(package)))
    return files


def packages() -> list[str]:
    """The packages of alignkit with an ``__all__``."""
    names = ["alignkit", *(f"alignkit.{each.name}" for each in pkgutil.iter_modules(alignkit.__path__) if each.ispkg)]
    return [name for name in names if hasattr(importlib.import_module(name), "__all__")]


def _page(package: str) -> str:
    names = sorted(importlib.import_module(package).__all__, key=str.lower)
    return "\n".join([f"# {package}\n", *(f"::: {package}.{name}\n" for name in names)])
