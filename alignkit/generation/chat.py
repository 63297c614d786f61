"""Chat with a run or a model. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit import paths
from alignkit.batches import Sampling
from alignkit.errors import AlignkitError
from alignkit.rows import Conversation, Message
from alignkit.runs import base, lineage, manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelSource(NamedTuple):
    """The source of a model: its folder or name, and the manifest if it is a run."""

    name: str
    manifest: dict[str, Any] | None


def locate(name: str) -> ModelSource:
    """Find a run folder, or anything that can be a base model.

    Raises:
        AlignkitError: it is neither, or the run is not a policy, or its tuner is not installed.
    """
    folder = paths.expand(name)
    if manifest.is_run(folder):
        record = manifest.read(folder)
        if record["role"] != "policy":
            raise AlignkitError(
                f"{name} is a {record['role']} model, which cannot answer. Score answers: alignkit score {name} FILE"
            )
        if record["weights"] == "adapter":
            lineage.tuner(record)
        return ModelSource(str(folder), record)
    base.check(name)
    return ModelSource(name, None)


class LoadedModel(NamedTuple):
    """A model in memory, in evaluation mode, on the accelerator if there is one."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]  # the tokens that end an answer


def open_model(source: ModelSource, model_kwargs: Mapping[str, Any] | None = None) -> LoadedModel:
    """Load the policy of a run, with its base as it was for training, or a model by name.

    ``model_kwargs`` are arguments of ``from_pretrained`` for a model by name.
    """
    from alignkit.data.chat_template import load_tokenizer, tokenizer_of_run
    from alignkit.models import adapters, device_and_dtype, pretrained

    if source.manifest is not None:
        model: Any = adapters.open_run(Path(source.name), source.manifest)
        tokenizer, stop_ids = tokenizer_of_run(Path(source.name), source.manifest), source.manifest["stop_ids"]
    else:
        located = base.locate(source.name, print)
        kwargs = base.with_commit(model_kwargs or {}, located)
        loading = device_and_dtype.usable({"dtype": device_and_dtype.run_dtype({}), **kwargs}, print)
        model = pretrained.load(located, loading).eval()
        tokenizer = load_tokenizer(located, None, kwargs=base.of_repository(kwargs))
        stop_ids = base.stop_ids(located, tokenizer, kwargs.get("revision"))
    model.to(device_and_dtype.run_device({}))
    return LoadedModel(model, tokenizer, stop_ids)


class Chat:
    """A model in memory and the conversation so far."""

    def __init__(
        self,
        source: ModelSource,
        max_new_tokens: int,
        temperature: float,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        from alignkit.data.chat_tokenizer import chat_tokenizer

        self.model, self.tokenizer, stop_ids = open_model(source, model_kwargs)
        chat_tokenizer(self.tokenizer).special_tokens = "text"  # of what the user types, in every run
        self.sampling = Sampling(max_new_tokens, temperature, tuple(stop_ids))
        self.conversation: Conversation = []

    def say(self, text: str) -> str:
        """Send a message. The answer is streamed to stdout, added to the conversation, and returned."""
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
