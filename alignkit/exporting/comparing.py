"""Compares a run with what was exported of it, on texts that the run held out. No torch at the top."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit import data
from alignkit.batches import Sampling
from alignkit.config import DataConfig
from alignkit.errors import AlignkitError
from alignkit.evaluation import comparison
from alignkit.registry import Registry
from alignkit.rows import Conversation, Located, Ranking
from alignkit.runs.lineage import Parent

if TYPE_CHECKING:
    from torch import Tensor

TEXTS = 8
NEW_TOKENS = 8  # of each answer


class Text(NamedTuple):
    """A prompt and an answer, as token ids."""

    prompt: list[int]
    answer: list[int]


class Texts(list[Text]):
    """Texts, and where they are from."""

    def __init__(self, texts: Iterable[Text], source: str) -> None:
        super().__init__(texts)
        self.source = source


class Difference(NamedTuple):
    """The difference between the outputs of two models."""

    largest: float  # of a log-probability of any token; for a reward model, of a score
    kl: float | None  # of the first from the second, nats per token; None for a reward model
    greedy_agreement: float | None  # the share of positions at which both prefer the same token
    outputs: int  # positions, or scores


# --- texts -----------------------------------------------------------------------------------------------------------


def texts_of(run: Parent, model: Any, tokenizer: Any) -> Texts:
    """Prompts that ``run`` held out, with greedy answers of its policy; or answers that its reward model held out.

    They are bundled ones if there are none, or if the data are gone. ``model`` is the run's.
    """
    assert run.manifest is not None
    stop_ids = tuple(run.manifest["stop_ids"])
    if run.manifest["role"] == "reward":
        return _rated(run.manifest, tokenizer, stop_ids)
    from alignkit.generation import sample

    prompts, source = _prompts(run)
    ids = [data.prompt_ids(tokenizer, prompt) for prompt in prompts]
    answers = sample(model, tokenizer, ids, Sampling(NEW_TOKENS, 0.0, stop_ids), say=lambda line: None)
    return Texts((Text(*pair) for pair in zip(ids, answers, strict=True)), source)


def _prompts(run: Parent) -> tuple[Sequence[Conversation], str]:
    try:
        return comparison.prompts_of(None, [run], TEXTS).prompts, "prompts that the run held out"
    except AlignkitError:
        return comparison.prompts_of("bundled:prompts", [], TEXTS).prompts, "bundled prompts"


def _rated(record: dict[str, Any], tokenizer: Any, stop_ids: Sequence[int]) -> Texts:
    rows: Sequence[Located] = []
    with contextlib.suppress(AlignkitError):
        rows = comparison.rows_of(record)[1]
    source = "answers that the run held out" if rows else "bundled answers"
    rows = rows or data.load(Registry(), DataConfig(), "bundled:rankings", (Ranking,)).rows
    rankings = [row for _, row in rows[:TEXTS] if isinstance(row, Ranking)]
    pairs = [(row, answer) for row in rankings for answer in row.answers][:TEXTS]
    encoded = [data.encode_answer(tokenizer, row.prompt, answer, stop_ids, tools=row.tools) for row, answer in pairs]
    return Texts((Text(ids[:start], ids[start:]) for ids, start in encoded), source)


# --- outputs ---------------------------------------------------------------------------------------------------------


def outputs(model: Any, texts: Sequence[Text]) -> list[Tensor]:
    """The outputs of ``model`` for each text: logits [T, V] for the T tokens of the answer, or a score [1].

    The model computes in fp32, with its weights as they are stored. The outputs are mapped from files, which are
    deleted already, so that those of a large vocabulary take no memory beside the model.
    """
    from safetensors.torch import load_file, save_file

    from alignkit.models.fp32 import computing_in_fp32

    with computing_in_fp32(model), tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(texts):
            save_file({"": _outputs(model, text)}, Path(folder, str(number)))
        return [load_file(Path(folder, str(number)))[""] for number in range(len(texts))]


def _outputs(model: Any, text: Text) -> Tensor:
    import torch

    from alignkit.models import base_of

    inner = base_of(model)
    if hasattr(inner, "score"):
        return model(torch.tensor([text.prompt + text.answer], device=model.device)).logits[0].float().cpu()
    ids = torch.tensor([text.prompt + text.answer[:-1]], device=model.device)
    count = len(text.answer)
    keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters
    logits = model(ids, **({"logits_to_keep": count} if keeps else {})).logits
    return logits[0, -count:].float().cpu().contiguous()


def difference(run: Sequence[Tensor], exported: Sequence[Tensor]) -> Difference:
    """The difference between the outputs of two models for the same texts."""
    import torch

    if run[0].dim() == 1:
        scores = torch.cat(list(run)) - torch.cat(list(exported))
        return Difference(float(scores.abs().max()), None, None, len(scores))
    largest, kl, agree, count = 0.0, 0.0, 0, 0
    for own, other in zip(run, exported, strict=True):
        p, q = own.double().log_softmax(-1), other.double().log_softmax(-1)
        largest = max(largest, float((p - q).abs().max()))
        kl += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    return Difference(largest, kl / count, agree / count, count)


def describe(difference: Difference, source: str) -> str:
    """The figures of a comparison on a line."""
    if difference.kl is None:
        return f"largest difference of a score {difference.largest:.2g} on {difference.outputs} {source}"
    return (
        f"KL {difference.kl:.2g} nats per token, largest difference of a log-probability {difference.largest:.2g}, "
        f"same most likely token at {difference.greedy_agreement:.1%} of {difference.outputs} positions, on {source}"
    )
