"""KTO on TRL's trainer: ours are the tokens that it sees, what its reference is, and the loss."""

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
    loss, optimizer = run.loss(), run.optimizer(args)  # before the model: they may refuse
    policy: Any = run.model("policy")
    # an adapter's reference is a frozen copy of it, which TRL makes; a whole model's is a frozen second one
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
    """Rows as TRL's trainer has them when it has prepared them, in an order that is drawn once.

    ``KL_completion_ids`` is the answer of the row before, within each batch: what the policy says of answers to other
    prompts tells how far it is from the reference. The trainer therefore reads in this order.

    Raises:
        DataError: a row is longer than ``max_length``.
    """
    found: list[dict[str, Any]] = []

    def encoded(row: Any, notes: Counter[str]) -> list[dict[str, Any]]:
        sequences = []
        for judged in judgements(row):
            ids, start = encode_answer(run.tokenizer, judged.prompt, judged.answer, run.stop_ids, notes)
            sequences.append({"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": judged.good})
        return sequences

    for where, sequences in encode_each(run, rows, encoded):
        for one in sequences:
            tokens = len(one["prompt_ids"]) + len(one["completion_ids"])
            if tokens > config.max_length:
                raise DataError(f"{where}: {tokens} tokens, over kto.max_length={config.max_length}")
        found += sequences
    good = sum(row["label"] for row in found)
    run.say(f"{good} good answers and {len(found) - good} bad ones in {len(rows)} rows")
    random.Random(args.seed).shuffle(found)
    size = args.per_device_train_batch_size
    for start in range(0, len(found), size):
        batch = found[start : start + size]
        for one, before in zip(batch, [batch[-1], *batch[:-1]], strict=True):
            one["KL_completion_ids"] = before["completion_ids"]
    return datasets.Dataset.from_list(found)


class KTOTrainer(trl.KTOTrainer):
    """``trl.KTOTrainer`` with a loss that is a function of :class:`JudgedLogps`."""

    def __init__(self, *, loss: Any, optimizer: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        for each in (model, kwargs["ref_model"]):
            if each is not None:
                install_fused_head(each)
        with kept_dtypes(model):
            super().__init__(**kwargs)
        for name, p in model.named_parameters():
            p.requires_grad_(name in trained)
        if kwargs["ref_model"] is None:  # TRL copies weights by LoRA's names alone, which other adapters have not
            weights = peft.get_peft_model_state_dict(model, adapter_name="default")
            peft.set_peft_model_state_dict(model, weights, adapter_name="ref")
        self.loss, self.optimizer_cls_and_kwargs = loss, optimizer

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset  # `tokenize` did it, in our template and with our ends of answers

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """One microbatch of B answers, and as many that are paired with another prompt -> the loss, scalar."""
        good = inputs["label"].bool()
        ref_logps, ref_others = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        with torch.no_grad():
            others = logps_of(model, inputs, "KL_")
        kl = self.accelerator.gather_for_metrics((others - ref_others).mean()).mean().clamp(min=0)
        logps = logps_of(model, inputs)
        output = self.loss(JudgedLogps(logps, ref_logps, good, kl))
        gain = (logps - ref_logps).detach()
        told = {"kl": kl, **output.metrics}
        if good.any() and not good.all():
            told["margin"] = gain[good].mean() - gain[~good].mean()
        for name, value in told.items():
            self._metrics["train" if model.training else "eval"][name].append(float(value))
        return output.loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Without the reference, which the SFT run holds already."""
        super().save_model(output_dir, _internal_call)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / "ref", ignore_errors=True)


def logps_of(model: Any, inputs: dict[str, Any], which: str = "") -> torch.Tensor:
    """Log-probabilities of answers, each summed over its tokens, [B]."""
    ids, answer = inputs[f"{which}input_ids"], inputs[f"{which}completion_mask"].bool()
    labels = ids.masked_fill(~answer, IGNORE)
    fields = {"input_ids": ids, "attention_mask": inputs[f"{which}attention_mask"], "labels": labels}
    found: torch.Tensor = fused_logps(model, fields).log_probs.sum(-1)
    return found
