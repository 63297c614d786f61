"""SFT on TRL's trainer, with tokenization and metrics of its own, and a loss that comes from a plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
import trl

from alignkit import DataError, Located, Run, TokenLogps
from alignkit.data import IGNORE, SequenceEncoder, check_column_fits, encode_rows
from alignkit.models import adapter_on_head, fused_logps, install_fused_head, kept_dtypes, uses_fused_head
from alignkit.training import Means, StreamedExamples, StreamState, counted_rows, last_logged
from alignkit_sft import packing, perplexity, streaming

if TYPE_CHECKING:
    from alignkit_sft.config import SFTConfig


def build(run: Run) -> SFTTrainer:
    """Tokenize the rows, load the policy, and build the trainer."""
    config: SFTConfig = run.config.stage.config
    stream = streaming.examples(run, config) if run.stream else None
    train_dataset = _placeholder() if stream else tokenize(run, run.train_rows, config)
    eval_dataset = tokenize(run, run.eval_rows, config) if run.eval_rows else None
    args = run.training_arguments(
        trl.SFTConfig,
        max_length=config.max_length if config.packing else None,  # `tokenize` handles long rows
        packing=config.packing,
        eval_packing=False,
        ignore_data_skip=stream is not None,  # it resumes by itself
    )
    loss, optimizer = run.loss(), run.optimizer(args)  # before the model is loaded, as their settings may be wrong
    trainer = SFTTrainer(
        loss=loss,
        model=run.model("policy"),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=run.tokenizer,
        callbacks=run.callbacks(),
        optimizer_cls_and_kwargs=optimizer,
    )
    if stream:
        trainer.train_dataset = stream
        trainer.add_callback(StreamState(stream))
    uses_fused_head(trainer.model, run.say)
    if config.packing:
        packing.check(trainer)
    return trainer


def tokenize(run: Run, rows: Sequence[Located], config: SFTConfig) -> datasets.Dataset:
    """Rows as ``input_ids`` and ``labels``, with ``too_long`` applied. A row may become several (see :func:`encode`).

    Raises:
        DataError: a row is longer than ``max_length`` and ``too_long`` is ``error``, or no row is left.
    """
    cut = config.too_long == "cut"
    encoder = SequenceEncoder(run.tokenizer, run.stop_ids, max_length=config.max_length, cut=cut)
    encoded = encode_rows(run, rows, encoder)
    lengths = encoded.column("length").to_numpy()
    kept = np.flatnonzero(encoded.column("input_ids").is_valid())
    if over := int((lengths > config.max_length).sum()):
        longest = np.nanmax(lengths)
        where = max(encoded.where(int(record)) for record in np.flatnonzero(lengths == longest))
        sequences = int((lengths >= 0).sum())
        counts = f"{over} of {sequences} rows are over {config.max_length} tokens, the longest {longest:.0f} ({where})"
        if config.too_long == "error":
            raise DataError(f"{counts}. Raise sft.max_length, or set sft.too_long to skip or cut")
        skipped = sequences - len(kept)
        run.say(f"{counts}: {skipped} skipped, {over - skipped} cut")
    if not len(kept):
        raise DataError(f"no row fits into sft.max_length={config.max_length} tokens")
    check_column_fits(run, encoded, "input_ids")
    return encoded.dataset.select_columns(["input_ids", "labels"]).select(kept)


def _placeholder() -> datasets.Dataset:
    """TRL's trainer can only be built with a dataset of the ``datasets`` library."""
    return datasets.Dataset.from_list([{"input_ids": [0], "labels": [0]}])


class SFTTrainer(trl.SFTTrainer):
    """``trl.SFTTrainer`` with a loss that is a function of :class:`alignkit.TokenLogps`."""

    loss_is_scaled_for_ga = True  # the loss is divided by the target tokens of the whole optimizer step

    def __init__(self, *, loss: Any, **kwargs: Any) -> None:
        install_fused_head(kwargs["model"])
        with adapter_on_head(), kept_dtypes(kwargs["model"]):
            super().__init__(**kwargs)
        self.loss = loss
        self.model_accepts_loss_kwargs = True  # makes the Trainer count target tokens, whatever the model's signature
        self.means, self.held_out = Means(self.accelerator), Means(self.accelerator)  # over tokens

    def get_train_dataloader(self) -> Any:
        """The batches of a step; those of a stream, without ``accelerate``."""
        if isinstance(stream := self.train_dataset, StreamedExamples):
            return stream.loader(self._train_batch_size, self.data_collator, self.args.dataloader_pin_memory)
        return super().get_train_dataloader()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a microbatch, as its share of the step's; ``input_ids`` and ``labels`` are [B, T]."""
        if self.aux_loss_enabled:  # mixture of experts
            inputs["output_router_logits"] = True
        outputs = fused_logps(model, inputs)
        tokens = outputs.label_mask.sum()
        counted = num_items_in_batch is not None and model.training
        step_tokens = torch.as_tensor(num_items_in_batch) if counted else tokens
        output = self.loss(TokenLogps(outputs.log_probs, outputs.label_mask, step_tokens.clamp(min=1)))
        loss = output.loss
        metrics = {"mean_token_accuracy": outputs.is_top1.sum() / tokens}
        for name, value in output.metrics.items():  # a share of the step's mean, as the loss
            metrics[name] = value * step_tokens / tokens
        if model.training:
            self.means.add(metrics, tokens)
            self.means.count(num_tokens=_input_tokens(inputs))
        else:  # the Trainer's own loss is a mean over batches, which gives short answers more weight
            self.held_out.add(metrics | {"loss": loss}, tokens)
            row = _row_of(inputs)[:, 1:]
            virtual = outputs.log_probs.size(1) - row.size(1)  # tokens that prompt tuning puts before the row
            row = torch.nn.functional.pad(row, (virtual, 0))
            self.held_out.count(**perplexity.sums(-outputs.log_probs, outputs.label_mask, row))
        if counted:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over processes
        if self.aux_loss_enabled and model.training:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, without the rows that are repeated so that each process has the same number."""
        size = self.args.eval_batch_size
        if (rows := counted_rows(self.accelerator, size)) < size:
            inputs["labels"] = inputs["labels"].masked_fill(_row_of(inputs) >= rows, IGNORE)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add means over the tokens of all microbatches and processes to what the Trainer logs."""
        if any(key.startswith("eval_") for key in logs):
            metrics = self.held_out.take()
            metrics |= perplexity.of({name: metrics.pop(name) for name in perplexity.SUMS if name in metrics})
            logs.update({f"eval_{name}": value for name, value in metrics.items()})
        else:
            metrics = self.means.take()
            if "num_tokens" in metrics:
                metrics["num_tokens"] = int(metrics["num_tokens"] + last_logged(self.state, "num_tokens"))
            logs.update(metrics)
        super().log(logs, start_time)


def _row_of(inputs: dict[str, Any]) -> torch.Tensor:
    """The row of each token of a batch, [B, T]: packed rows each begin at position 0."""
    if "position_ids" in inputs:
        return (inputs["position_ids"] == 0).cumsum(1) - 1
    labels = inputs["labels"]
    return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)


def _input_tokens(inputs: dict[str, Any]) -> Any:
    """The number of tokens of a microbatch, without padding."""
    return inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
