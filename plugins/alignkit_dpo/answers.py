"""Answers of the policy to held-out prompts at each evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from alignkit import Run, Sampling
from alignkit.data import Branches, Ranked
from alignkit.evaluation import error_bar
from alignkit.generation import sample, text
from alignkit.runs import write_answers
from alignkit_dpo.logps import answer_logps
from alignkit_dpo.pairs import Collator, inputs

if TYPE_CHECKING:
    import torch

    from alignkit_dpo.trainer import DPOTrainer


class HeldOutAnswers:
    """Samples one answer to each of the first ``dpo.eval_prompts`` held-out prompts, always with the same seed."""

    def __init__(self, run: Run, held_out: Sequence[Ranked]) -> None:
        config = run.config.stage.config
        distinct = {tuple(ranked.branches.prompt): ranked for ranked in held_out}
        self.run = run
        self.prompts = list(distinct.values())[: config.eval_prompts]
        self.sampling = Sampling(config.response_length, temperature=1.0, stop_ids=tuple(run.stop_ids))

    def evaluate(self, trainer: DPOTrainer) -> dict[str, float]:
        """Sample answers, write them to ``answers.jsonl``, and return their metrics.

        The metrics are ``eval_kl``, the KL divergence to the reference per answer in nats, if the reference is in
        memory; ``eval_length`` in tokens; and ``eval_eos_rate``.
        """
        if not self.prompts:
            return {}
        answers, kl = self._sample(trainer)
        lengths = [len(answer) for answer in answers]
        ended = [answer[-1] in self.sampling.stop_ids for answer in answers]
        if trainer.is_world_process_zero():
            write_answers(
                self.run.folder,
                trainer.state.global_step,
                [ranked.prompt for ranked in self.prompts],
                [text(self.run.tokenizer, answer) for answer in answers],
                **({"kl": kl} if kl else {}),
                length=lengths,
                ended=ended,
            )
        return {
            **({"eval_kl": sum(kl) / len(kl), **error_bar("eval_kl_error", kl)} if kl else {}),
            "eval_length": sum(lengths) / len(lengths),
            "eval_eos_rate": sum(ended) / len(ended),
        }

    def _sample(self, trainer: DPOTrainer) -> tuple[list[list[int]], list[float]]:
        """Answers as token ids, and log(policy / reference) of each; none without a reference in memory."""
        import torch

        policy = trainer.accelerator.unwrap_model(trainer.model).eval()
        size, tokenizer = trainer.args.per_device_eval_batch_size, self.run.tokenizer
        answers: list[list[int]] = []
        log_ratios: list[float] = []
        with torch.no_grad(), trainer.accelerator.autocast(), _seeded(trainer.args.seed, trainer.args.device):
            for start in range(0, len(self.prompts), size):
                prompts = [ranked.branches.prompt for ranked in self.prompts[start : start + size]]
                sampled = sample(policy, tokenizer, prompts, self.sampling, self.run.say)
                answers += sampled
                if trainer.reference.kind != "none":
                    groups = [Branches(prompt, [answer]) for prompt, answer in zip(prompts, sampled, strict=True)]
                    collated = inputs(groups, Collator(tokenizer.pad_token_id))
                    batch = {name: tensor.to(policy.device) for name, tensor in collated.items()}
                    log_ratios += (answer_logps(policy, batch)[0] - trainer.ref_logps(batch)).tolist()
        return answers, log_ratios


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers from ``seed``, without changing those that training draws afterwards."""
    import torch

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
