"""The judge ``local``: the log-probabilities of "A" and "B" as a model's answer. There is nothing to parse."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alignkit import Message, Question, Run
from alignkit.data import encode_answer
from alignkit.generation import locate_policy, open_model
from alignkit.models import base_of
from alignkit_judges import prompts

if TYPE_CHECKING:
    from alignkit_judges.config import LocalConfig

LITTLE = 0.5  # of the probability, for both letters together


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

    def letters(question: Question) -> tuple[list[list[int]], int]:
        """The token ids of a question with each letter as its answer, and where they begin to differ."""
        message = Message(role="user", content=prompts.write(question, prompts.ONE_LETTER, rubric, principles))
        encoded = [encode_answer(tokenizer, [message], letter, stop_ids)[0][:-1] for letter in ("A", "B")]
        return encoded, next(i for i, (a, b) in enumerate(zip(*encoded, strict=False)) if a != b)

    def judge(questions: Sequence[Question]) -> Iterator[list[float] | None]:
        probability = []
        for start in range(0, len(questions), config.batch):
            batch = [letters(question) for question in questions[start : start + config.batch]]
            rows = [(ids, differ) for encoded, differ in batch for ids in encoded if len(ids) <= longest]
            logps = iter(answer_logps(model, rows).tolist() if rows else [])
            for encoded, _ in batch:
                if max(map(len, encoded)) > longest:
                    warn("long", f"no verdict on questions of more than the {longest} tokens that {config.model} reads")
                    yield None
                else:
                    costs = [-next(logps), -next(logps)]
                    probability.append(sum(math.exp(-cost) for cost in costs))
                    yield costs
        if probability and (mean := sum(probability) / len(probability)) < LITTLE:
            warn("letters", f"{config.model} answers A or B with a probability of only {mean:.2g}: it may be no judge")

    return judge


@torch.no_grad()
def answer_logps(model: Any, rows: Sequence[tuple[list[int], int]]) -> Tensor:
    """The log-probability of each row of token ids from an index on, [N]. All rows are one batch."""
    inputs = list(dict.fromkeys(tuple(ids[:-1]) for ids, _ in rows))  # rows that end in different letters are one input
    padded = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in inputs], batch_first=True)  # [inputs, T]
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in inputs], batch_first=True)
    before = [list(range(start - 1, len(ids) - 1)) for ids, start in rows]  # the positions that predict the tokens
    kept = sorted({position for positions in before for position in positions})
    tensors = [tensor.to(model.device) for tensor in (padded, mask, torch.tensor(kept))]
    output = model(tensors[0], attention_mask=tensors[1], logits_to_keep=tensors[2], use_cache=False)
    logps = output.logits.float().log_softmax(-1).cpu()  # [inputs, kept, V]
    return torch.stack(
        [
            logps[inputs.index(tuple(ids[:-1])), [kept.index(i) for i in positions], ids[positions[0] + 1 :]].sum()
            for (ids, _), positions in zip(rows, before, strict=True)
        ]
    )


def head_in_fp32(model: Any) -> None:
    """Compute logits in fp32. In bf16 they are multiples of 0.125 from 16 on, so that different answers would tie."""
    head = base_of(model).get_output_embeddings()
    if type(head) is nn.Linear:

        def forward(self: nn.Linear, hidden: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)

        setattr(head, "forward", types.MethodType(forward, head))  # noqa: B010
