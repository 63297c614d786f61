"""A conversation with a run or a model. Nothing here imports torch at the top."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from alignkit import base, manifest
from alignkit.errors import PluginError
from alignkit.registry import Registry
from alignkit.rows import Conversation, Message


class Where(NamedTuple):
    """A model to talk to: its folder or name, and its manifest if it is a run."""

    name: str
    manifest: dict[str, Any] | None


def locate(name: str) -> Where:
    """A run folder, or whatever can be a base.

    Raises:
        AlignkitError: neither.
    """
    folder = Path(name).expanduser()
    if manifest.is_run(folder):
        return Where(str(folder), manifest.read(folder))
    base.check(name)
    return Where(name, None)


class Chat:
    """A model in memory and what was said so far."""

    def __init__(self, where: Where, max_new_tokens: int, temperature: float) -> None:
        import torch
        from transformers import GenerationConfig

        from alignkit.chat_template import load_tokenizer

        self.model = _load(where)
        self.model.eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(where.name if where.manifest else base.locate(where.name, print), None)
        stops = where.manifest["stop_ids"] if where.manifest else self.model.generation_config.eos_token_id
        self.generation = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            eos_token_id=stops if stops is not None else self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.conversation: Conversation = []

    def say(self, text: str) -> str:
        """Say something; the answer is streamed to stdout, remembered, and returned."""
        import torch
        from transformers import TextStreamer

        from alignkit.chat_template import prompt_ids

        self.conversation.append(Message(role="user", content=text))
        ids = torch.tensor([prompt_ids(self.tokenizer, self.conversation)], device=self.model.device)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=self.generation, streamer=streamer
        )
        answer = str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
        self.conversation.append(Message(role="assistant", content=answer))
        return answer


def _load(where: Where) -> Any:
    """The model of a run, on the base in the form that it was trained on; or the model of that name."""
    import torch

    from alignkit import device

    kwargs: dict[str, Any] = {"dtype": device.run_dtype({})}
    if where.manifest is None:
        return base.load(base.locate(where.name, print), kwargs)
    if where.manifest["weights"] == "model":
        return base.load(where.name, kwargs)

    from peft import PeftModel

    from alignkit.config import select

    registry = Registry()
    for plugin in where.manifest["config"]["plugins"]:
        with contextlib.suppress(PluginError):  # only the tuner matters here; select tells if it is missing
            registry.activate(plugin)
    tuner, config = select(registry, "tuner", where.manifest["tuner"], [where.manifest["config"]["tuner"]])
    kwargs |= tuner.load(config, getattr(torch, where.manifest["dtype"]))
    name = where.manifest["base"]["name"]
    located = base.locate(name, print) if name.startswith("bundled:") else where.manifest["base"]["located"]
    return PeftModel.from_pretrained(base.load(located, kwargs), where.name)
