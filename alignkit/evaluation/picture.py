"""The picture of ``alignkit compare``: a metric of each run over its KL to the first run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.runs import pictures


def draw(file: Path, rows: Sequence[dict[str, Any]], metric: str, label: str) -> None:
    """Draw the runs that have a metric, with its errors, as an SVG or a PNG. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(pictures.STYLE):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for row in rows:
            if row[metric] is not None:
                errors = {"xerr": row["kl_error"], "yerr": row[f"{metric}_error"]}
                axes.errorbar(row["kl"], row[metric], **errors, fmt="o", capsize=3, label=row["run"])
        axes.set_xlabel(f"KL to {rows[0]['run']} (nats per answer)")
        axes.set_ylabel(label)
        axes.legend()
        axes.grid(alpha=0.3)
        pictures.save(figure, file)
