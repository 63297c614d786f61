"""From rankings to pairs of the best and the worst answer, and from pairs to what the contrast reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit import Conversation, Message, Run
from alignkit.data import Branches, Mapped, Ranked, check_fit, ids_key, prompt_ids

if TYPE_CHECKING:
    from alignkit_rahf.config import RAHFConfig


def pairs_of(rankings: Sequence[Ranked]) -> Sequence[Ranked]:
    """The best and the worst answer of each ranking, in this order; the first ones of those with equal ranks."""

    def pair(ranked: Ranked) -> Ranked:
        places = range(len(ranked.ranks))
        chosen = [choose(places, key=lambda place: ranked.ranks[place]) for choose in (min, max)]
        branches = Branches(ranked.branches.prompt, [ranked.branches.answers[place] for place in chosen])
        return Ranked(ranked.prompt, branches, [0.0, 1.0], tools=ranked.tools)

    return Mapped(pair, rankings)


def collate(pairs: list[Ranked]) -> dict[str, Any]:
    """A batch of pairs, and ``prompt_key`` [B]: equal numbers for equal prompts."""
    import torch

    keys = [int.from_bytes(ids_key(pair.branches.prompt)[:8], "big", signed=True) for pair in pairs]
    return {"pairs": pairs, "prompt_key": torch.tensor(keys)}


class Texts(NamedTuple):
    """Prompts and answers as token ids, N each."""

    prompts: list[list[int]]
    answers: list[list[int]]


def better(pairs: Sequence[Ranked]) -> Texts:
    """The better answers with their prompts."""
    return Texts([pair.branches.prompt for pair in pairs], [pair.branches.answers[0] for pair in pairs])


def worse(pairs: Sequence[Ranked]) -> Texts:
    """The worse answers with their prompts."""
    return Texts([pair.branches.prompt for pair in pairs], [pair.branches.answers[1] for pair in pairs])


def both(pairs: Sequence[Ranked]) -> Texts:
    """The better answers, then the worse ones."""
    return Texts(*(first + second for first, second in zip(better(pairs), worse(pairs), strict=True)))


def asked_for(run: Run, pairs: Sequence[Ranked], instruction: str) -> Texts:
    """As :func:`both`, with an instruction before each prompt. The token ids of the answers are the same."""
    prompts = [prompt_ids(run.tokenizer, instructed(pair.prompt, instruction), pair.tools) for pair in pairs]
    return Texts(prompts * 2, both(pairs).answers)


def instructed(prompt: Conversation, instruction: str) -> Conversation:
    """A prompt with an instruction at the beginning of its last user turn; without one, of its last turn."""
    users = [place for place, message in enumerate(prompt) if message["role"] == "user"]
    place = users[-1] if users else len(prompt) - 1
    turn = Message(**{**prompt[place], "content": f"{instruction}\n\n{prompt[place]['content']}"})
    return [*prompt[:place], turn, *prompt[place + 1 :]]


def check_instructed_fit(run: Run, config: RAHFConfig, pairs: Sequence[Ranked]) -> None:
    """Check that a model with learned positions can read all pairs with the longer prompts of ``single``.

    Raises:
        DataError: it cannot.
    """
    for instruction in (config.good_instruction, config.bad_instruction):
        texts = (asked_for(run, [pair], instruction) for pair in pairs)
        where = f"a pair with the instruction {instruction!r}"
        check_fit(run, ((where, prompt + answer) for text in texts for prompt, answer in zip(*text, strict=True)))
