"""The public names of each package: they can be imported, and importing a package imports nothing heavy."""

from __future__ import annotations

import ast
import gc
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import alignkit
from alignkit.lazy import lazy_imports, without_collections

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_after_an_import_as_before(collects: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with without_collections(), without_collections():
            assert not gc.isenabled()
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


def test_the_page_on_public_names_has_all_of_them_and_no_others() -> None:
    page = (ROOT / "docs" / "public-names.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (alignkit[\w.]*)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    cells = {package: re.findall(r"^\| (`.*?) \| .+ \|$", text, re.M) for package, text in sections.items()}
    listed = {package: re.findall(r"`(\w+)`", " ".join(names)) for package, names in cells.items()}

    assert {package: sorted(names) for package, names in listed.items()} == {p: sorted(public(p)) for p in PACKAGES}


def test_the_page_on_public_names_has_those_of_built_in_plugins() -> None:
    page = (ROOT / "docs" / "public-names.md").read_text(encoding="utf-8")

    assert set(re.findall(r"`(alignkit_\w+\.\w+)`", page)) == {f"{p}.{name}" for p in BUILT_IN for name in public(p)}


# --- who uses them ---------------------------------------------------------------------------------------------------

BUILT_IN = sorted(folder.name for folder in (ROOT / "plugins").glob("alignkit_*"))


INTERNALS = (
    "benchmarks/memory_measured.py",
    "benchmarks/tokenizing.py",
    "benchmarks/fuzz.py",
)  # they measure and test parts of the core


def _sources() -> dict[str, str]:
    """The Python that users read: built-in plugins, templates, examples, benchmarks and blocks in the docs."""
    files = [
        *ROOT.glob("plugins/*/*.py"),
        *ROOT.glob("alignkit/templates/*/*.py"),
        *(file for file in ROOT.glob("examples/**/*.py") if "tests" not in file.parts),
        *ROOT.glob("benchmarks/*.py"),
    ]
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
    sources = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}
    for page in pages:
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        code = enumerate(block for block in blocks if "import" in block)  # not a mere signature
        sources |= {f"{page.relative_to(ROOT)}-{number}": block for number, block in code}
    return {name: source for name, source in sources.items() if name not in INTERNALS}


SOURCES = _sources()


def private_names(source: str, own: str = "") -> list[str]:
    """What a file uses of alignkit and of built-in plugins, except ``own``, that is not in an ``__all__``."""
    used: list[tuple[str, str]] = []  # (package, name)
    packages = {}  # local name -> package
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages |= {each.asname or each.name: each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for each in node.names:
                if f"{node.module}.{each.name}" in PACKAGES:
                    packages[each.asname or each.name] = f"{node.module}.{each.name}"
                else:
                    used.append((node.module, each.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in packages:
            used.append((packages[ast.unparse(node.value)], node.attr))
    ours = [(package, name) for package, name in used if package.split(".")[0] in ("alignkit", *BUILT_IN)]
    return [
        f"{package}.{name}"
        for package, name in ours
        if package.split(".")[0] != own and (package not in (*PACKAGES, *BUILT_IN) or name not in public(package))
    ]


def public(package: str) -> list[str]:
    return list(getattr(importlib.import_module(package), "__all__", ()))


@pytest.mark.parametrize("name", SOURCES)
def test_code_that_users_read_uses_public_names_only(name: str) -> None:
    own = Path(name).parts[1] if name.startswith("plugins/") else ""

    assert private_names(SOURCES[name], own) == []


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("from alignkit.models import Roles, use_adapter", []),
        ("from alignkit import data\ndata.encode", []),
        ("import alignkit.data\nalignkit.data.encode", []),
        ("from alignkit.models.roles import Roles", ["alignkit.models.roles.Roles"]),
        ("from alignkit.models import adapters", ["alignkit.models.adapters"]),
        ("def f():\n    from alignkit.models import _inner", ["alignkit.models._inner"]),
        ("from alignkit import data\ndata.sources", ["alignkit.data.sources"]),
        ("import alignkit.data.sources as s\ns.x", ["alignkit.data.sources.x"]),
        ("from alignkit_sft.trainer import SFTTrainer", ["alignkit_sft.trainer.SFTTrainer"]),
    ],
)
def test_private_names_are_found(source: str, private: list[str]) -> None:
    assert private_names(source) == private
