"""The notebook in ``examples/`` runs from top to bottom, and is stored without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from alignkit.cli import main

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook.ipynb"

RUN_CELLS = """
import ast, json, linecache, sys

scope = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    file = f"<cell {number}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, file, "exec"), scope)
    if last is not None:
        print(f"Out[{number}]: {eval(compile(last, file, 'eval'), scope)!r}")
"""


def test_the_notebook_runs_from_top_to_bottom(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Its cells in order, in a Python process, on a tiny model."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    model = repr(str(tiny_model("llama")))
    assert '"bundled:smollm2-135m"' in sources[0]
    sources = [source.replace('"bundled:smollm2-135m"', model) for source in sources]

    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:alignkit", "-c", RUN_CELLS],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "right of runs/notebook/ppo: " in done.stdout
    assert "stage  sft" in done.stdout
    manifest = json.loads((tmp_path / "runs/notebook/ppo/alignkit.json").read_text())
    assert manifest["in_memory"]["brevity"]["source"].startswith("def brevity(prompts, answers):")
    assert main(["show", str(tmp_path / "runs/notebook/ppo")]) == 0


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]

    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert notebook["nbformat"] == 4
