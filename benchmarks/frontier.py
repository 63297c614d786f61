"""Reward over KL of online and offline methods, and of the last ``PPOTrainer`` of TRL, on the sentiment task.

::

    pip install --no-deps --target trl-1.12 'trl==1.12.*'
    python benchmarks/frontier.py runs/frontier --trl trl-1.12
    python benchmarks/frontier.py runs/frontier --trl trl-1.12 --methods ppo trl --seeds 1

Run the same command again to continue: each run has a folder, a finished run is not repeated, and an unfinished run of
alignkit continues from its last checkpoint (TRL's PPO cannot be resumed and starts again). ``table.md`` and
``frontier.png`` in the output folder are written after each run.

All methods start from the same model and train a LoRA of the same shape. Online methods share learning rate, batch
size, iterations and KL coefficient. The others learn from one set of rankings: answers of the model that all start
from, ranked by the reward, about as many as an online run samples. Each run writes its policy several times. Every
policy answers the same held-out openings, and the same code computes reward and KL (see ``frontier_runs.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from frontier_runs import Method, evaluate, prepare, train

from alignkit.evaluation import standard_error

AT = (2.0, 5.0, 10.0)  # nats

PPO = {"minibatches": 4, "epochs": 2}
METHODS = {
    "ppo": Method("ppo", {**PPO, "value": "head", "lam": 1.0}),
    "ppo-8": Method("ppo", {**PPO, "value": "head", "lam": 1.0, "samples_per_prompt": 8}),
    "trl": Method(None, {**PPO, "lam": 1.0}),
    "grpo": Method("grpo", {**PPO, "samples_per_prompt": 8}),
    "rloo": Method("rloo", {**PPO, "samples_per_prompt": 8}, more={"loss": {"name": "grpo-clip"}}),
    "dpo": Method("dpo", train={"learning_rate": 2e-4}, more={"loss": {"beta": 0.05}}, online=False),
    "kto": Method("kto", train={"learning_rate": 2e-4}, more={"loss": {"beta": 0.05}}, online=False),
    "rahf": Method("rahf", {"contrast_share": 0.5}, train={"learning_rate": 2e-4}, online=False, begins=0.5),
}


class Point(NamedTuple):
    """Means over the answers of a policy, with their standard errors over openings."""

    kl: float
    score: float
    kl_error: float
    score_error: float


# --- the runs --------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, method: str, seed: int) -> None:
    """Train and evaluate in this process what is not done yet."""
    folder, start = run_folder(options, method, seed), options.folder / f"start-{seed}.jsonl"
    trained = folder / "trained"
    if not trained.exists():
        train(METHODS[method], options, folder, seed)
        trained.touch()
    if not start.exists():
        evaluate(options, None, seed, start)
    for number in range(1, options.points + 1):
        answers = folder / f"answers-{number}.jsonl"
        if not answers.exists():
            evaluate(options, folder / f"policy-{number}", seed, answers)


def run_folder(options: argparse.Namespace, method: str, seed: int) -> Path:
    return options.folder / f"{method}-{seed}"


def is_finished(options: argparse.Namespace, method: str, seed: int) -> bool:
    folder = run_folder(options, method, seed)
    return all((folder / f"answers-{number}.jsonl").exists() for number in range(1, options.points + 1))


def in_own_process(options: argparse.Namespace, *step: str) -> None:
    """Run this script again for one step, with its output in a file. TRL 1.12 is on the path of TRL's runs only."""
    log = options.folder / f"{'-'.join(step)}.log"
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if step[0] == "trl":
        environment["PYTHONPATH"] = os.pathsep.join([str(options.trl.absolute()), os.environ.get("PYTHONPATH", "")])
    with log.open("a", encoding="utf-8") as output:
        command = [sys.executable, *sys.argv, "--step", *step]
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(step)} failed, see {log}")


def check_settings(options: argparse.Namespace) -> None:
    """Refuse to mix runs with different settings in a folder."""
    file, other = options.folder / "settings.json", ("folder", "trl", "seeds", "methods", "step")
    methods = {name: dataclasses.asdict(METHODS[name]) for name in options.methods}
    settings = {name: value for name, value in vars(options).items() if name not in other}
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else settings
    for name, value in {**settings, **json.loads(json.dumps(methods))}.items():
        if known.setdefault(name, value) != value:
            sys.exit(f"{options.folder} has runs with {name} {known[name]}, not {value}: choose another folder")
    file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


# --- the frontier ----------------------------------------------------------------------------------------------------


def point(file: Path) -> Point:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    prompts = [row["prompt"] for row in rows]
    columns = [[row[name] for row in rows] for name in ("kl", "score")]
    return Point(*map(statistics.fmean, columns), *(standard_error(column, prompts) for column in columns))


def curve(options: argparse.Namespace, method: str, seed: int) -> list[Point]:
    """The points of a run, from the model that all runs start from."""
    files = [run_folder(options, method, seed) / f"answers-{n}.jsonl" for n in range(1, options.points + 1)]
    return [point(file) for file in (options.folder / f"start-{seed}.jsonl", *files)]


def score_at(kl: float, points: Sequence[Point]) -> float | None:
    """The score where a curve first reaches this KL, interpolated over its square root; None if it does not."""
    for before, after in itertools.pairwise(points):
        if before.kl <= kl < after.kl:
            low, x, high = (math.sqrt(max(each, 0.0)) for each in (before.kl, kl, after.kl))
            return before.score + (after.score - before.score) * (x - low) / (high - low)
    return None


def draw(file: Path, curves: Mapping[str, list[list[Point]]]) -> None:
    """Draw the means over seeds with their errors, and each run as a thin line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, runs) in enumerate(curves.items()):
        for points in runs:
            axes.plot([p.kl for p in points], [p.score for p in points], color=f"C{number}", linewidth=0.5, alpha=0.5)
        kl, score, kl_error, score_error = zip(*(of_seeds(points) for points in zip(*runs, strict=True)), strict=True)
        label = f"{name} ({len(runs)} seeds)"
        axes.errorbar(kl, score, score_error, kl_error, color=f"C{number}", fmt="o-", capsize=2, label=label)
    axes.set(xlabel="KL to the start, nats per answer", ylabel="reward (VADER)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


# --- the tables ------------------------------------------------------------------------------------------------------


def of_seeds(points: Sequence[Point]) -> Point:
    """The mean over seeds with standard errors over seeds; the error of one seed is that over openings."""
    if len(points) == 1:
        return points[0]
    kl, score = [point.kl for point in points], [point.score for point in points]
    return Point(statistics.fmean(kl), statistics.fmean(score), standard_error(kl), standard_error(score))


def tables(curves: Mapping[str, list[list[Point]]]) -> str:
    """The score of each method at some KLs, its distance from TRL's, and all points."""
    scores = {name: [reached(runs, kl) for kl in AT] for name, runs in curves.items()}
    at = [[name, *map(mean, columns)] for name, columns in scores.items()]
    trl = scores.get("trl", [])
    at += [
        [f"{name} - trl", *map(difference, columns, trl)] for name, columns in scores.items() if trl and name != "trl"
    ]
    points = [
        [name, str(len(runs)), str(number), f"{kl:.2f} ± {kl_error:.2f}", f"{score:.3f} ± {score_error:.3f}"]
        for name, runs in curves.items()
        for number, (kl, score, kl_error, score_error) in enumerate(map(of_seeds, zip(*runs, strict=True)))
    ]
    return (
        "Score at a KL of 2, 5 and 10 nats per answer, mean and standard error over seeds:\n\n"
        + markdown(["", *(f"{kl:g} nats" for kl in AT)], at)
        + "\nAll points, means over seeds; standard errors are over seeds, with one seed over openings:\n\n"
        + markdown(["", "seeds", "point", "KL", "score"], points)
    )


def reached(runs: Sequence[Sequence[Point]], kl: float) -> list[float]:
    """The scores at this KL of the runs that reached it."""
    return [score for points in runs if (score := score_at(kl, points)) is not None]


def mean(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f} (1 seed)" if values else "not reached"
    return f"{statistics.fmean(values):.3f} ± {standard_error(values):.3f} ({len(values)} seeds)"


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    if not values or not others:
        return ""
    text = f"{statistics.fmean(values) - statistics.fmean(others):+.3f}"
    if min(len(values), len(others)) < 2:
        return text
    return f"{text} ± {math.hypot(standard_error(values), standard_error(others)):.3f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- the command line ------------------------------------------------------------------------------------------------


def options_of_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the output folder")
    parser.add_argument("--trl", type=Path, help="a folder with TRL 1.12; without it TRL's PPO is left out")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="bundled:smollm2-135m", help="a folder, a hub id or a bundled name")
    parser.add_argument("--iterations", type=int, default=20, help="of online methods")
    parser.add_argument("--batch-size", type=int, default=64, help="answers per iteration")
    parser.add_argument("--response-length", type=int, default=16, help="maximum tokens of an answer")
    parser.add_argument("--kl-coef", type=float, default=0.02, help="KL coefficient of online methods")
    parser.add_argument("--answers", type=int, default=6, help="answers to each opening in the rankings")
    parser.add_argument("--points", type=int, default=6, help="policies of a run that are evaluated")
    parser.add_argument("--samples", type=int, default=8, help="answers to each held-out opening in an evaluation")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl is None and "trl" in (options.methods or []):
        parser.error("--methods trl needs --trl FOLDER")
    options.methods = options.methods or [name for name in METHODS if options.trl or name != "trl"]
    return options


def main() -> None:
    options = options_of_command_line()
    if options.step:
        name, *seed = options.step
        return run(options, name, int(seed[0])) if seed else prepare(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    check_settings(options)
    if not (options.folder / "rankings.jsonl").exists():
        in_own_process(options, "prepare")
    for seed, method in itertools.product(range(options.seeds), options.methods):
        if not is_finished(options, method, seed):
            print(f"{method}, seed {seed}", flush=True)
            in_own_process(options, method, str(seed))
        write_results(options)
    print((options.folder / "table.md").read_text(encoding="utf-8"))


def write_results(options: argparse.Namespace) -> None:
    """Write the table and the picture of all finished runs."""
    finished = {name: [seed for seed in range(options.seeds) if is_finished(options, name, seed)] for name in METHODS}
    curves = {name: [curve(options, name, seed) for seed in seeds] for name, seeds in finished.items() if seeds}
    (options.folder / "table.md").write_text(tables(curves), encoding="utf-8")
    draw(options.folder / "frontier.png", curves)


if __name__ == "__main__":
    main()
