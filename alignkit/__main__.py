"""``python -m alignkit``, which is also what ``accelerate launch -m alignkit`` runs."""

from alignkit.cli import run

run()
