"""The judge ``local``: the log-probabilities of "A" and "B" as a model's answer. There is nothing to parse."""

from __future__ import annotations

import itertools
import math
import operator
import statistics
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from alignkit import ConfigError, Message, Question, Run
from alignkit.data import encode_answer
from alignkit.generation import locate_policy, open_model
from alignkit.models import base_of
from alignkit_judges import prompts

if TYPE_CHECKING:
    from alignkit_judges.config import LocalConfig

LITTLE = 0.5  # of the probability, for both letters together

Letters = list[tuple[list[int], list[int]]]  # for A and for B: the token ids before the letter, and those of the letter


def build(config: LocalConfig, run: Run) -> Callable[[Sequence[Question]], Iterator[list[float] | None]]:
    """The judge: a function that yields, for each question, the negative log-probabilities of "A" and of "B"."""
    model, tokenizer, stop_ids = open_model(locate_policy(str(config.model)))
    model.to(run.device)
    head_in_fp32(model)
    rubric, principles = prompts.read_rubric(config.rubric), prompts.read_principles(config.principles)
    longest = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None) or math.inf
    warned = set[str]()

    def warn(kind: str, line: str) -> None:
        if kind not in warned:
            run.say(f"warning: {line}")
        warned.add(kind)

    def encode(question: Question) -> Letters:
        message = Message(role="user", content=prompts.write(question, prompts.ONE_LETTER, rubric, principles))
        a, b = (encode_answer(tokenizer, [message], letter, stop_ids)[0] for letter in ("A", "B"))
        if a == b:
            raise ConfigError(f"{config.model} cannot judge: its tokenizer does not distinguish A and B")
        return split(a, b)

    def fits(letters: Letters) -> bool:
        return all(len(before) + len(letter) <= longest for before, letter in letters)

    def judge(questions: Sequence[Question]) -> Iterator[list[float] | None]:
        probabilities: list[float] = []  # of both letters together
        for start in range(0, len(questions), config.batch):
            batch = [encode(question) for question in questions[start : start + config.batch]]
            logps = iter(answer_logps(model, [row for letters in batch if fits(letters) for row in letters]))
            for letters in batch:
                if not fits(letters):
                    warn("long", f"no verdict on questions of more than the {longest} tokens that {config.model} reads")
                    yield None
                    continue
                costs = [-next(logps), -next(logps)]
                probabilities.append(sum(math.exp(-cost) for cost in costs))
                yield costs
        if probabilities and (mean := statistics.fmean(probabilities)) < LITTLE:
            warn(
                "letters",
                f"{config.model} gives A and B together a probability of only {mean:.2g}: its verdicts may mean little",
            )

    return judge


def split(a: list[int], b: list[int]) -> Letters:
    """The token ids of a question with either answer, split where they begin to differ, and up to where they end to.

    What a chat template writes around an answer, such as an empty thought, is the same for both and does not count.
    """
    start, after = _common(a, b), _common(a[::-1], b[::-1])
    return [(ids[:start], ids[start : len(ids) - after]) for ids in (a, b)]


def _common(a: list[int], b: list[int]) -> int:
    """The number of tokens that both begin with."""
    return sum(itertools.takewhile(bool, map(operator.eq, a, b)))


@torch.no_grad()
def answer_logps(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """The log-probability of each answer after its prompt; both are token ids. All rows are one batch."""
    if not rows:
        return []
    inputs = [(*prompt, *answer[:-1]) for prompt, answer in rows]
    distinct = {ids: number for number, ids in enumerate(dict.fromkeys(inputs))}  # letters of one token: one for both
    padded = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in distinct], batch_first=True)  # [distinct, T]
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in distinct], batch_first=True)
    before = [range(len(prompt) - 1, len(ids)) for (prompt, _), ids in zip(rows, inputs, strict=True)]
    kept = sorted(set().union(*before))  # the positions that predict a token of an answer
    padded, mask, positions = (tensor.to(model.device) for tensor in (padded, mask, torch.tensor(kept)))
    output = model(padded, attention_mask=mask, logits_to_keep=positions, use_cache=False)
    logps = output.logits.float().log_softmax(-1).cpu()  # [distinct, kept, V]
    return [
        logps[distinct[ids], [kept.index(position) for position in where], answer].sum().item()
        for (_, answer), ids, where in zip(rows, inputs, before, strict=True)
    ]


def head_in_fp32(model: Any) -> None:
    """Compute logits in fp32. In bf16 they are multiples of 0.125 from 16 on, so that different answers would tie."""
    head = base_of(model).get_output_embeddings()
    if type(head) is nn.Linear:

        def forward(self: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)

        setattr(head, "forward", types.MethodType(forward, head))  # noqa: B010
