"""KTO on TRL's trainer, with alignkit's tokens, reference and loss."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import peft
import torch
import trl

from alignkit import ConfigError, DataError, Located, Run
from alignkit.data import IGNORE, encode_answer, encode_each
from alignkit.models import fused_logps, install_fused_head, kept_dtypes
from alignkit_kto import JudgedLogps, KtoConfig, judgements

if TYPE_CHECKING:
    from collections import Counter


def build(run: Run) -> KTOTrainer:
    """Tokenise the rows, load the policy, and put both into a trainer."""
    config: KtoConfig = run.config.stage.config
    args = run.training_arguments(trl.KTOConfig, max_length=None, train_sampling_strategy="sequential")
    if args.per_device_train_batch_size < 2:
        raise ConfigError(
            "kto swaps answers among the prompts of a batch: train.per_device_train_batch_size must be 2 or more"
        )
    train_dataset = tokenize(run, run.train_rows, config, args)
    eval_dataset = tokenize(run, run.eval_rows, config, args) if run.eval_rows else None
    loss, optimizer = run.loss(), run.optimizer(args)  # before the model: they can raise an error
    policy: Any = run.model("policy")
    # TRL copies an adapter to be the reference; a full model needs a second, frozen model
    reference = None if isinstance(policy, peft.PeftModel) else copy.deepcopy(policy).requires_grad_(False)
    return KTOTrainer(
        loss=loss,
        optimizer=optimizer,
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=run.tokenizer,
        callbacks=run.callbacks(),
    )


def tokenize(run: Run, rows: Sequence[Located], config: KtoConfig, args: Any) -> datasets.Dataset:
    """Rows in the form that TRL's trainer prepares, shuffled once.

    ``KL_completion_ids`` is the answer of the previous row in the batch: KTO estimates the KL from answers to other
    prompts. The trainer therefore must not shuffle.

    Raises:
        DataError: a row is longer than ``max_length``.
    """
    examples: list[dict[str, Any]] = []

    def encode(row: Any, notes: Counter[str]) -> list[dict[str, Any]]:
        sequences = []
        for judged in judgements(row):
            ids, start = encode_answer(run.tokenizer, judged.prompt, judged.answer, run.stop_ids, notes)
            sequences.append({"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": judged.good})
        return sequences

    for where, sequences in encode_each(run, rows, encode):
        for sequence in sequences:
            tokens = len(sequence["prompt_ids"]) + len(sequence["completion_ids"])
            if tokens > config.max_length:
                raise DataError(f"{where}: {tokens} tokens, over kto.max_length={config.max_length}")
        examples += sequences
    good = sum(example["label"] for example in examples)
    run.say(f"{good} good answers and {len(examples) - good} bad ones in {len(rows)} rows")
    random.Random(args.seed).shuffle(examples)
    size = args.per_device_train_batch_size
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        for example, previous in zip(batch, [batch[-1], *batch[:-1]], strict=True):
            example["KL_completion_ids"] = previous["completion_ids"]
    return datasets.Dataset.from_list(examples)


class KTOTrainer(trl.KTOTrainer):
    """``trl.KTOTrainer`` with a loss that is a function of :class:`JudgedLogps`."""

    def __init__(self, *, loss: Any, optimizer: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for each in (model, kwargs["ref_model"]):
            if each is not None:
                install_fused_head(each)
        with kept_dtypes(model):  # TRL rounds the adapters of a quantised model to bf16
            super().__init__(**kwargs)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        if kwargs["ref_model"] is None:  # TRL copies only weights with LoRA's names
            weights = peft.get_peft_model_state_dict(model, adapter_name="default")
            peft.set_peft_model_state_dict(model, weights, adapter_name="ref")
        self.loss, self.optimizer_cls_and_kwargs = loss, optimizer

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset  # `tokenize` has encoded it, with alignkit's chat template and stop tokens

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a microbatch: B answers, and the same answers paired with other prompts."""
        good = inputs["label"].bool()
        ref_logps, ref_others = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        with torch.no_grad():
            others = answer_logps(model, inputs, "KL_")
        kl = self.accelerator.gather_for_metrics((others - ref_others).mean()).mean().clamp(min=0)
        logps = answer_logps(model, inputs)
        output = self.loss(JudgedLogps(logps, ref_logps, good, kl))
        gain = (logps - ref_logps).detach()
        metrics = {"kl": kl, **output.metrics}
        if good.any() and not good.all():
            metrics["margin"] = gain[good].mean() - gain[~good].mean()
        for name, value in metrics.items():
            self._metrics["train" if model.training else "eval"][name].append(float(value))
        return output.loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy without the reference, which is in the SFT run."""
        super().save_model(output_dir, _internal_call)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / "ref", ignore_errors=True)


def answer_logps(model: Any, inputs: dict[str, Any], prefix: str = "") -> torch.Tensor:
    """The log-probability of each answer, summed over its tokens, [B]; ``prefix`` is that of its columns."""
    ids, answer = inputs[f"{prefix}input_ids"], inputs[f"{prefix}completion_mask"].bool()
    labels = ids.masked_fill(~answer, IGNORE)
    fields = {"input_ids": ids, "attention_mask": inputs[f"{prefix}attention_mask"], "labels": labels}
    logps: torch.Tensor = fused_logps(model, fields).log_probs.sum(-1)
    return logps
