"""Rated answers as token ids, each beside an answer to another prompt, and the tensors of a batch."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignkit import Conversation, DataError, Located, Ranking, Rated, Run
from alignkit.data import (
    IGNORE,
    Encoded,
    Mapped,
    RankingEncoder,
    check_fit,
    encode_rows,
    ids_key,
    prompt_of,
    stored_dataset,
)
from alignkit.models import fused_logps
from alignkit_kto.ratings import check_prompts, check_ratings, ratings

if TYPE_CHECKING:
    import datasets

    from alignkit_kto.config import KTOConfig

COLUMNS = {"prompt_ids": "list<int32>", "answer_ids": "list<int32>", "other_ids": "list<int32>"}
COLUMNS |= {"good": "bool", "prompt_index": "int64"}


class Place(NamedTuple):
    """The place of a rated answer in the encoded rows."""

    record: int
    answer: int
    good: bool
    prompt: bytes  # a key of its prompt


class RatedAnswers:
    """The rated answers of rows. Their token ids stay in the table of encoded rows until they are read."""

    def __init__(self, run: Run, rows: Sequence[Located], config: KTOConfig, training: bool) -> None:
        self.encoded: Encoded = encode_rows(run, rows, RankingEncoder(run.tokenizer, run.stop_ids))
        self.places = self._usable(run, config)
        prompts, counts = {place.prompt for place in self.places}, Counter(place.good for place in self.places)
        if training:
            check_ratings(counts, prompts)
            run.say(f"{counts[True]} good and {counts[False]} bad answers to {len(prompts)} prompts")
        else:
            check_prompts(prompts, "held-out")
        sequences = ((self.encoded.where(each.record), self.ids(each)) for each in self.places)
        check_fit(run, ((where, [*prompt, *answer]) for where, (prompt, answer) in sequences))

    def _usable(self, run: Run, config: KTOConfig) -> list[Place]:
        """The answers that are not too long, and not the same tokens as one of their ranking with another rating."""
        places, lengths, contradictions = list[Place](), list[tuple[int, str]](), 0
        for record in self.encoded.good():
            where, row = self.encoded.located(record)
            prompt, answers = self.encoded.ids("prompt", record), self.encoded.ids("answers", record)
            rated = ratings(cast(Rated | Ranking, row))
            for answer, good in rated:
                lengths.append((len(prompt) + len(answers[answer]), where))
                contradicted = any(answers[n] == answers[answer] for n, is_good in rated if is_good != good)
                contradictions += contradicted
                if not contradicted and lengths[-1][0] <= config.max_length:
                    places.append(Place(record, answer, good, ids_key(prompt)))
        if over := sum(length > config.max_length for length, _ in lengths):
            longest, where = max(lengths)
            text = (
                f"{over} of {len(lengths)} answers are over {config.max_length} tokens, the longest {longest} ({where})"
            )
            if config.too_long == "error":
                raise DataError(f"{text}. Raise kto.max_length, or set kto.too_long=skip to leave them out")
            run.say(f"{text}: left out")
        if contradictions:
            run.say(
                f"{contradictions} of {len(lengths)} answers are left out: a better and a worse answer to their prompt "
                "are the same tokens"
            )
        return places

    def ids(self, place: Place) -> tuple[list[int], list[int]]:
        """The token ids of a prompt and of an answer to it, with the token that ends it."""
        return self.encoded.ids("prompt", place.record), self.encoded.ids("answers", place.record)[place.answer]

    def prompts(self) -> list[tuple[Conversation, list[int]]]:
        """The distinct prompts, as conversations and as token ids."""
        distinct = {place.prompt: place.record for place in reversed(self.places)}
        records = sorted(distinct.values())
        return [(prompt_of(self.encoded.located(n).row), self.encoded.ids("prompt", n)) for n in records]

    def dataset(self, batch_size: int, seed: int) -> datasets.Dataset:
        """The answers in a random order, each with an answer to another prompt, from which the KL is estimated.

        ``batch_size`` is that of all processes together, so that two processes pair the answers as one does.
        That answer is cut where it would make a sequence longer than the longest of the rows, which the model can read.
        """
        places = list(self.places)
        random.Random(seed).shuffle(places)
        others = other_answers([place.prompt for place in places], batch_size)
        index: dict[bytes, int] = {}  # of each distinct prompt
        numbers = [index.setdefault(place.prompt, len(index)) for place in places]
        longest = max(len(prompt) + len(answer) for prompt, answer in map(self.ids, places))

        def row(number: int) -> dict[str, Any]:
            prompt, answer = self.ids(places[number])
            _, other = self.ids(places[others[number]])
            columns = {"prompt_ids": prompt, "answer_ids": answer, "other_ids": other[: longest - len(prompt)]}
            return {**columns, "good": places[number].good, "prompt_index": numbers[number]}

        return stored_dataset(Mapped(row, range(len(places))), COLUMNS)


def other_answers(prompts: Sequence[bytes], batch_size: int) -> list[int]:
    """For each row the index of a row with another prompt, whose answer stands in for an answer to a random prompt.

    As in the paper, the answers of a batch are rotated by one. A row whose neighbor has the same prompt takes the next
    one, and a batch without another prompt, such as a last batch of one row, takes an answer of an earlier batch. At
    least two of the prompts must differ.
    """
    others, rows = [], len(prompts)
    for start in range(0, rows, batch_size):
        size = min(batch_size, rows - start)
        for row in range(start, start + size):
            in_batch = (start + (row - start - step) % size for step in range(1, size))
            in_order = ((row - step) % rows for step in range(1, rows))
            others.append(next(n for n in itertools.chain(in_batch, in_order) if prompts[n] != prompts[row]))
    return others


@dataclass
class Collator:
    """Makes a batch of rows of :meth:`RatedAnswers.dataset`."""

    pad: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The tensors of :func:`inputs`, those of the other answers as ``other_...``, ratings and prompts [B]."""
        prompts = [row["prompt_ids"] for row in rows]
        batch = inputs(prompts, [row["answer_ids"] for row in rows], self.pad)
        others = inputs(prompts, [row["other_ids"] for row in rows], self.pad)
        batch |= {f"other_{name}": tensor for name, tensor in others.items()}
        batch["good"] = torch.tensor([row["good"] for row in rows])
        batch["prompt_index"] = torch.tensor([row["prompt_index"] for row in rows])
        for name in ("ref_logps", "ref_KL_logps"):  # precomputed, under TRL's names
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def inputs(prompts: Sequence[list[int]], answers: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    """Prompts with an answer each as a model's inputs with labels, [B, T] each. Only answers have labels."""
    pairs = list(zip(prompts, answers, strict=True))

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    return {
        "input_ids": padded([prompt + answer for prompt, answer in pairs], pad),
        "attention_mask": padded([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs], 0),
        "labels": padded([[IGNORE] * len(prompt) + answer for prompt, answer in pairs], IGNORE),
    }


def answer_logps(model: Any, batch: dict[str, Tensor], prefix: str = "", **more: Any) -> tuple[Tensor, Tensor | None]:
    """The log-probability of each answer, summed over its tokens, [B], and the auxiliary loss of experts, if any.

    ``prefix`` is ``other_`` for the answers to other prompts.
    """
    names = ("input_ids", "attention_mask", "labels")
    outputs = fused_logps(model, {**{name: batch[f"{prefix}{name}"] for name in names}, **more})
    return outputs.log_probs.sum(1), outputs.aux_loss
