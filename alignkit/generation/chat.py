"""A conversation with a run or a model. Nothing here imports torch at the top."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit import paths
from alignkit.batches import Sampling
from alignkit.errors import AlignkitError
from alignkit.rows import Conversation, Message
from alignkit.runs import base, lineage, manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Where(NamedTuple):
    """A model to talk to: its folder or name, and its manifest if it is a run."""

    name: str
    manifest: dict[str, Any] | None


def locate(name: str) -> Where:
    """A run folder, or whatever can be a base.

    Raises:
        AlignkitError: neither, or a run whose tuner is not installed.
    """
    folder = paths.expand(name)
    if manifest.is_run(folder):
        record = manifest.read(folder)
        if record["role"] != "policy":
            raise AlignkitError(f"{name} is a {record['role']}, which does not talk: alignkit score {name} FILE")
        if record["weights"] == "adapter":
            lineage.tuner(record)
        return Where(str(folder), record)
    base.check(name)
    return Where(name, None)


class Opened(NamedTuple):
    """A model in memory, on the accelerator if there is one, in evaluation mode."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]  # the tokens at which an answer ends


def open_model(where: Where) -> Opened:
    """The model of a run, on the base in the form that it was trained on; or the model of that name."""
    from alignkit.data.chat_template import load_tokenizer, tokenizer_of_run
    from alignkit.models import adapters, device, pretrained

    if where.manifest is not None:
        model: Any = adapters.open_run(Path(where.name), where.manifest)
        tokenizer, stops = tokenizer_of_run(Path(where.name), where.manifest), where.manifest["stop_ids"]
    else:
        located = base.locate(where.name, print)
        model = pretrained.load(located, {"dtype": device.run_dtype({})}).eval()
        tokenizer = load_tokenizer(located, None)
        stops = base.stop_ids(located, tokenizer)
    model.to(device.run_device({}))
    return Opened(model, tokenizer, stops)


class Chat:
    """A model in memory and what was said so far."""

    def __init__(self, where: Where, max_new_tokens: int, temperature: float) -> None:
        from alignkit.data.chat_tokenizer import chat_tokenizer

        self.model, self.tokenizer, stop_ids = open_model(where)
        chat_tokenizer(self.tokenizer).special_tokens = "text"  # what is typed is text, whatever the run's data were
        self.sampling = Sampling(max_new_tokens, temperature, tuple(stop_ids))
        self.conversation: Conversation = []

    def say(self, text: str) -> str:
        """Ask; the answer is streamed to stdout, added to the conversation, and returned."""
        from transformers import TextStreamer

        from alignkit.data.chat_template import answer_text, prompt_ids
        from alignkit.generation.sampling import sample

        self.conversation.append(Message(role="user", content=text))
        ids = prompt_ids(self.tokenizer, self.conversation)
        length = len(ids) + self.sampling.max_new_tokens
        base.check_length(self.model, length, "the conversation", "Start a new one")
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answers = sample(self.model, self.tokenizer, [ids], self.sampling, streamer=streamer)
        answer = answer_text(self.tokenizer, answers[0])
        self.conversation.append(Message(role="assistant", content=answer))
        return answer
