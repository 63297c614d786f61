"""DPO on TRL's trainer, with batches, forward pass and metrics of its own, and a loss that comes from a plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import trl
from torch import Tensor

from alignkit import PreferenceLogps, Run
from alignkit.data import Branches, encode_rankings, stored_dataset
from alignkit.evaluation import HeldOutAnswers, error_bar
from alignkit.models import uses_fused_head
from alignkit.training import ReferenceTrainer, load_with_reference, reference_arguments
from alignkit_dpo import metrics
from alignkit_dpo.logps import answer_logps, shares_prompts
from alignkit_dpo.pairs import COLUMNS, Collator, inputs, pairs_of

if TYPE_CHECKING:
    from alignkit_dpo.config import DPOConfig


def build(run: Run) -> DPOTrainer:
    """Tokenize the rankings, load the policy and its reference, and build the trainer."""
    config: DPOConfig = run.config.stage.config
    rankings = encode_rankings(run, run.train_rows, config.max_length, config.too_long)
    held_out = encode_rankings(run, run.eval_rows, config.max_length, config.too_long) if run.eval_rows else []
    pairs = pairs_of(rankings)
    run.say(f"{len(pairs)} pairs from {len(rankings)} rankings")
    args = reference_arguments(run, trl.DPOConfig)
    loss, optimizer = run.loss(), run.optimizer(args)  # before the model is loaded, as their settings may be wrong
    models = load_with_reference(run, args)
    policy = models["model"]
    shared = shares_prompts(run, policy, pairs, args.device)
    trainer = DPOTrainer(
        run=run,
        loss=loss,
        evaluate_answers=HeldOutAnswers(run, [(each.prompt, each.branches.prompt) for each in held_out]).evaluate,
        optimizer_cls_and_kwargs=optimizer,
        **models,
        args=args,
        data_collator=Collator(run.tokenizer.pad_token_id, tree=policy.dtype if shared else None),
        train_dataset=stored_dataset(pairs, COLUMNS),
        eval_dataset=stored_dataset(pairs_of(held_out), COLUMNS) if held_out else None,
        processing_class=run.tokenizer,
        callbacks=run.callbacks(),
    )
    uses_fused_head(trainer.model, run.say)
    return trainer


class DPOTrainer(ReferenceTrainer, trl.DPOTrainer):
    """``trl.DPOTrainer`` with a loss that is a function of :class:`alignkit.PreferenceLogps`."""

    row = "pairs"

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a microbatch of :class:`alignkit_dpo.pairs.Collator`, as its share of the step's."""
        chosen, rejected = inputs["pairs"].T
        experts = {"output_router_logits": True} if self.aux_loss_enabled and model.training else {}
        logps, aux_loss = answer_logps(model, inputs, **experts)
        ref_chosen, ref_rejected = inputs.get("ref_chosen_logps"), inputs.get("ref_rejected_logps")
        if self.reference.needed and ref_chosen is None:
            with self.as_reference() as reference:
                ref_logps, _ = answer_logps(reference, inputs)
            ref_chosen, ref_rejected = ref_logps[chosen], ref_logps[rejected]
        batch = PreferenceLogps(
            chosen=logps[chosen],
            rejected=logps[rejected],
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            chosen_length=inputs["lengths"][chosen],
            rejected_length=inputs["lengths"][rejected],
        )
        output = self.loss(self.counted(batch))
        of_pairs = metrics.of_pairs(batch, output, self.beta_of_rewards)
        if not model.training:
            self.held_out.add({**of_pairs, "prompt_index": inputs["prompt_index"]})
            return output.loss
        del of_pairs["loss"]  # the Trainer logs it
        self.means.add({name: values.mean() for name, values in of_pairs.items()}, len(chosen))
        self.means.count(num_tokens=inputs["tokens"].sum())
        return self.share_of_step(output.loss, len(chosen), num_items_in_batch, aux_loss)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of chosen and rejected answers, [B] each. TRL calls it before training, when the policy is the reference."""
        with torch.no_grad(), self.accelerator.autocast():
            logps, _ = answer_logps(model, inputs)
        chosen, rejected = inputs["pairs"].T
        return logps[chosen], logps[rejected]

    def answer_batch(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> dict[str, Tensor]:
        """See :class:`alignkit.training.ReferenceTrainer`."""
        groups = [Branches(prompt, [answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        return inputs(groups, Collator(self.processing_class.pad_token_id))

    def answer_logps(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """See :class:`alignkit.training.ReferenceTrainer`."""
        return answer_logps(model, batch)[0]

    def held_out_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Means over the pairs of the evaluation, with the accuracy's standard error over prompts."""
        prompts = rows.pop("prompt_index")
        return {
            **{f"eval_{name}": float(values.double().mean()) for name, values in rows.items()},
            **error_bar("eval_accuracy_error", rows["accuracy"], prompts),
            "eval_pairs": len(prompts),
        }
