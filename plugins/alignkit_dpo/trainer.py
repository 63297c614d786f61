"""DPO on TRL's trainer, with batches, forward pass and metrics of its own, and a loss that comes from a plugin."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import trl
from torch import Tensor

from alignkit import ConfigError, PreferenceLogps, Run
from alignkit.data import Ranked, encode_rankings, stored_dataset
from alignkit.evaluation import error_bar
from alignkit.models import (
    adapter_on_head,
    check_base_frozen,
    copy_adapter,
    disable_gradient_checkpointing,
    install_fused_head,
    kept_dtypes,
    use_adapter,
    uses_fused_head,
    without_dropout,
)
from alignkit.training import Means, RowMetrics, last_logged
from alignkit_dpo import metrics
from alignkit_dpo.answers import HeldOutAnswers
from alignkit_dpo.logps import answer_logps, shares_prompts
from alignkit_dpo.pairs import COLUMNS, Collator, pairs_of
from alignkit_dpo.reference import Reference, reference_of

if TYPE_CHECKING:
    from alignkit_dpo.config import DPOConfig


def build(run: Run) -> DPOTrainer:
    """Tokenise the rankings, load the policy and its reference, and build the trainer."""
    config: DPOConfig = run.config.stage.config
    if config.precompute_ref_log_probs and run.processes > 1:
        raise ConfigError("dpo.precompute_ref_log_probs needs a single process. Set it to false, or drop torchrun")
    rankings = encode_rankings(run, run.train_rows, config.max_length, config.too_long)
    held_out = encode_rankings(run, run.eval_rows, config.max_length, config.too_long) if run.eval_rows else []
    pairs = pairs_of(rankings)
    run.say(f"{len(pairs)} pairs from {len(rankings)} rankings")
    args = run.training_arguments(
        trl.DPOConfig,
        max_length=None,  # long answers were refused or left out above; TRL would truncate them
        precompute_ref_batch_size=run.config.train["per_device_eval_batch_size"],
        remove_unused_columns=False,
    )
    loss, optimizer = run.loss(), run.optimizer(args)  # before the model is loaded, as their settings may be wrong
    policy: Any = without_dropout(run.model("policy"))
    full = not hasattr(policy, "peft_config")
    started = "policy" in run.records and run.records["policy"]["weights"] == "adapter"
    reference = reference_of(run.config, adapters=not full, started=started)
    if reference.kind in ("adapter", "base"):
        check_base_frozen(policy)
    # otherwise TRL would load a reference model
    args.precompute_ref_log_probs = reference.precomputed or (full and reference.kind == "none")
    shared = shares_prompts(run, policy, pairs, args.device)
    trainer = DPOTrainer(
        run=run,
        loss=loss,
        reference=reference,
        held_out=held_out,
        optimizer_cls_and_kwargs=optimizer,
        model=policy,
        ref_model=copy.deepcopy(policy).requires_grad_(False).eval() if reference.kind == "model" else None,
        args=args,
        data_collator=Collator(run.tokenizer.pad_token_id, tree=policy.dtype if shared else None),
        train_dataset=stored_dataset(pairs, COLUMNS),
        eval_dataset=stored_dataset(pairs_of(held_out), COLUMNS) if held_out else None,
        processing_class=run.tokenizer,
        callbacks=run.callbacks(),
    )
    uses_fused_head(trainer.model, run.say)
    return trainer


class DPOTrainer(trl.DPOTrainer):
    """``trl.DPOTrainer`` with a loss that is a function of :class:`alignkit.PreferenceLogps`."""

    loss_is_scaled_for_ga = True  # the loss is divided by the pairs of the whole optimizer step

    def __init__(
        self,
        *,
        run: Run,
        loss: Any,
        reference: Reference,
        held_out: Sequence[Ranked],
        optimizer_cls_and_kwargs: Any,
        **kwargs: Any,
    ) -> None:
        self.loss, self.reference = loss, reference
        self.beta_of_rewards = getattr(run.config.loss.config, "beta", 1.0)
        self.answers = HeldOutAnswers(run, held_out)
        model = kwargs["model"]
        for each in (model, kwargs["ref_model"]):
            if each is not None:
                install_fused_head(each)
        with adapter_on_head(), kept_dtypes(model) as self._restore_dtypes:
            super().__init__(**kwargs)
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.means = Means(self.accelerator)  # over the pairs since the last log
        self.held_out = RowMetrics(self.accelerator)  # the pairs of an evaluation
        self.answer_metrics: dict[str, float] = {}  # of the same evaluation
        if "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")  # TRL's copy, which lacks adapters of embeddings
        if reference.kind == "adapter":
            copy_adapter(model, "default", "ref", trained=False)
            without_dropout(model)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        """The dataset as it is: it holds token ids already."""
        return dataset

    # --- one optimizer step ------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The microbatches of a step, and the number of their pairs on all processes: the loss is a mean over pairs."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(len(batch["pairs"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(pairs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a microbatch of :class:`alignkit_dpo.pairs.Collator`, as its share of the step's."""
        chosen, rejected = inputs["pairs"].T
        experts = {"output_router_logits": True} if self.aux_loss_enabled and model.training else {}
        logps, aux_loss = answer_logps(model, inputs, **experts)
        ref_chosen, ref_rejected = inputs.get("ref_chosen_logps"), inputs.get("ref_rejected_logps")
        if self.reference.needed and ref_chosen is None:
            ref_logps = self.ref_logps(inputs)
            ref_chosen, ref_rejected = ref_logps[chosen], ref_logps[rejected]
        batch = PreferenceLogps(
            chosen=logps[chosen],
            rejected=logps[rejected],
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            chosen_length=inputs["lengths"][chosen],
            rejected_length=inputs["lengths"][rejected],
        )
        output = self.loss(batch)
        loss: Tensor = output.loss
        of_pairs = metrics.of_pairs(batch, output, self.beta_of_rewards)
        if not model.training:
            self.held_out.add({**of_pairs, "prompt_index": inputs["prompt_index"]})
            return loss
        del of_pairs["loss"]  # the Trainer logs it
        self.means.add({name: values.mean() for name, values in of_pairs.items()}, len(chosen))
        self.means.count(num_tokens=inputs["tokens"].sum())
        loss = loss * len(chosen) / num_items_in_batch * self.accelerator.num_processes  # DDP averages over processes
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / self.current_gradient_accumulation_steps
        return loss

    # --- the reference -----------------------------------------------------------------------------------------------

    def ref_logps(self, inputs: dict[str, Tensor]) -> Tensor:
        """The log-probability of each answer of a batch under the reference, [N]."""
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self._reference_model() as model,
        ):
            return answer_logps(model, inputs)[0]

    @contextlib.contextmanager
    def _reference_model(self) -> Iterator[Any]:
        """The model that computes as the reference inside this context."""
        if self.reference.kind == "model":
            yield self.ref_model
        else:
            adapter = "ref" if self.reference.kind == "adapter" else None
            with use_adapter(self.accelerator.unwrap_model(self.model), adapter):
                yield self.model

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The dataset with reference log-probabilities, if they are computed ahead. TRL's ``__init__`` calls it."""
        if not self.reference.precomputed:
            return dataset
        self._restore_dtypes()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of chosen and rejected answers, [B] each. TRL calls it before training, when the policy is the reference."""
        with torch.no_grad(), self.accelerator.autocast():
            logps, _ = answer_logps(model, inputs)
        chosen, rejected = inputs["pairs"].T
        return logps[chosen], logps[rejected]

    # --- evaluation and logging --------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics of the held-out pairs, and of answers that the policy samples to their prompts."""
        self.held_out.take()  # leftovers of an evaluation that was interrupted
        self.answer_metrics = self.answers.evaluate(self)
        evaluated: dict[str, float] = super().evaluate(*args, **kwargs)
        return evaluated

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add means over the pairs of all microbatches and processes to what the Trainer logs."""
        if any(name.startswith("eval_") for name in logs):
            logs.update(self._held_out_metrics())
        elif "loss" in logs:
            means = self.means.take()
            logs.update({**means, "num_tokens": int(means["num_tokens"] + last_logged(self.state, "num_tokens"))})
        super().log(logs, start_time)

    def _held_out_metrics(self) -> dict[str, float]:
        """Means over the pairs of the evaluation, with the accuracy's standard error over prompts."""
        pairs = self.held_out.take()
        if not pairs:
            return {}
        prompts = pairs.pop("prompt_index")
        return {
            **{f"eval_{name}": float(values.double().mean()) for name, values in pairs.items()},
            **error_bar("eval_accuracy_error", pairs["accuracy"], prompts),
            "eval_pairs": len(prompts),
            **self.answer_metrics,
        }

    # --- saving ------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the policy only: the reference is the run that it started from."""
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / "ref", ignore_errors=True)
