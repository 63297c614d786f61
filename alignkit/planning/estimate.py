"""The memory that a run will take: its stage's own trainer takes a few steps on tensors without data.

Importing this module imports torch.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from alignkit.errors import AlignkitError, DataError
from alignkit.generation import sampling
from alignkit.models import device_and_dtype, logit_form, shared_prompt
from alignkit.planning import cuda, per_process
from alignkit.planning.ledger import Ledger, size_of
from alignkit.planning.phantoms import Copies, Phantoms, moves
from alignkit.planning.planned_run import PlannedRun
from alignkit.planning.repeated import RepeatedLayers
from alignkit.planning.replaced import replaced
from alignkit.planning.weightless import without_weights
from alignkit.registry import checks
from alignkit.rows import Located
from alignkit.runs import row_checks
from alignkit.runs.plan import Plan

PHASES = ("sampling", "scoring", "training", "optimizer step")
PASSES = 8  # of a microbatch that a stage splits into several forward passes
MEASURED = 64  # rows with the most characters, whose tokens are counted


class Memory(NamedTuple):
    """The bytes that a run takes at its peak."""

    phases: Mapping[str, Mapping[str, int]]  # phase, such as "sampling" or "training" -> part -> bytes at its peak
    overhead: int  # of CUDA and its allocator, an estimate; 0 on a CPU
    device: str  # "cpu" or "cuda"
    dtype: str  # in which models compute, such as "bfloat16"

    @property
    def tensors(self) -> int:
        """The bytes of all tensors in the phase that needs most, which ``torch.cuda.max_memory_allocated`` measures."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def peak(self) -> int:
        """The bytes that the device must have: :attr:`tensors` and :attr:`overhead`."""
        return self.tensors + self.overhead


def memory(plan: Plan, device: str | None = None, gpu_memory: int | None = None, processes: int = 1) -> Memory:
    """The memory of a run, or of each of its ``processes``.

    No weights are loaded: the base model may be a folder with a config and a tokenizer only. The stage's trainer is
    built on the longest rows of the data, and trains for two steps.

    Args:
        plan: the run.
        device: ``"cuda"`` or ``"cpu"``; None: where the run would train on this machine.
        gpu_memory: bytes of the GPU, on which the number of logits in memory at a time depends; None: of the GPU of
            this machine, or 24 GiB.
        processes: how many processes train it.

    Raises:
        AlignkitError: the run cannot be planned, for a reason that would stop it too.
    """
    plan = per_process.share_of(plan, processes)
    kind = device or device_and_dtype.run_device(plan.config.train).type
    dtype = _dtype(plan.config.train, kind)
    ledger = Phantoms()
    with tempfile.TemporaryDirectory() as folder, ledger:
        run = PlannedRun(plan, Path(folder), dtype, ledger)
        run.train_rows, run.eval_rows = longest_rows(run), []
        run.microbatch = _rows_of_passes(run)
        of_device = cuda.as_on_cuda(gpu_memory) if kind == "cuda" else contextlib.nullcontext()
        shared = replaced(shared_prompt, agrees=lambda *_: True)  # tensors without data do not show it
        decoded = replaced(sampling, distance=lambda *_: 0.0)  # nor whether two ways to sample agree
        measured = replaced(logit_form, measure=functools.partial(_measure_form, ledger, logit_form.measure))
        with without_weights(run.planned), moves(), shared, decoded, measured, of_device:
            phases = rehearse(run, kind, processes)
    tensors = max(sum(parts.values()) for parts in phases.values())
    overhead = cuda.overhead(tensors) if kind == "cuda" else 0
    return Memory(phases, overhead, kind, str(dtype).removeprefix("torch."))


def rehearse(run: PlannedRun, kind: str, processes: int = 1) -> dict[str, dict[str, int]]:
    """Build the trainer of a run and take its steps, as on a device of this kind.

    Returns the bytes of each part at the peak of each phase.
    """
    ledger, stage = run.ledger, run.config.stage.component
    with Copies():
        trainer: Any = checks.trainer(run.registry.describe(stage, "build"), stage.build(run))
    trainer.remove_callback(transformers.PrinterCallback)
    gc.collect()  # what was needed to build it
    if kind == "cuda" and run.dtype is not torch.float32:
        cuda.share_inputs(trainer.model)
    kept = ledger.now
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]

    def described() -> dict[str, int]:
        weights = size_of(trained)
        return {
            "frozen weights": kept - weights,
            "trained weights": weights,
            "gradients": size_of(p.grad for p in trained if p.grad is not None),
            "optimizer states": size_of(states_of(trainer.optimizer)) if trainer.optimizer else 0,
        }

    ledger.described = described
    _watch(trainer, run)
    try:
        with warnings.catch_warnings(), RepeatedLayers(ledger).active(trainer.model):
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # it identifies them
            trainer.train()
    finally:
        ledger.described = dict  # tensors that libraries keep refer to the ledger, which would keep the trainer
    if sampled := ledger.phases.get("sampling"):
        cache = min(run.cache, sampled[ledger.other])
        sampled |= {"key-value cache": cache, ledger.other: sampled[ledger.other] - cache}
    phases = ledger.phases
    if run.config.train.get("shard"):
        phases = per_process.sharded(phases, trainer, processes)
    elif processes > 1:
        phases = {name: {**parts, "DDP buckets": size_of(trained)} for name, parts in phases.items()}  # of gradients
    workspaces = {"cuBLAS workspaces": cuda.cublas_workspaces()} if kind == "cuda" else {}
    return {name: {**phases[name], **workspaces} for name in PHASES if name in phases}


def _measure_form(ledger: Ledger, measure: Callable[[Any], Any], model: Any) -> Any:
    with RepeatedLayers(ledger).active(model):  # it takes some forward passes
        return measure(model)


def states_of(optimizer: Any) -> Iterator[torch.Tensor]:
    """The tensors in the states of an optimizer, which may be wrapped by accelerate."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return (each for state in inner.state.values() for each in state.values() if isinstance(each, torch.Tensor))


def _watch(trainer: Any, run: PlannedRun) -> None:
    """Have the trainer's steps counted as phases, and take two microbatches of the first step and one of the second.

    The second microbatch has the gradients of the first, the second step the states of the optimizer.
    """
    ledger, training_step, get_batches, taken = run.ledger, trainer.training_step, trainer.get_batch_samples, 0

    def step(*arguments: Any, **keywords: Any) -> Any:
        nonlocal taken
        number, taken = taken, taken + 1
        limit = 2 if trainer.state.global_step == 0 else trainer.args.gradient_accumulation_steps + 1
        if number >= limit:
            return torch.zeros(())
        with ledger.phase("training"):
            if run.config.train.get("shard") and trainer.args.gradient_accumulation_steps == 1:
                training_step(*arguments, **keywords)  # so that all gradients exist when activations are at their peak
            return training_step(*arguments, **keywords)

    def batches(*arguments: Any, **keywords: Any) -> Any:
        with ledger.phase("scoring"):  # all that is neither sampling nor training
            return get_batches(*arguments, **keywords)

    trainer.training_step = step
    if run.config.stage.component.uses:
        trainer.get_batch_samples = batches
    trainer.add_callback(_OptimizerSteps(ledger))


class _OptimizerSteps(transformers.TrainerCallback):
    """Counts the steps of the optimizer as a phase. From the first one on, every phase has its states."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.phase = self.ledger.phase("optimizer step")
        self.phase.__enter__()

    def on_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.phase.__exit__(None, None, None)
        states = size_of(states_of(optimizer))
        for parts in self.ledger.phases.values():
            parts.setdefault("optimizer states", states)


def longest_rows(run: PlannedRun) -> list[Located]:
    """The longest training rows, as often as a few steps need.

    Raises:
        AlignkitError: there is no row that the stage can train on.
    """
    config = run.config
    most = getattr(config.stage.config, "max_length", None)
    skips = getattr(config.stage.config, "too_long", None) == "skip"
    measured = list[tuple[int, Located]]()
    for located in _by_characters(run.train_rows):
        with contextlib.suppress(DataError):  # a row that training leaves out
            length = max(row_checks.lengths_of(config, run.tokenizer, located.row), default=0)
            if not (skips and most and length > most):
                measured.append((length, located))
        if len(measured) == max(MEASURED, _rows_of_batch(config)):
            break
    if not measured:
        raise AlignkitError("there is no row that the stage can train on")
    measured.sort(key=lambda each: each[0], reverse=True)
    samples = getattr(config.stage.config, "batch_size", None)  # of a stage that samples: its batch is of all rows
    if samples:
        return [located for _, located in measured[:samples]]
    rows = [located for _, located in measured]
    in_sequence = -(-most // max(1, measured[0][0])) if most and getattr(config.stage.config, "packing", False) else 1
    needed = 3 * _rows_of_batch(config) * in_sequence
    return rows * max(1, -(-needed // len(rows)))


def _rows_of_passes(run: PlannedRun) -> int | None:
    """The rows of a microbatch that take several forward passes, if the stage splits larger microbatches.

    More passes of a microbatch need no more memory.
    """
    if (limit := getattr(run.config.stage.config, "forward_tokens", None)) is None:
        return None
    rows = run.train_rows[: _rows_of_batch(run.config)]
    tokens = itertools.accumulate(sum(row_checks.lengths_of(run.config, run.tokenizer, row)) for _, row in rows)
    return next((number for number, total in enumerate(tokens, 1) if total >= PASSES * limit), len(rows))


def _by_characters(rows: Sequence[Located]) -> Iterator[Located]:
    """Rows by their length in characters, the longest first; of rated answers, good and bad ones in turn."""
    by_length = sorted(rows, key=lambda each: len(repr(each.row)), reverse=True)
    good = [each for each in by_length if getattr(each.row, "good", True)]
    bad = [each for each in by_length if not getattr(each.row, "good", True)]
    return (each for both in itertools.zip_longest(good, bad) for each in both if each is not None)


def _rows_of_batch(config: Any) -> int:
    """The rows of a microbatch, or of the batch of a stage that samples."""
    batch = getattr(config.stage.config, "batch_size", None)
    return int(batch or config.train.get("per_device_train_batch_size", 8))


def _dtype(train: Mapping[str, Any], kind: str) -> torch.dtype:
    """The dtype of the run; on a GPU that is not at hand, bf16."""
    if kind == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16 if train.get("bf16", True) or train.get("fp16") else torch.float32
    dtype = device_and_dtype.run_dtype({**train, **({"use_cpu": True} if kind == "cpu" else {})})
    return torch.bfloat16 if dtype is torch.float16 else dtype  # as many bytes
