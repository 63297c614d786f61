"""Plot the reward-KL curve of PPO runs from their ``metrics.jsonl``: ``python curve.py curve.png runs/*/ppo``."""

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

WINDOW = 3  # iterations per point


def points(run: Path) -> tuple[float, list[tuple[float, float]]]:
    """The KL coefficient of a run, and the mean KL and score of every window of iterations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    iterations = [line for line in lines if "kl_coef" in line]
    windows = [iterations[:1]] + [iterations[i : i + WINDOW] for i in range(1, len(iterations), WINDOW)]
    means = [tuple(sum(line[key] for line in window) / len(window) for key in ("kl", "score")) for window in windows]
    return iterations[0]["kl_coef"], means


def main(picture: str, *runs: str) -> None:
    curves = sorted(points(Path(run)) for run in runs)
    figure, axes = plt.subplots(figsize=(6, 4))
    print("kl_coef   KL at first -> last   score at first -> last")
    for kl_coef, means in curves:
        axes.plot(*zip(*means, strict=True), marker="o", label=f"β = {kl_coef:g}")
        (kl, score), (last_kl, last_score) = means[0], means[-1]
        print(f"{kl_coef:>7g}   {kl:>11.2f} -> {last_kl:<4.2f}   {score:>14.3f} -> {last_score:.3f}")
    axes.set(xlabel="KL to the reference, nats per answer", ylabel="score (VADER)")
    axes.legend()
    figure.savefig(picture, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main(*sys.argv[1:])
