"""Answers of the policy to held-out prompts, at each evaluation of a stage that does not sample by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from alignkit.batches import Sampling
from alignkit.evaluation.error_bars import error_bar
from alignkit.protocols import Run
from alignkit.rows import Conversation
from alignkit.runs import write_answers

if TYPE_CHECKING:
    import torch


class HeldOutAnswers:
    """Samples one answer to each of the first held-out prompts, always with the same seed.

    The stage's config has ``eval_prompts`` and ``response_length``.
    """

    def __init__(self, run: Run, held_out: Sequence[tuple[Conversation, list[int]]]) -> None:
        """``held_out`` are prompts with their token ids."""
        config = run.config.stage.config
        distinct = {tuple(ids): (prompt, ids) for prompt, ids in held_out}
        self.run = run
        self.prompts = list(distinct.values())[: config.eval_prompts]
        self.sampling = Sampling(config.response_length, temperature=1.0, stop_ids=tuple(run.stop_ids))

    def evaluate(self, trainer: Any) -> dict[str, float]:
        """Sample answers, write them to ``answers.jsonl``, and return their metrics.

        The metrics are ``eval_kl``, the KL divergence to the reference per answer in nats, if the reference is in
        memory; ``eval_length`` in tokens; and ``eval_eos_rate``. ``trainer`` is a
        :class:`alignkit.training.ReferenceTrainer`.
        """
        from alignkit.generation import text

        if not self.prompts:
            return {}
        answers, kl = self._sample(trainer)
        lengths = [len(answer) for answer in answers]
        ended = [answer[-1] in self.sampling.stop_ids for answer in answers]
        if trainer.is_world_process_zero():
            write_answers(
                self.run.folder,
                trainer.state.global_step,
                [prompt for prompt, _ in self.prompts],
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

    def _sample(self, trainer: Any) -> tuple[list[list[int]], list[float]]:
        """Answers as token ids, and log(policy / reference) of each; none without a reference in memory."""
        import torch

        from alignkit.generation import sample
        from alignkit.models import gathered

        policy = trainer.accelerator.unwrap_model(trainer.model).eval()
        size, tokenizer = trainer.args.per_device_eval_batch_size, self.run.tokenizer
        answers: list[list[int]] = []
        log_ratios: list[float] = []
        autocast, seeded = trainer.accelerator.autocast(), _seeded(trainer.args.seed, trainer.args.device)
        with torch.no_grad(), autocast, seeded, gathered(policy, policy):
            for start in range(0, len(self.prompts), size):
                prompts = [ids for _, ids in self.prompts[start : start + size]]
                sampled = sample(policy, tokenizer, prompts, self.sampling, self.run.say)
                answers += sampled
                log_ratios += trainer.log_ratios(prompts, sampled)
        return answers, log_ratios


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers from ``seed``, without changing those that training draws afterwards."""
    import torch

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
