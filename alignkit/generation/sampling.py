"""Sample answers from a policy, and their text."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from alignkit.batches import SampledAnswers, Sampling
from alignkit.data.chat_template import answer_text
from alignkit.errors import AlignkitError, one_line
from alignkit.generation.decode import Decoder, decode
from alignkit.generation.hf_generate import generate, without_generation_config
from alignkit.models import logit_form
from alignkit.models.device_and_dtype import compute_dtype
from alignkit.models.lora_forward import lora_forward
from alignkit.runs import base

CHECKED = 3  # tokens
# what a model raises that has a cache, a state or inputs of its own kind; no error of the device or of its memory
UNSUPPORTED = (AlignkitError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
OF_THE_DEVICE = (torch.AcceleratorError, torch.OutOfMemoryError)  # these are RuntimeErrors
# base models already checked: with and without graphs
_supported: weakref.WeakKeyDictionary[nn.Module, dict[bool, bool]] = weakref.WeakKeyDictionary()


def sample(
    model: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    say: Callable[[str], None] = print,
    streamer: Any = None,
    cuda_graphs: bool = False,
    merged: bool = False,
) -> SampledAnswers:
    """Sample ``sampling.samples`` answers to each prompt in turn, as token ids up to and including a stop token.

    All prompts are one batch. :mod:`alignkit.generation.decode` samples where its logits are those of Transformers'
    ``generate``, which is checked once for each model. Elsewhere ``generate`` does, and ``say`` gets one line.
    ``streamer`` is one of Transformers' and gets the tokens of a single answer. ``cuda_graphs`` makes each step a CUDA
    graph; what is checked, and the line, are the same. With ``merged``, LoRA is added to copies of the weights first,
    see :func:`merged_lora`.

    Raises:
        AlignkitError: a prompt with its answer is too long for the model; ``merged``, and no layer can be merged.
    """
    width = max(map(len, prompts))
    length = f"a prompt of {width} tokens and up to {sampling.max_new_tokens} of its answer"
    base.check_length(model, width + sampling.max_new_tokens, length, "Sample fewer new tokens, or shorten the prompt")
    if cuda_graphs and is_supported(model, prompts[0], say, graphs=True):
        return decode(model, prompts, sampling, streamer, graphs=True, merged=merged)
    if is_supported(model, prompts[0], say):
        return decode(model, prompts, sampling, streamer, merged=merged)
    return generate(model, tokenizer, prompts, sampling, streamer)


def text(tokenizer: transformers.PreTrainedTokenizerBase, answer: list[int]) -> str:
    """The text of an answer, without its stop token and what the chat template adds around it.

    An answer of white space is empty text, as in the data formats.
    """
    answered = answer_text(tokenizer, answer)
    return answered if answered.strip() else ""


def is_supported(model: Any, prompt: list[int], say: Callable[[str], None], graphs: bool = False) -> bool:
    """Whether :mod:`alignkit.generation.decode` can sample from this model; if not, ``say`` gets one line, once."""
    inner = logit_form.base_of(model)
    checked = _supported.setdefault(inner, {})
    if graphs not in checked:
        shorter = prompt[: -CHECKED + 1] or prompt  # with the tokens of the check no longer than the model can read
        reason = difference(model, shorter[:64], graphs)
        checked[graphs] = reason is None
        if reason and graphs:
            say(f"{type(inner).__name__} cannot be decoded with CUDA graphs ({reason}): sampling without them")
        elif reason:
            say(
                f"the decode loop does not support {type(inner).__name__} ({reason}): sampling with Transformers' "
                "generate"
            )
    return checked[graphs]


@torch.no_grad()
def difference(model: Any, prompt: list[int], graphs: bool = False) -> str | None:
    """Why a :class:`Decoder` does not have the logits of ``generate`` on this model; None if it has, to rounding.

    It decodes three tokens after ``prompt`` and after its last token alone, so that one row is padded. Meanwhile rows
    are repeated, reordered and removed. Errors of the device are raised.
    """
    tolerance = 1e-4 if compute_dtype(logit_form.base_of(model)) is torch.float32 else 0.05
    try:
        expected, sequences = _greedy_logits(model, prompt)
        with lora_forward(model):
            decoder = Decoder(model, [prompt, prompt[-1:]], len(prompt) + CHECKED, graphs)
            rows = torch.arange(2, device=model.device)
            for position, kept in enumerate(([0, 0, 1], [2, 0], [0])):
                decoder.select(torch.tensor(kept, device=rows.device))
                rows, logits = rows[kept], expected[position].float()
                error = distance(decoder.logits(), logits[rows], logits)
                if not error <= tolerance and not logits.isfinite().all():
                    return "the logits of generate are NaN or infinite"
                if not error <= tolerance:
                    return f"its logits differ from those of generate by {error:.2g} of the largest"
                decoder.append(sequences[rows, len(prompt) + position])
    except OF_THE_DEVICE:
        raise
    except UNSUPPORTED as unsupported:
        return str(unsupported) if type(unsupported) is NotImplementedError else one_line(unsupported)
    return None


def distance(own: Tensor, expected: Tensor, logits: Tensor) -> float:
    """The largest difference of logits, as a share of the largest of all ``logits``."""
    return float((own - expected).abs().max() / (1 + logits.abs().max()))


def _greedy_logits(model: Any, prompt: list[int]) -> tuple[Sequence[Tensor], Tensor]:
    """The logits of ``generate``, [2, V] for each new token, and its sequences: ``prompt``, and its last token."""
    padding = len(prompt) - 1
    ids = torch.tensor([prompt, [prompt[0]] * padding + prompt[-1:]], device=model.device)
    mask = torch.tensor([[1] * len(prompt), [0] * padding + [1]], device=model.device)
    config = transformers.GenerationConfig(
        max_new_tokens=CHECKED, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    with without_generation_config(model):
        output = model.generate(ids, attention_mask=mask, generation_config=config)
    return output.logits, output.sequences
