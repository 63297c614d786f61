"""``python -m alignkit``, which is also what ``torchrun -m alignkit`` runs."""

from alignkit.cli import run

run()
