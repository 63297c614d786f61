"""Metrics of held-out pairs, and of answers that the policy samples to their prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignkit import Sampling
from alignkit.data import ids_key
from alignkit.evaluation import error_bar
from alignkit.generation import sample, text
from alignkit.models import gathered
from alignkit.runs import write_answers
from alignkit.training import RowMetrics, counted_rows
from alignkit_rahf.losses import contrast_loss, right_and_wrong
from alignkit_rahf.pairs import Texts, both

if TYPE_CHECKING:
    from alignkit_rahf.trainer import RAHFTrainer


class HeldOut:
    """Evaluates the contrast and the policy on the held-out pairs of a trainer."""

    def __init__(self, trainer: RAHFTrainer) -> None:
        distinct = {ids_key(pair.branches.prompt): pair for pair in trainer.eval_dataset or ()}
        self.trainer, self.run = trainer, trainer.run
        self.prompts = list(distinct.values())[: trainer.config.eval_prompts]
        self.rows = RowMetrics(trainer.accelerator)

    def evaluate(self) -> dict[str, float]:
        """All held-out metrics, with standard errors over prompts. ``answers.jsonl`` gets the sampled answers."""
        self.trainer.roles.eval()
        self.rows.take()  # leftovers of an evaluation that was interrupted
        with torch.no_grad(), self.trainer.accelerator.autocast():
            of_answers = self._of_answers() if self.prompts else {}
            for batch in self.trainer.get_eval_dataloader():
                self.rows.add(self._of_batch(batch))
        return {**self._of_pairs(self.rows.take()), **of_answers}

    def _of_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """For each pair of a batch the log-probabilities of its answers under each role, and its fit, [B] each."""
        trainer, pairs = self.trainer, batch["pairs"]
        jobs = {role: trainer.job(role, both(pairs)) for role in ("policy", "reference")}
        values = trainer.roles({**jobs, **trainer.contrast(pairs)})
        values["length"] = torch.tensor([len(answer) for answer in both(pairs).answers], device=trainer.args.device)
        rows = {"prompt_key": batch["prompt_key"]}
        for name, of_answers in values.items():
            rows[f"{name}_chosen"], rows[f"{name}_rejected"] = of_answers.chunk(2)
        if not trainer.contrasting:
            counted = pairs[: max(counted_rows(trainer.accelerator, len(pairs)), 1)]  # the loss is of the whole batch
            output, _ = trainer.loss_of_fit(trainer.roles, counted, num_tokens=1)
            rows["fit"] = output.loss.expand(len(pairs)) / len(counted)
        return rows

    def _of_pairs(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Metrics from the rows of all pairs, [N] each."""
        chosen, rejected = ({name: rows[f"{name}_{side}"] for name in NAMES} for side in ("chosen", "rejected"))
        everything = {name: torch.cat([chosen[name], rejected[name]]) for name in NAMES}
        right, wrong = right_and_wrong(everything["good"], everything["bad"])
        lengths, config, prompts = everything["length"], self.trainer.config, rows["prompt_key"]
        loss = contrast_loss(
            right,
            None if config.contrast == "dual" else wrong,
            lengths,
            config.label_smoothing,
            lengths.sum(),
            torch.tensor(len(lengths)),
        )
        contrast = (chosen["good"] - chosen["bad"]) - (rejected["good"] - rejected["bad"])
        margin = (chosen["policy"] - chosen["reference"]) - (rejected["policy"] - rejected["reference"])
        return {
            "eval_contrast_loss": float(loss),
            **mean_and_error("contrast_accuracy", is_positive(contrast), prompts),
            **({"eval_fit_loss": float(rows["fit"].sum() / lengths.sum())} if "fit" in rows else {}),
            **mean_and_error("accuracy", is_positive(margin), prompts),
            **mean_and_error("margin", margin, prompts),
            "eval_logps_chosen": float(chosen["policy"].mean()),
            "eval_logps_rejected": float(rejected["policy"].mean()),
            "eval_pairs": len(margin),
        }

    def _of_answers(self) -> dict[str, float]:
        """Sample one answer to each prompt, always with the same seed, and write it to ``answers.jsonl``."""
        trainer, run, config = self.trainer, self.run, self.trainer.config
        sampling = Sampling(config.response_length, temperature=1.0, stop_ids=tuple(run.stop_ids))
        size, answers, kl = trainer.args.per_device_eval_batch_size, list[list[int]](), list[float]()
        torch.manual_seed(trainer.args.seed)  # random states are restored after an evaluation
        for start in range(0, len(self.prompts), size):
            prompts = [pair.branches.prompt for pair in self.prompts[start : start + size]]
            with trainer.roles.using("policy") as policy, gathered(trainer.roles, policy):
                sampled = sample(policy, run.tokenizer, prompts, sampling, run.say)
            texts = Texts(prompts, sampled)
            logps = trainer.roles({role: trainer.job(role, texts) for role in ("policy", "reference")})
            answers, kl = answers + sampled, kl + (logps["policy"] - logps["reference"]).tolist()
        lengths = [len(answer) for answer in answers]
        ended = [answer[-1] in sampling.stop_ids for answer in answers]
        if trainer.is_world_process_zero():
            write_answers(
                run.folder,
                trainer.state.global_step,
                [pair.prompt for pair in self.prompts],
                [text(run.tokenizer, answer) for answer in answers],
                kl=kl,
                length=lengths,
                ended=ended,
            )
        return {
            "eval_kl": sum(kl) / len(kl),
            **error_bar("eval_kl_error", kl),
            "eval_length": sum(lengths) / len(lengths),
            "eval_eos_rate": sum(ended) / len(ended),
        }


NAMES = ("policy", "reference", "good", "bad", "length")  # what is measured of each answer


def is_positive(values: Tensor) -> Tensor:
    """1 for positive numbers, 0 for negative ones, and 1/2 for 0."""
    return (values > 0).float() + 0.5 * (values == 0)


def mean_and_error(name: str, values: Tensor, prompts: Tensor) -> dict[str, float]:
    """The mean of ``values`` [N] and its standard error, where only pairs of different ``prompts`` are independent."""
    return {f"eval_{name}": float(values.double().mean()), **error_bar(f"eval_{name}_error", values, prompts)}
