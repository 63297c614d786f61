"""KTO on TRL's trainer, with batches, forward passes and metrics of its own, and a loss that comes from a plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import trl
from torch import Tensor

from alignkit import RatedLogps, Run
from alignkit.data import IGNORE
from alignkit.evaluation import HeldOutAnswers
from alignkit.models import uses_fused_head
from alignkit.training import ReferenceTrainer, load_with_reference, reference_arguments
from alignkit_kto import metrics
from alignkit_kto.answers import Collator, RatedAnswers, answer_logps, inputs

if TYPE_CHECKING:
    from alignkit_kto.config import KTOConfig


def build(run: Run) -> KTOTrainer:
    """Tokenize the rated answers, load the policy and its reference, and build the trainer."""
    config: KTOConfig = run.config.stage.config
    answers = RatedAnswers(run, run.train_rows, config, training=True)
    held_out = RatedAnswers(run, run.eval_rows, config, training=False) if run.eval_rows else None
    # the rows are shuffled once, and their batches estimate the KL
    args = reference_arguments(run, trl.KTOConfig, train_sampling_strategy="sequential")
    loss, optimizer = run.loss(), run.optimizer(args)  # before the model is loaded, as their settings may be wrong
    seed = args.seed if args.data_seed is None else args.data_seed
    batch_size = args.per_device_train_batch_size * args.world_size
    trainer = KTOTrainer(
        run=run,
        loss=loss,
        evaluate_answers=HeldOutAnswers(run, held_out.prompts() if held_out else []).evaluate,
        optimizer_cls_and_kwargs=optimizer,
        **load_with_reference(run, args),
        args=args,
        data_collator=Collator(run.tokenizer.pad_token_id),
        train_dataset=answers.dataset(batch_size, seed),
        eval_dataset=held_out.dataset(len(held_out.places), seed) if held_out else None,
        processing_class=run.tokenizer,
        callbacks=run.callbacks(),
    )
    uses_fused_head(trainer.model, run.say)
    return trainer


class KTOTrainer(ReferenceTrainer, trl.KTOTrainer):
    """``trl.KTOTrainer`` with a loss that is a function of :class:`alignkit.RatedLogps`."""

    row = "good"

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a microbatch of :class:`alignkit_kto.answers.Collator`, as its share of the step's.

        In an evaluation it is NaN: :meth:`held_out_metrics` computes the loss of all held-out answers.
        """
        good, length = inputs["good"], (inputs["labels"] != IGNORE).sum(1)
        ref_logps, log_ratios = self._reference(model, inputs) if self.reference.needed else (None, None)
        if not model.training:
            logps, _ = answer_logps(model, inputs)
            rows = {"logps": logps, "good": good, "length": length, "prompt_index": inputs["prompt_index"]}
            if ref_logps is not None and log_ratios is not None:
                rows |= {"ref_logps": ref_logps, "other_log_ratios": log_ratios}
            self.held_out.add(rows)
            return logps.new_full((), torch.nan)
        kl = None if log_ratios is None else self._kl(log_ratios)
        experts: dict[str, Any] = {"output_router_logits": True} if self.aux_loss_enabled else {}
        logps, aux_loss = answer_logps(model, inputs, **experts)
        batch = RatedLogps(logps, ref_logps, good, length, kl)
        output = self.loss(batch)
        of_answers = metrics.of_answers(batch, output, self.beta_of_rewards)
        del of_answers["loss"]  # the Trainer logs it
        metrics.add_means(self.means, of_answers, good)
        self.means.count(num_tokens=inputs["attention_mask"].sum())
        return self.share_of_step(output.loss, len(good), num_items_in_batch, aux_loss)

    def _reference(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The reference's log-probability of each answer, and the log-ratio of each answer to another prompt, [B]."""
        ref_logps, ref_others = inputs.get("ref_logps"), inputs.get("ref_KL_logps")
        if ref_logps is None or ref_others is None:
            with self.as_reference() as reference:
                (ref_logps, _), (ref_others, _) = (answer_logps(reference, inputs, each) for each in ("", "other_"))
        with self.without_gradients():
            others, _ = answer_logps(model, inputs, "other_")
        return ref_logps, others - ref_others

    def _kl(self, log_ratios: Tensor) -> Tensor:
        """The mean log-ratio over the batches of all processes, or 0 if it is negative (section 3.1 of the paper)."""
        total = torch.stack([log_ratios.sum(), log_ratios.new_full((), len(log_ratios))])
        total = self.accelerator.reduce(total)
        return (total[0] / total[1]).clamp(min=0)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of the answers and of those to other prompts, [B] each. TRL calls it before training, with the policy."""
        with torch.no_grad(), self.accelerator.autocast():
            return answer_logps(model, inputs)[0], answer_logps(model, inputs, "other_")[0]

    def answer_batch(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> dict[str, Tensor]:
        """See :class:`alignkit.training.ReferenceTrainer`."""
        return inputs(prompts, answers, self.processing_class.pad_token_id)

    def answer_logps(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """See :class:`alignkit.training.ReferenceTrainer`."""
        return answer_logps(model, batch)[0]

    def training_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """The means since the last log, with the margin between the rewards of good and of bad answers."""
        return {**means, **metrics.margin(means)}

    def held_out_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """The metrics of all held-out answers as one batch, with one KL, whatever the batch size of the evaluation."""
        on_device = {name: values.to(self.accelerator.device) for name, values in rows.items()}
        log_ratios = on_device.get("other_log_ratios")
        kl = None if log_ratios is None else log_ratios.mean().clamp(min=0)
        batch = RatedLogps(on_device["logps"], on_device.get("ref_logps"), on_device["good"], on_device["length"], kl)
        with torch.no_grad():
            of_answers = metrics.of_answers(batch, self.loss(batch), self.beta_of_rewards)
        return metrics.of_evaluation({name: values.cpu() for name, values in of_answers.items()}, rows)
