"""The page on the architecture is true: its wings are the packages, in the order that import-linter holds."""

from __future__ import annotations

import re
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


def test_the_files_on_the_page_are_there() -> None:
    links = re.findall(r"\]\((\.\./[^)#]+)\)", PAGE)

    assert len(links) > 20
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
