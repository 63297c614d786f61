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
from alignkit.training import ReferenceTrainer, counted_rows, load_with_reference, reference_arguments
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
    batches = [size * args.world_size for size in (args.per_device_train_batch_size, args.per_device_eval_batch_size)]
    trainer = KTOTrainer(
        run=run,
        loss=loss,
        evaluate_answers=HeldOutAnswers(run, held_out.prompts() if held_out else []).evaluate,
        optimizer_cls_and_kwargs=optimizer,
        **load_with_reference(run, args),
        args=args,
        data_collator=Collator(run.tokenizer.pad_token_id),
        train_dataset=answers.dataset(batches[0], seed),
        eval_dataset=held_out.dataset(batches[1], seed) if held_out else None,
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
        """The loss of a microbatch of :class:`alignkit_kto.answers.Collator`, as its share of the step's."""
        good = inputs["good"]
        ref_logps, kl = self._reference(model, inputs) if self.reference.needed else (None, None)
        experts: dict[str, Any] = {"output_router_logits": True} if self.aux_loss_enabled and model.training else {}
        logps, aux_loss = answer_logps(model, inputs, **experts)
        batch = RatedLogps(logps, ref_logps, good, (inputs["labels"] != IGNORE).sum(1), kl)
        output = self.loss(self.counted(batch))
        of_answers = metrics.of_answers(batch, output, self.beta_of_rewards)
        if not model.training:
            self.held_out.add({**of_answers, "good": good, "prompt_index": inputs["prompt_index"]})
            return output.loss
        del of_answers["loss"]  # the Trainer logs it
        metrics.add_means(self.means, of_answers, good)
        self.means.count(num_tokens=inputs["attention_mask"].sum())
        return self.share_of_step(output.loss, len(good), num_items_in_batch, aux_loss)

    def _reference(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The reference's log-probability of each answer, [B], and the KL of the policy to it.

        The KL is the mean log-ratio of answers to other prompts over the batches of all processes, or 0 if that is
        negative (section 3.1 of the paper).
        """
        ref_logps, ref_others = inputs.get("ref_logps"), inputs.get("ref_KL_logps")
        if ref_logps is None or ref_others is None:
            with self.as_reference() as reference:
                (ref_logps, _), (ref_others, _) = (answer_logps(reference, inputs, each) for each in ("", "other_"))
        with self.without_gradients():
            others, _ = answer_logps(model, inputs, "other_")
        log_ratios = others - ref_others
        if not model.training:
            log_ratios = log_ratios[: counted_rows(self.accelerator, len(log_ratios))]
        total = torch.stack([log_ratios.sum(), log_ratios.new_full((), len(log_ratios))])
        total = self.accelerator.reduce(total)
        return ref_logps, (total[0] / total[1]).clamp(min=0)

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
        """See :func:`alignkit_kto.metrics.of_evaluation`."""
        return metrics.of_evaluation(rows)
