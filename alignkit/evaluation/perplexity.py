"""Perplexity of policies on texts that they were not trained on: the price of alignment.

InstructGPT measures this "alignment tax" on public benchmarks (arXiv 2203.02155, section 4.2). Perplexity on held-out
demonstrations and on pretraining text takes seconds, and needs no benchmark. No torch at the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit import data
from alignkit.config import DataConfig
from alignkit.errors import AlignkitError, ConfigError, DataError
from alignkit.evaluation import comparison
from alignkit.registry import Registry
from alignkit.rows import Demonstration, Located, Text
from alignkit.runs import fingerprints, lineage, manifest
from alignkit.runs.lineage import Parent

if TYPE_CHECKING:
    from alignkit.generation.chat import LoadedModel


@dataclass(frozen=True)
class Source:
    """Rows to predict: all tokens of a text, the answers of a demonstration."""

    name: str
    rows: Sequence[Located]


@dataclass(frozen=True)
class Policy:
    """A policy to evaluate: that of a run, or the base model that the run started from."""

    run: Parent
    is_base: bool = False

    @property
    def name(self) -> str:
        """The run's folder, or the name of the base model."""
        return str(self.record["model"]["name"] if self.is_base else self.run.folder)

    @property
    def record(self) -> dict[str, Any]:
        """The manifest of the run."""
        assert self.run.manifest is not None
        return self.run.manifest


class Nll(NamedTuple):
    """The negative log-likelihood of each of N rows, in nats, and the tokens that it is a sum over."""

    sums: list[float]
    tokens: list[int]


def policies_of(paths: Sequence[str]) -> list[Policy]:
    """The finished policies in these folders; before a single one, what it started from: a run, or its base model.

    A run that is gone or was trained again is left out: the single one did not start from its weights.

    Raises:
        ConfigError: a folder is not a policy, or two runs differ in their tokens.
    """
    if len(paths) > 1:
        return [Policy(run) for run in comparison.runs_of(paths)]
    policy = Policy(lineage.named("evaluate", paths[0], "policy"))
    start = policy.record["parents"].get("policy")
    if start is None:
        return [Policy(policy.run, is_base=True), policy]
    folder = Path(start["folder"])
    if not manifest.is_run(folder) or fingerprints.weights(folder) != start["weights"]:
        return [policy]
    return [Policy(lineage.named("evaluate", start["folder"], "policy")), policy]


def sources_of(paths: Sequence[str], runs: Sequence[Parent], limit: int) -> list[Source]:
    """The rows of each file, at most ``limit``; without files, the demonstrations that a run or a parent held out.

    Raises:
        AlignkitError: a file has no texts or demonstrations; or there is none and no run was trained on demonstrations.
    """
    if paths:
        return [Source(path, _read(path, limit)) for path in paths]
    held_out = [source for run in runs for source in _held_out(run)]
    if not held_out:
        raise ConfigError("evaluate: none of the runs held out demonstrations. Add --data DATA")
    return [Source(held_out[0].name, held_out[0].rows[:limit])]


def _read(path: str, limit: int) -> Sequence[Located]:
    return data.load(Registry(), DataConfig(), path, (Demonstration, Text)).rows[:limit]


def _held_out(run: Parent) -> Iterator[Source]:
    """The rows of demonstrations or texts that a run, or one that it starts from, held out: the first such run's."""
    for each, _, rows in _rows_of_line(run):
        if rows and isinstance(rows[0].row, Demonstration | Text):
            yield Source(f"held out by {each.folder}", rows)
            return


def trained_on(source: Source, runs: Sequence[Parent]) -> int:
    """The number of a source's rows that one of these runs, or a parent, was trained on, as far as is known."""
    line = [(run, train) for first in runs for run, train, _ in _rows_of_line(first)]
    rows = {repr(row) for run, train in line for _, row in [*train, *_ptx_rows(run)]}
    return sum(repr(row) in rows for _, row in source.rows)


def _ptx_rows(run: Parent) -> Sequence[Located]:
    """The texts and demonstrations that PPO-ptx mixed into a run, if it has a file of its own for them."""
    assert run.manifest is not None
    settings = run.manifest["config"]["stages"][run.manifest["stage"]]
    if not settings.get("ptx_coef") or settings.get("ptx_data") is None:
        return []
    try:
        return data.load(Registry(), DataConfig(), settings["ptx_data"], (Demonstration, Text)).rows
    except AlignkitError:  # gone
        return []


def _rows_of_line(run: Parent) -> Iterator[tuple[Parent, Sequence[Located], Sequence[Located]]]:
    """A run, then the one that its policy starts from, and so on, each with its training rows and its held-out rows.

    A run whose data are gone or have changed has none.
    """
    record = run.manifest
    while record is not None:
        try:
            yield run, *comparison.rows_of(record)
        except AlignkitError:
            yield run, [], []
        start = record["parents"].get("policy")
        if start is None or not manifest.is_run(Path(start["folder"])):
            return
        run = lineage.named("evaluate", start["folder"], "policy")
        record = run.manifest


def opened(policy: Policy) -> LoadedModel:
    """A policy in memory, in the dtype in which the run was trained, with the run's tokenizer."""
    import torch

    from alignkit.data.chat_template import tokenizer_of_run
    from alignkit.generation.chat import LoadedModel
    from alignkit.models import adapters, run_device

    record, folder = policy.record, policy.run.folder
    load = adapters.open_base if policy.is_base else adapters.open_run
    model = load(folder, record, getattr(torch, record["dtype"]))
    return LoadedModel(model.to(run_device({})), tokenizer_of_run(folder, record), record["stop_ids"])


def measure(model: LoadedModel, source: Source, batch: int, advance: Callable[[int], None]) -> Nll:
    """The negative log-likelihood of a source's rows under a model, at temperature 1.

    Raises:
        DataError: a row has no token to predict, or is longer than the model can read.
    """
    import torch

    from alignkit.models import fused_logps, install_fused_head
    from alignkit.runs import base

    install_fused_head(model.model)
    encoded = [_encoded(model, located) for located in source.rows]
    sequences = [(number, *sequence) for number, of_row in enumerate(encoded) for sequence in of_row]
    sequences.sort(key=lambda sequence: len(sequence[1]))  # rows of similar length share a batch
    sums, tokens = [0.0] * len(encoded), [0] * len(encoded)
    remaining = set(range(len(encoded)))
    for start in range(0, len(sequences), batch):
        part = sequences[start : start + batch]
        width = len(part[-1][1])
        base.check_length(model.model, width, f"a row of {source.name}", "Leave it out")
        inputs = _padded([(ids, labels) for _, ids, labels in part], width, model.tokenizer.pad_token_id)
        with torch.no_grad():
            output = fused_logps(model.model, {name: t.to(model.model.device) for name, t in inputs.items()})
        of_part = zip(part, output.log_probs.double().sum(1).tolist(), output.label_mask.sum(1).tolist(), strict=True)
        for (number, _, _), logp, count in of_part:
            sums[number] -= logp
            tokens[number] += count
        done = remaining & {number for number, _, _ in part}
        remaining -= done
        advance(len(done))
    return Nll(sums, tokens)


def _encoded(model: LoadedModel, located: Located) -> list[tuple[list[int], list[int]]]:
    where, row = located
    assert isinstance(row, Demonstration | Text)
    sequences = data.encode(model.tokenizer, row, model.stop_ids)
    if all(label == data.IGNORE for _, labels in sequences for label in labels[1:]):
        raise DataError(f"{where}: the row has no token to predict. Remove it")
    return sequences


def _padded(sequences: Sequence[tuple[list[int], list[int]]], width: int, pad: int) -> dict[str, Any]:
    import torch

    def rows(parts: Sequence[list[int]], fill: int) -> Any:
        return torch.tensor([part + [fill] * (width - len(part)) for part in parts])

    ids, labels = [ids for ids, _ in sequences], [labels for _, labels in sequences]
    mask = rows([[1] * len(part) for part in ids], 0)
    return {"input_ids": rows(ids, pad), "attention_mask": mask, "labels": rows(labels, data.IGNORE)}


def metrics(nll: Nll, first: Nll | None) -> dict[str, float | None]:
    """Perplexity, nats per token, and the difference to the first run's nats per token, with standard errors.

    Each mean is over tokens, and its error over rows, because the tokens of a row are not independent. The difference
    is paired: its error is of the differences of the same rows.
    """
    loss, error = _ratio(nll.sums, nll.tokens)
    perplexity = math.exp(min(loss, 700))  # a diverged model has more than fits into a float
    row = {"perplexity": perplexity, "perplexity_error": None if error is None else perplexity * error}
    row |= {"nats_per_token": loss, "nats_per_token_error": error, "difference": None, "difference_error": None}
    if first is not None:
        differences = [own - other for own, other in zip(nll.sums, first.sums, strict=True)]
        row["difference"], row["difference_error"] = _ratio(differences, nll.tokens)
    return {**row, "rows": len(nll.tokens), "tokens": sum(nll.tokens)}


def _ratio(sums: Sequence[float], tokens: Sequence[int]) -> tuple[float, float | None]:
    """The sum of ``sums`` divided by that of ``tokens``, and its standard error over rows (of a ratio estimator)."""
    total, count = sum(tokens), len(sums)
    ratio = math.fsum(sums) / total
    if count < 2:
        return ratio, None
    residuals = math.fsum((each - ratio * size) ** 2 for each, size in zip(sums, tokens, strict=True))
    return ratio, math.sqrt(residuals * count / (count - 1)) / total
