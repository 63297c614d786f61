"""A plain ``transformers.Trainer`` with alignkit's tokens, log-probabilities and loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from alignkit import DataError, Located, Run
from alignkit.data import IGNORE, encode_answer, encode_each
from alignkit.models import fused_logps, install_fused_head
from alignkit_reward_weighted import ScoredLogps

if TYPE_CHECKING:
    from collections import Counter


def build(run: Run) -> RewardWeightedTrainer:
    """Tokenize the rows, load the policy, and put both into a trainer."""
    train_dataset, eval_dataset = tokenize(run, run.train_rows), tokenize(run, run.eval_rows)
    args = run.training_arguments(transformers.TrainingArguments, remove_unused_columns=False)
    loss, optimizer = run.loss(), run.optimizer(args)  # before the model: they can raise errors
    return RewardWeightedTrainer(
        loss=loss,
        all_scores=[row["score"] for row in train_dataset],
        model=run.model("policy"),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset or None,
        data_collator=Collator(transformers.DataCollatorForSeq2Seq(run.tokenizer)),
        processing_class=run.tokenizer,
        callbacks=run.callbacks(),
        optimizer_cls_and_kwargs=optimizer,
    )


def tokenize(run: Run, rows: Sequence[Located]) -> list[dict[str, Any]]:
    """Each row as token ids with labels on its answer, and its score.

    Raises:
        DataError: a row is longer than ``max_length``.
    """
    max_length = run.config.stage.config.max_length

    def encode(row: Any, notes: Counter[str]) -> dict[str, Any]:
        ids, start = encode_answer(run.tokenizer, row.prompt, row.answer, run.stop_ids, notes)
        if len(ids) > max_length:
            raise DataError(f"{len(ids)} tokens, over reward-weighted.max_length={max_length}")
        return {"input_ids": ids, "labels": [IGNORE] * start + ids[start:], "score": row.score}

    return [encoded for _, encoded in encode_each(run, rows, encode)]


class Collator:
    """Pads token ids and labels, and puts the scores beside them."""

    def __init__(self, pad: Any) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        scores = torch.tensor([row["score"] for row in rows])
        padded = self.pad([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        return {**padded, "scores": scores}


class RewardWeightedTrainer(transformers.Trainer):
    """A Trainer with a loss that is a function of :class:`ScoredLogps`."""

    def __init__(self, *, loss: Any, all_scores: list[float], **kwargs: Any) -> None:
        install_fused_head(kwargs["model"])  # log-probabilities without the logits of the prompt
        super().__init__(**kwargs)
        self.loss, self.all_scores = loss, torch.tensor(all_scores, device=self.args.device)
        self.model_accepts_loss_kwargs = True  # the Trainer then counts the labels of an optimizer step

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a microbatch, as its share of the step's."""
        scores = inputs.pop("scores")
        outputs = fused_logps(model, inputs)
        num_tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = self.loss(ScoredLogps(outputs.log_probs.sum(1), scores, self.all_scores, num_tokens)).loss
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes
        return (loss, outputs) if return_outputs else loss
