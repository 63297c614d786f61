"""The public names of each package: they can be imported, and importing a package imports nothing heavy."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import alignkit
from alignkit.lazy import lazy_imports

PACKAGES = [
    "alignkit",
    *(f"alignkit.{module.name}" for module in pkgutil.iter_modules(alignkit.__path__) if module.ispkg),
]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_can_be_imported_and_is_not_hidden_by_a_module(package: str) -> None:
    """A module `generation/sample.py` would hide the function of that name once it is imported."""
    wing = importlib.import_module(package)
    if package != "alignkit":
        for module in pkgutil.iter_modules(wing.__path__):
            importlib.import_module(f"{package}.{module.name}")
    values = {name: getattr(wing, name) for name in wing.__all__}

    assert [name for name, value in values.items() if isinstance(value, ModuleType)] == []
    assert len(set(wing.__all__)) == len(wing.__all__)
    assert set(wing.__all__) <= set(dir(wing))


def test_importing_the_packages_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "jinja2")
    code = f"import sys, {', '.join(PACKAGES)}; print([name for name in {heavy} if name in sys.modules])"

    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_a_name_that_is_not_public_is_an_error() -> None:
    get, _ = lazy_imports("alignkit.models", importlib.import_module("alignkit.models").__file__ or "")

    with pytest.raises(AttributeError, match=r"module 'alignkit.models' has no attribute 'nothing'"):
        get("nothing")
