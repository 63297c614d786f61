"""The page on the architecture is true: its wings are the packages, in the order that import-linter holds."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_wings_on_the_page_are_the_layers_that_are_held() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    drawn = [line.split()[0] for line in PAGE.split("```")[1].strip().splitlines()]
    wings = [layer.removeprefix("alignkit.") for layer in layers]

    assert drawn[:-1] == wings[: len(drawn) - 1]
    packages = {path.parent.name for path in (ROOT / "alignkit").glob("*/__init__.py")}
    assert packages == set(drawn[:-1])


def test_the_wings_that_import_torch_are_those_that_ruff_allows() -> None:
    allowed = re.search(r'"alignkit/\{([\w,]+)\}/\*\.py" = \["TID253"\]', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert allowed is not None
    marked = {line.split()[0] for line in PAGE.split("```")[1].splitlines() if line.endswith(" torch")}

    assert marked == set(allowed[1].split(","))


def modules(root: str) -> dict[Path, str]:
    """Each file of Python under a folder, and its module."""
    files = sorted((ROOT / root).rglob("*.py"))
    parts = {file: file.relative_to(ROOT / root).with_suffix("").parts for file in files}
    return {file: ".".join(part for part in path if part != "__init__") for file, path in parts.items()}


def test_only_the_wings_marked_torch_import_it_and_plugins_do_not_when_they_are_declared() -> None:
    """In one process, one module after another, so that the first one that imports something heavy is named."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    heavy = config["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"]
    marked = {line.split()[0] for line in PAGE.split("```")[1].splitlines() if line.endswith(" torch")}
    examples = [str(path) for path in (ROOT / "examples" / "plugins").iterdir()]
    left_out = marked | {"", "__main__", "templates"}
    core = [f"alignkit.{module}" for module in modules("alignkit").values() if module.split(".")[0] not in left_out]
    declared = [
        module
        for folder in ["plugins", *examples]
        for file, module in modules(folder).items()
        if module.startswith("alignkit_") and (module.count(".") == 0 or file.stem == "config")
    ]
    assert len(core) > 50
    assert len(declared) > 15
    code = (
        "import importlib, sys; sys.path += sys.argv[1].split()\n"
        "for module in sys.argv[2:]:\n"
        "    importlib.import_module(module)\n"
        f"    heavy = [name for name in {heavy} if name in sys.modules]\n"
        "    assert not heavy, f'{module} imports {heavy}'"
    )

    done = subprocess.run([sys.executable, "-c", code, " ".join(examples), *core, *declared], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_files_on_the_page_are_there() -> None:
    links = re.findall(r"\]\((\.\./[^)#]+)\)", PAGE)

    assert len(links) > 20
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_no_file_is_longer_than_350_lines_without_a_reason_in_its_docstring() -> None:
    """A longer file usually has two ideas. One that does not says so: ``Over 350 lines: ...``."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.splitlines()] or list(ROOT.rglob("*.py"))  # an unpacked archive
    long = {file.relative_to(ROOT) for file in files if file.exists() and file.read_text("utf-8").count("\n") > 350}

    assert {file for file in long if "Over 350 lines: " not in (ROOT / file).read_text("utf-8")[:1500]} == set()
