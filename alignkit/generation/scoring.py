"""Score answers with the model of a finished reward run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit.data.chat_template import encode_answer, tokenizer_of_run
from alignkit.data.encoding import Branches
from alignkit.models import adapters, device_and_dtype, prompt_trees
from alignkit.rows import Conversation, Message, Tools
from alignkit.runs import base


class RewardModel:
    """A reward model in memory, which scores answers to conversations."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.tokenizer = tokenizer_of_run(folder, record)
        self.stop_ids = record["stop_ids"]
        dtype = device_and_dtype.dtype_of_run(record)  # in another format, scores would not be those of the run
        self.model = prompt_trees.with_answer_scores(adapters.open_run(folder, record, dtype))
        self.model.to(device_and_dtype.run_device({}))

    def encode(self, prompt: Conversation, answer: str | Message, tools: Tools | None = None) -> Branches:
        """A prompt and its answer with its stop token as token ids, as in training."""
        ids, start = encode_answer(self.tokenizer, prompt, answer, self.stop_ids, tools=tools)
        return Branches(ids[:start], [ids[start:]])

    def scores(self, answers: Sequence[Branches], batch: int) -> list[float]:
        """The normalized score of each answer. Batches of ``batch`` answers have answers of similar length."""
        order = sorted(range(len(answers)), key=lambda i: len(answers[i].prompt) + len(answers[i].answers[0]))
        scores: dict[int, float] = {}
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            scores.update(zip(part, self._forward([answers[i] for i in part]).tolist(), strict=True))
        return [scores[i] for i in range(len(answers))]

    def _forward(self, answers: list[Branches]) -> Tensor:
        inputs = prompt_trees.collate_separate(answers, self.tokenizer.pad_token_id)
        base.check_length(self.model, inputs["input_ids"].shape[1], "a prompt with its answer", "Shorten it")
        with torch.no_grad():
            return prompt_trees.answer_scores(self.model, {name: t.to(self.model.device) for name, t in inputs.items()})
