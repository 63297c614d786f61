"""The reward model's trainer: each of a prompt's K answers is forwarded once, and all its pairs are in one loss."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from alignkit import ConfigError, DataError, Demonstration, RankedScores, Run
from alignkit.data import Branches, Mapped, Ranked, encode_answer
from alignkit.models import (
    answer_scores,
    collate_separate,
    collate_tree,
    decide_shared_prompt,
    pack_trees,
    tree_size,
    with_answer_scores,
    without_dropout,
)
from alignkit.training import Means, counted_rows
from alignkit_rm import metrics, pairs
from alignkit_rm.groups import encode_groups
from alignkit_rm.normalize import normalize

if TYPE_CHECKING:
    from alignkit_rm.config import RMConfig


def build(run: Run) -> RewardTrainer:
    """Tokenize the rankings, load the model with its scalar head, and build the trainer."""
    config: RMConfig = run.config.stage.config
    if run.config.train.get("shard") and config.forward_tokens is not None:
        raise ConfigError(
            "rm.forward_tokens: with train.shard, all processes must run the same number of forward passes. Lower "
            "train.per_device_train_batch_size instead"
        )
    groups = encode_groups(run, run.train_rows, config.max_length, config.too_long)
    held_out = encode_groups(run, run.eval_rows, config.max_length, config.too_long) if run.eval_rows else None
    args = run.training_arguments(transformers.TrainingArguments, remove_unused_columns=False, label_names=["labels"])
    loss, optimizer = run.loss(), run.optimizer(args)  # before the model is loaded, as their settings may be wrong
    model = with_answer_scores(without_dropout(run.model("reward")))
    trainer = RewardTrainer(
        loss=loss,
        pad=run.tokenizer.pad_token_id,
        forward_tokens=config.forward_tokens,
        folder=run.folder,
        model=model,
        args=args,
        train_dataset=groups,
        eval_dataset=held_out,
        data_collator=collate,
        processing_class=run.tokenizer,
        callbacks=run.callbacks(),
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.shared_prompt = decide_shared_prompt(
        run, model, Mapped(lambda group: group.branches, groups), trainer.score_group, args.device
    )
    return trainer


def collate(groups: list[Ranked]) -> dict[str, Any]:
    """A batch; ``labels`` [G, K, 2] are each answer's rank and length, padded with -1, for the evaluation."""
    labels = torch.full((len(groups), max(len(group.ranks) for group in groups), 2), -1.0)
    for row, group in enumerate(groups):
        labels[row, : len(group.ranks), 0] = torch.unique(torch.tensor(group.ranks), return_inverse=True)[1].float()
        labels[row, : len(group.ranks), 1] = torch.tensor([float(len(answer)) for answer in group.branches.answers])
    return {"labels": labels, "groups": groups}


class RewardTrainer(transformers.Trainer):
    """``transformers.Trainer`` on groups, with a loss that is a function of :class:`alignkit.RankedScores`."""

    loss_is_scaled_for_ga = True  # the loss is divided by the groups of the whole optimizer step

    def __init__(self, *, loss: Any, pad: int, forward_tokens: int | None, folder: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs, compute_metrics=self._metrics)
        if self.is_deepspeed_enabled and forward_tokens is not None:  # its engine steps at every backward
            raise ConfigError(
                "rm.forward_tokens does not work with train.deepspeed: lower train.per_device_train_batch_size instead"
            )
        self.loss = loss
        self.pad = pad
        self.forward_tokens = forward_tokens
        self.folder = folder  # of the run
        self.shared_prompt = False
        self.scale, self.shift = 1.0, 0.0  # normalized scores are those before less the shift, over the scale
        self.means = Means(self.accelerator)  # over groups

    # --- one optimizer step ------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The microbatches of a step, and the number of their groups on all processes: the loss is their mean."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        groups = torch.tensor(sum(len(batch["groups"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(groups)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a microbatch, as its share of the step's.

        A batch that takes several forward passes keeps the graph of one at a time. The scores are computed first,
        without gradients. The loss gives the gradient of each score. Then each pass is repeated with the gradients of
        its scores.
        """
        groups: Sequence[Ranked] = inputs["groups"]
        parts = list(self._forwards([group.branches for group in groups]))
        share = len(groups) / num_items_in_batch * self.accelerator.num_processes if model.training else 1.0
        if len(parts) == 1 or not torch.is_grad_enabled():
            scores = torch.cat([answer_scores(model, part) for part in parts])
            loss = self._loss(groups, scores) * share
            return (loss, scores) if return_outputs else loss

        with torch.no_grad():
            scores = torch.cat([answer_scores(model, part) for part in parts])
        scores.requires_grad_()
        loss = self._loss(groups, scores) * share
        (gradients,) = torch.autograd.grad(loss, scores)
        start = 0
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                recomputed = answer_scores(model, part)
                surrogate = (recomputed * gradients[start : start + len(recomputed)]).sum()
                start += len(recomputed)
                if not last:
                    self.accelerator.backward(surrogate)
        return surrogate + (loss - surrogate).detach()  # the Trainer calls backward on the last

    def _loss(self, groups: Sequence[Ranked], scores: Tensor) -> Tensor:
        output = self.loss(ranked_scores(groups, scores * self.scale + self.shift))
        if torch.is_grad_enabled():
            self.means.add(output.metrics, len(groups))
        loss: Tensor = output.loss
        return loss

    def _forwards(self, groups: Sequence[Branches]) -> Iterator[dict[str, Tensor]]:
        """The inputs of each forward pass, in order. A pass of several answers has at most ``forward_tokens``."""
        part: list[Branches] = []
        for group in groups:
            for number, answer in enumerate(group.answers):
                if self.shared_prompt and number and part:
                    larger = [*part[:-1], Branches(group.prompt, [*part[-1].answers, answer])]
                else:
                    larger = [*part, Branches(group.prompt, [answer])]
                if part and self.forward_tokens is not None and self._tokens(larger) > self.forward_tokens:
                    yield self._inputs(part)
                    larger = [Branches(group.prompt, [answer])]
                part = larger
        yield self._inputs(part)

    def _tokens(self, part: list[Branches]) -> int:
        """The number of tokens of a forward pass, including padding."""
        rows = 1 + max(row for row, _ in pack_trees(part)) if self.shared_prompt else len(part)
        return rows * max(map(tree_size, part))

    def _inputs(self, part: list[Branches]) -> dict[str, Tensor]:
        if self.shared_prompt:
            inputs = collate_tree(part, self.pad, self.model.dtype)
        else:
            inputs = collate_separate(part, self.pad)
        return {name: tensor.to(self.args.device) for name, tensor in inputs.items()}

    def score(self, model: Any, answers: Sequence[Branches]) -> Tensor:
        """The scores of answers, [N]."""
        return torch.cat([answer_scores(model, part) for part in self._forwards(answers)])

    def score_group(self, group: Branches, shared: bool) -> Tensor:
        """The scores of a group's answers, [K], with or without a shared prompt."""
        self.shared_prompt = shared
        return self.score(self.model, [group])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the loss, as means over the groups of all processes, to what the Trainer logs."""
        if "loss" in logs:
            logs.update(self.means.take())
        super().log(logs, start_time)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss, scores [G, K] and labels [G, K, 2] of a batch.

        Groups that are repeated so that each process has the same number are not scored; at least one is.
        """
        labels = inputs["labels"].to(self.args.device)
        counted = max(counted_rows(self.accelerator, len(labels)), 1)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, scores = self.compute_loss(model, {"groups": inputs["groups"][:counted]}, return_outputs=True)
        padded = torch.zeros(labels.shape[:2], device=labels.device)
        padded[:counted][labels[:counted, :, 0] >= 0] = scores
        return loss.detach(), padded, labels

    def _metrics(self, prediction: transformers.EvalPrediction) -> dict[str, float]:
        ranks, lengths = prediction.label_ids[..., 0], prediction.label_ids[..., 1]
        index: dict[tuple[int, ...], int] = {}  # of each distinct prompt
        prompts = [index.setdefault(tuple(group.branches.prompt), len(index)) for group in self.eval_dataset]
        groups = (prediction.predictions, ranks, lengths, self.scale, prompts)
        if self.is_world_process_zero():
            pairs.write(self.folder, self.state.global_step, pairs.pairs_of(*groups))
        return metrics.evaluate(*groups)


def ranked_scores(groups: Sequence[Ranked], scores: Tensor) -> RankedScores:
    """The batch for the loss; ``scores`` are in the groups' order. If any group has margins, the others get zeros."""
    sizes = torch.tensor([len(group.ranks) for group in groups])
    margins = [group.margins or [0.0] * len(group.ranks) for group in groups]
    return RankedScores(
        scores=scores,
        group=torch.repeat_interleave(torch.arange(len(groups)), sizes).to(scores.device),
        rank=torch.tensor([rank for group in groups for rank in group.ranks], device=scores.device),
        margin=torch.tensor([m for margin in margins for m in margin], device=scores.device)
        if any(group.margins for group in groups)
        else None,
    )


def finish(run: Run, trainer: RewardTrainer) -> dict[str, Any]:
    """Normalize the score on the demonstrations, evaluate the model as it is saved, and give a verdict."""
    config: RMConfig = run.config.stage.config
    good, name = demonstrations(run, config), "the demonstrations"
    if not good:
        good, name = [best_of(group) for group in trainer.train_dataset], "the best answer of each training ranking"
    answers = [Branches(g.branches.prompt, [answer]) for g in trainer.train_dataset for answer in g.branches.answers]
    ranked = random.Random(0).sample(answers, min(config.normalise_on, len(answers)))
    normalization = normalize(trainer, good[: config.normalise_on], ranked)
    normalization["over"] = name
    run.say(f"scores now have mean 0 and standard deviation 1 on {normalization['answers']} answers: {name}")
    record: dict[str, Any] = {"normalisation": normalization, "pad_token_id": run.score_pad_token_id}
    if trainer.eval_dataset is not None:
        record["verdict"] = metrics.verdict(trainer.evaluate())
        run.say(record["verdict"])
    return record


def demonstrations(run: Run, config: RMConfig) -> list[Branches]:
    """The last answers of the demonstrations that the policy was trained on, without those over ``max_length``."""
    answers = []
    for _, row in run.parent_rows("policy"):
        if isinstance(row, Demonstration) and row.messages[-1]["role"] == "assistant":
            prompt, answer = row.messages[:-1], row.messages[-1]
            try:
                ids, start = encode_answer(run.tokenizer, prompt, answer, run.stop_ids, tools=row.tools)
            except DataError:  # a bad row, which SFT left out too
                continue
            if len(ids) <= config.max_length:
                answers.append(Branches(ids[:start], [ids[start:]]))
        if len(answers) == config.normalise_on:
            break
    return answers


def best_of(group: Ranked) -> Branches:
    """A group's best answer."""
    best = min(range(len(group.ranks)), key=lambda index: group.ranks[index])
    return Branches(group.branches.prompt, [group.branches.answers[best]])
