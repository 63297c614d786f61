"""Write a run as a model folder, load it again, and compare it with the run. No torch at the top."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit.errors import AlignkitError, ConfigError, did_you_mean, one_line
from alignkit.exporting import card, comparing, source
from alignkit.exporting.comparing import Difference, Texts
from alignkit.runs.lineage import Parent

if TYPE_CHECKING:
    from torch import Tensor

# The largest KL, and the largest difference of a score, that rounding the weights explains. A wrong merge differs by
# much more: what training changed would be missing, or be there twice.
KL_TOLERANCES = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-2}
SCORE_TOLERANCES = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 0.3}
SHARE_OF_TRAINING = 0.1  # a warning is printed if the export differs by more of the KL that training made
BASES = ("run", "original")


class Exported(NamedTuple):
    """A finished export, and how it differs from the run on texts that the run held out.

    Both compute in fp32, so that the figures are those of the weights.
    """

    folder: Path
    largest_difference: float  # of a log-probability of any token; for a reward model, of a score
    kl: float | None  # of the run from the export, nats per token; None for a reward model
    greedy_agreement: float | None  # the share of positions with the same most likely token; None for a reward model


def export(
    run: Path,
    to: Path,
    *,
    dtype: str = "bfloat16",
    base: str = "run",
    max_shard_size: str = "5GB",
    say: Callable[[str], None] = print,
) -> Exported:
    """Write the policy or the reward model of a finished run to the new folder ``to``, which plain Transformers opens.

    Args:
        run: the run folder.
        to: the folder to write. It appears when it is complete and was compared with the run.
        dtype: the dtype of the weights: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        base: what an adapter is merged into. ``"run"`` is the base as it was in training, dequantized if it was
            quantized. ``"original"`` is the base as its files have it.
        max_shard_size: the largest size of a file of weights, such as ``"5GB"``.
        say: prints a line for the user.

    Raises:
        AlignkitError: the run cannot be exported, ``to`` exists or cannot be written, or what was written differs from
            the run by more than rounding explains.
    """
    record = source.read(run)
    _check_options(record, to, dtype, base, max_shard_size)
    from alignkit.models.transformers_internals import loading_in_turn

    with _new_folder(to) as folder, loading_in_turn():
        difference = _write(run, record, folder, dtype, base, max_shard_size, say)
    return Exported(to, difference.largest, difference.kl, difference.greedy_agreement)


def _check_options(record: dict[str, Any], to: Path, dtype: str, base: str, max_shard_size: str) -> None:
    for option, value, known in (("dtype", dtype, list(KL_TOLERANCES)), ("base", base, list(BASES))):
        if value not in known:
            raise ConfigError(f"export: no {option} '{value}'.{did_you_mean(value, known)} Choose {' or '.join(known)}")
    if not re.fullmatch(r"\d+(\.\d+)?[KMG]i?B", str(max_shard_size)):
        raise ConfigError(f"export: '{max_shard_size}' is not a size. Write it like 5GB or 500MB")
    if base == "original" and record["weights"] == "model":
        raise ConfigError("export: the run is a full model, which has no base to merge into. Remove --base original")
    if os.path.lexists(to):
        raise ConfigError(f"export: {to} exists. Remove it, or name another folder")


@contextlib.contextmanager
def _new_folder(to: Path) -> Iterator[Path]:
    """A temporary folder beside ``to``, which becomes ``to`` in the end. After an error, nothing is left."""
    beside = next(parent for parent in to.absolute().parents if parent.is_dir())
    folder = beside / f".{to.name}.{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
        to.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, to)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(
    run: Path,
    record: dict[str, Any],
    folder: Path,
    dtype: str,
    base: str,
    max_shard_size: str,
    say: Callable[[str], None],
) -> Difference:
    """Write the model into ``folder``, and compare it with the run."""
    import torch

    from alignkit.data.chat_template import tokenizer_of_run
    from alignkit.models import memory, plain

    tokenizer = tokenizer_of_run(run, record)
    model = plain.open_stored(run, record)
    texts = comparing.texts_of(Parent(record["stage"], run, record), model, tokenizer)
    of_run = expected = comparing.outputs(model, texts)
    of_base = _outputs_of_base(model, texts)
    if base == "original":
        del model
        gc.collect()
        model = plain.open_on_original(run, record)
        expected = comparing.outputs(model, texts)
    memory.release_freed()  # what computing the outputs took
    model = plain.to_plain(model, run, record, getattr(torch, dtype))
    _save(model, tokenizer, record, folder, max_shard_size)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    del model
    gc.collect()
    reopened = comparing.outputs(plain.open_plain(folder, record), texts)
    difference = comparing.difference(of_run, reopened)
    _check(comparing.difference(expected, reopened), dtype)
    trained = comparing.difference(of_run, of_base).kl if of_base else None
    _check_trained(difference, comparing.difference(of_base, reopened) if of_base else None)
    how = {"dtype": dtype, "base": base, "max_shard_size": max_shard_size, "texts": texts.source}
    card.write(folder, run, record, {**how, "adapter": record["weights"] == "adapter", **difference._asdict()})
    say(f"exported   {record['role']} of {run} in {dtype}, {size / 1e6:,.0f} MB")
    say(f"compared   {comparing.describe(difference, texts.source)}")
    if trained is not None and difference.kl is not None and difference.kl > SHARE_OF_TRAINING * trained:
        say(
            f"warning: this differs from the run by a KL of {difference.kl:.2g}, and training moved the run by "
            f"{trained:.2g}. Use --dtype float32 to keep all of it"
        )
    return difference


def _outputs_of_base(model: Any, texts: Texts) -> list[Tensor] | None:
    """The outputs of a model without its adapter. None for a model that has none."""
    if not hasattr(model, "disable_adapter"):
        return None
    with model.disable_adapter():
        return comparing.outputs(model, texts)


def _save(model: Any, tokenizer: Any, record: dict[str, Any], folder: Path, max_shard_size: str) -> None:
    from safetensors import SafetensorError
    from transformers import GenerationConfig

    if record["role"] == "policy":  # only what the run uses: it knows no repetition penalty
        model.generation_config = GenerationConfig(
            eos_token_id=record["stop_ids"], pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
        )
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise AlignkitError(f"export: the model cannot be written: {one_line(error)}") from error


def _check(difference: Difference, dtype: str) -> None:
    """Check that rounding explains how the export differs from what it should be.

    Raises:
        AlignkitError: it does not.
    """
    if difference.kl is None:
        name, value, tolerance = "a score", difference.largest, SCORE_TOLERANCES[dtype]
    else:
        name, value, tolerance = "the KL", difference.kl, KL_TOLERANCES[dtype]
    if not value <= tolerance:
        raise AlignkitError(
            f"export: the exported model differs from the run: {name} by {value:.2g}, where {dtype} explains "
            f"{tolerance:.0e}. Nothing was written"
        )


def _check_trained(of_run: Difference, of_base: Difference | None) -> None:
    """Check that an export is not much closer to the base of the run's adapter than to the run.

    Raises:
        AlignkitError: it is, so what training changed is missing. Rounding alone makes the two about equal at most.
    """
    if of_base is not None and of_run.kl is not None and of_base.kl is not None and of_run.kl > 2 * of_base.kl:
        raise AlignkitError(
            f"export: what training changed is missing: the exported model differs from the run by a KL of "
            f"{of_run.kl:.2g}, and from the base by {of_base.kl:.2g}. Nothing was written"
        )
