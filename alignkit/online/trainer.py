"""The trainer of stages that train on answers of their own policy."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import LossOutput, PolicyBatch
from alignkit.errors import AlignkitError, UnavailableError
from alignkit.evaluation import error_bar
from alignkit.generation.sampling import text
from alignkit.models import Sequences
from alignkit.online import diagnosis, ema, microbatches, seeds
from alignkit.online.collect import Collector
from alignkit.online.kl import next_kl_coef
from alignkit.online.prompts import EncodedPrompt
from alignkit.online.ptx import PtxGradient, PtxText
from alignkit.online.roles_trainer import RolesTrainer
from alignkit.online.rollouts import Advantages, Rollouts, of_all_processes
from alignkit.protocols import Run
from alignkit.runs import read_answers, write_answers
from alignkit.training.meters import Means


class OnlineTrainer(RolesTrainer):
    """Rollouts in the data loader; the loss, through the hook, in ``compute_loss``.

    A stage derives from it and writes :meth:`estimate_advantages`. Sampling, scoring, microbatches, the adaptive KL
    coefficient, PPO-ptx, evaluation on held-out prompts, the best and the average policy, and exact resume are here.
    :func:`alignkit.online.build_trainer` makes it.
    """

    loss_is_scaled_for_ga = True  # the loss is divided by the response tokens of the whole optimizer step

    def __init__(
        self,
        *,
        run: Run,
        loss: Any,
        reward: Any,
        prompts: Sequence[EncodedPrompt],
        held_out: Sequence[EncodedPrompt],
        ptx_texts: Sequence[PtxText],
        **kwargs: Any,
    ) -> None:
        super().__init__(run=run, eval_dataset=held_out or None, **kwargs)
        self.config: Any = run.config.stage.config
        self.loss, self.held_out = loss, held_out
        self.collector = Collector(self, run, prompts, reward, self.on_first_scores, self.to_redraw)
        self.statistics = self.collector.statistics
        self.ptx = PtxGradient(self, self.config, ptx_texts, run.tokenizer.pad_token_id) if ptx_texts else None
        self.kl_coef: float = self.config.kl_coef
        self.metrics: dict[str, float] = {}  # of this iteration's rollouts
        self.means = Means(self.accelerator)  # of its optimizer steps
        self.microbatch = 0  # of this optimizer step
        self.average = ema.start(self.policy_weights()) if self.config.ema else {}
        self.best: tuple[float, dict[str, Tensor]] | None = None  # held-out score and weights
        self.signs = diagnosis.FailureSigns(
            run.config.stage.component.name, run.say, expect_eos=self.config.missing_eos_penalty > 0
        )
        self.add_callback(ema.UpdateAverage(self))

    # --- what a stage decides ----------------------------------------------------------------------------------------

    def estimate_advantages(self, rollouts: Rollouts) -> Advantages:
        """Advantages [B, A] of an iteration's answers, and returns [B, A] if the stage has a value function.

        ``self.kl_coef`` is the coefficient of the KL penalty in this iteration, ``self.statistics`` computes means and
        whitens over all processes.
        """
        raise NotImplementedError

    def on_first_scores(self, mean: float) -> None:
        """Called once, when the first answers are scored and before values are computed; ``mean`` is their score."""

    def to_redraw(self, scores: Tensor, kept: Tensor, attempt: int) -> Tensor:
        """Which answers to replace by answers to other prompts, [B] bool, whole groups of them. None by default.

        Called when the answers of an iteration are scored, with ``attempt`` 1, and again with the next number when
        others have replaced them. ``scores`` and ``kept`` are as in :class:`Rollouts`; ``attempt`` is at most 4.
        """
        return torch.zeros_like(kept)

    def loss_of(self, batch: PolicyBatch, inputs: Mapping[str, Any]) -> LossOutput:
        """The loss of a microbatch. A stage that adds a term to the loss overrides it.

        ``inputs`` are the tensors of the microbatch, among them ``ref_logps`` [B, A].
        """
        output: LossOutput = self.loss(batch)
        return output

    @property
    def trains_policy(self) -> bool:
        """Whether this iteration trains the policy. If not, only the value function is trained."""
        return True

    # --- rollouts ----------------------------------------------------------------------------------------------------

    @property
    def iteration(self) -> int:
        """The number of complete iterations."""
        return int(self.state.global_step) // int(self.config.steps)

    def get_train_dataloader(self) -> Any:
        """An endless iterator of microbatches. Each iteration samples its answers when its first one is needed."""
        return self._microbatches()

    def _microbatches(self) -> Iterator[dict[str, Any]]:
        size = self.args.per_device_train_batch_size
        minibatch, group = size * self.args.gradient_accumulation_steps, self.collector.group  # of this process
        first, of_all = minibatch * self.args.process_index, minibatch * self.args.world_size
        if self.state.global_step % self.config.steps:
            raise AlignkitError(
                f"the checkpoint of step {self.state.global_step} is in the middle of an iteration of "
                f"{self.config.steps} steps, and its answers are not stored. Train again, with a train.max_steps that "
                f"is a multiple of {self.config.steps}"
            )
        while True:
            rollouts = self.collector.collect(self.iteration)  # steps 1 to 3
            estimates = self.estimate_advantages(rollouts)  # 4 to 6
            self.metrics = {**rollouts.metrics, "kl_coef": self.kl_coef, **estimates.metrics}
            self.began = time.monotonic()
            if self.config.kl_target is not None:  # 9
                self.kl_coef = next_kl_coef(
                    self.kl_coef,
                    rollouts.metrics["kl"],
                    target=self.config.kl_target,
                    answers=self.config.batch_size,
                    horizon=self.config.kl_horizon,
                )
            if self.args.world_size > 1:
                rollouts, estimates = of_all_processes(rollouts, estimates)
            lengths = rollouts.lengths
            shuffle = torch.Generator().manual_seed(seeds.seed(self.args, self.iteration, seeds.SHUFFLE))
            for _ in range(self.config.epochs):
                order = microbatches.shuffled(len(lengths), group, shuffle)
                for start in range(first, len(order), of_all):
                    rows = order[start : start + minibatch]
                    for part in microbatches.by_length(rows, lengths, group, size):
                        yield self._microbatch(rollouts, estimates, part)

    def _microbatch(self, rollouts: Rollouts, estimates: Advantages, rows: list[int]) -> dict[str, Any]:
        prompts, answers = [rollouts.prompts[i] for i in rows], [rollouts.answers[i] for i in rows]
        sequences = self.collector.sequences(prompts, answers)
        width = sequences.mask.shape[1]
        fields = {
            "mask": rollouts.mask,
            "old_logps": rollouts.logps,
            "ref_logps": rollouts.ref_logps,
            "advantages": estimates.advantages * (1 if rollouts.weights is None else rollouts.weights),
            "old_values": rollouts.values,
            "returns": estimates.returns,
        }
        return {"sequences": sequences} | {n: None if t is None else t[rows, :width] for n, t in fields.items()}

    # --- one optimizer step (steps 7 and 8) --------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The microbatches of a step, and the number of their response tokens on all processes.

        There are none if a server does not answer.
        """
        try:
            batches = [next(epoch_iterator) for _ in range(num_batches)]
        except UnavailableError as error:
            self.stop_with_checkpoint(error)
            return [], None
        tokens = sum((batch["mask"].sum() for batch in batches), torch.tensor(0, device=device))
        return batches, self.accelerator.reduce(tokens).clamp(min=1)  # the reward may have refused every answer

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The backward pass of a microbatch; before the first of a step, that of the pretraining texts (step 10)."""
        ptx = self.ptx if self.trains_policy else None
        if ptx and self.microbatch == 0:
            model.train()
            self.means.add(ptx.backward(model))
        loss: Tensor = super().training_step(model, *args, **kwargs)
        self.microbatch = (self.microbatch + 1) % self.args.gradient_accumulation_steps
        if ptx and self.microbatch == 0:
            stage = self.run.config.stage.component.name
            self.means.add({f"{stage}_grad_norm": ptx.other_norm(model)})
        if not self.trains_policy and self.microbatch == 0:
            for _, parameter in self.policy_weights():
                parameter.grad = None  # from a value head on it; without a gradient there is no weight decay either
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a microbatch, as its share of the step's."""
        sequences: Sequences = inputs["sequences"]
        outputs = model(sequences, ("policy", "value") if self.config.value_function else ("policy",))
        batch = PolicyBatch(
            logps=outputs["policy"].logps,
            old_logps=inputs["old_logps"],
            advantages=inputs["advantages"],
            values=outputs.get("value"),
            old_values=inputs["old_values"],
            returns=inputs["returns"],
            entropy=outputs["policy"].entropy,
            mask=inputs["mask"],
            num_tokens=num_items_in_batch,
        )
        if self.state.global_step == 0 and self.microbatch == 0 and not self.run.is_planned:
            self._check_first_step(batch, model, sequences)
        output = self.loss_of(batch if self.trains_policy else freeze_policy(batch), inputs)
        share = batch.mask.sum() / num_items_in_batch  # of the step's tokens
        self.means.add({name: value / share for name, value in output.metrics.items()}, share)
        self.means.add({"entropy": (batch.entropy.detach() * batch.mask).sum() / batch.mask.sum()}, share)
        return output.loss * self.accelerator.num_processes  # DDP averages gradients over processes

    def _check_first_step(self, batch: PolicyBatch, model: Any, sequences: Sequences) -> None:
        @torch.no_grad()
        def recompute() -> Tensor:
            logps: Tensor = self.accelerator.unwrap_model(model)(sequences, ("policy",))["policy"].logps
            return logps

        if line := diagnosis.check_first_step(batch, self.model, self.collector.exact, recompute):
            self.run.say(line)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the iteration to the Trainer's."""
        if "loss" in logs:
            logs.update({**self.metrics, **self.means.take(), "seconds_training": time.monotonic() - self.began})
            self.signs.check(logs, next((log for log in self.state.log_history if "entropy" in log), logs))
            if self.config.max_kl is not None and logs["kl"] > self.config.max_kl:
                table = self.run.config.stage.component.name
                self.run.say(
                    f"stopping: a KL of {logs['kl']:.1f} per answer is over {table}.max_kl={self.config.max_kl:g}"
                )
                self.control.should_training_stop = True
        super().log(logs, start_time)

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the policy's trained weights."""
        return self.roles.trained("policy")

    # --- evaluation (step 12) ----------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score, KL, length and EOS rate on the held-out prompts; writes ``answers.jsonl``."""
        answers: list[list[int]] = []
        for start in range(0, len(self.held_out), self.config.batch_size):
            prompts = self.held_out[start : start + self.config.batch_size]
            try:
                answers += self.collector.sample([prompt.ids for prompt in prompts], self.args.seed + start)
            except UnavailableError as error:
                self.stop_with_checkpoint(error, evaluating=True)
                return {}
        scores = self.collector.score(self.held_out, answers)
        prompt_ids = [prompt.ids for prompt in self.held_out]
        outputs = self.collector.forward_roles(prompt_ids, answers, ("policy", "reference"))
        kl = (outputs["policy"] - outputs["reference"]).sum(1)
        ended = self.collector.ended(answers)
        scored = scores[~scores.isnan()]
        metrics = {
            "eval_score": float(scored.mean()),
            **error_bar("eval_score_error", scored.cpu()),
            "eval_kl": float(kl.mean()),
            **error_bar("eval_kl_error", kl.cpu()),
            "eval_length": sum(map(len, answers)) / len(answers),
            "eval_eos_rate": float(ended.float().mean()),
        }
        if self.collector.skips_errors:
            metrics["eval_reward_errors"] = len(scores) - len(scored)
        if self.is_world_process_zero():
            write_answers(
                self.run.folder,
                self.state.global_step,
                [prompt.messages for prompt in self.held_out],
                [text(self.collector.tokenizer, answer) for answer in answers],
                score=scores.tolist(),
                kl=kl.tolist(),
                length=[len(answer) for answer in answers],
                ended=ended.tolist(),
            )
        within = self.config.max_kl is None or metrics["eval_kl"] <= self.config.max_kl
        if self.config.keep == "best" and within and (self.best is None or metrics["eval_score"] > self.best[0]):
            self.best = (metrics["eval_score"], {n: p.detach().clone() for n, p in self.policy_weights()})
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- what is saved -----------------------------------------------------------------------------------------------

    def checkpoint_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The average of the policy's weights, and those with the best held-out score."""
        return {"average": self.average, "best": self.best[1] if self.best else {}}

    def checkpoint_state(self) -> dict[str, Any]:
        """The KL coefficient, the best held-out score, and whether logps are reused."""
        best = self.best[0] if self.best else None
        return {"kl_coef": self.kl_coef, "best": best, "reuse_logps": self.collector.reuse_logps}

    def load_checkpoint(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Restore what :meth:`checkpoint_tensors` and :meth:`checkpoint_state` gave."""
        on_device = {
            group: {name: tensor.to(self.args.device) for name, tensor in named.items()}
            for group, named in tensors.items()
        }
        self.average = on_device.get("average", {})
        self.best = (state["best"], on_device["best"]) if "best" in on_device else None
        self.kl_coef, self.collector.reuse_logps = state["kl_coef"], state.get("reuse_logps", False)
        before = state.get("before")  # earlier versions kept these answers in the checkpoint
        if before and self.is_world_process_zero() and not read_answers(self.run.folder):
            write_answers(self.run.folder, 0, [prompt.messages for prompt in self.held_out], before)

    def finish(self) -> dict[str, Any]:
        """Load the policy that the config keeps, evaluate it, and report."""
        kept = self.best[1] if self.best else self.average
        self.roles.load_weights(kept)
        if not self.held_out:
            return {}
        evaluations = [log for log in self.state.log_history if "eval_score" in log]
        first, last = evaluations[0], evaluations[-1]
        if kept or last["step"] != self.state.global_step:
            last = self.evaluate()
        before, after = (
            f"{log['eval_score']:.2f}" + (f" ± {log['eval_score_error']:.2f}" if "eval_score_error" in log else "")
            for log in (first, last)
        )
        self.run.say(
            f"held-out score {before} -> {after} at a KL of {last['eval_kl']:.1f} nats; "
            f"{last['eval_length']:.0f} tokens per answer, {last['eval_eos_rate']:.0%} ended"
        )
        if self.is_world_process_zero():
            self._show_an_answer()
        return {}

    def _show_an_answer(self) -> None:
        evaluations = read_answers(self.run.folder)
        before, after = evaluations[0], evaluations[-1]
        self.run.say(
            f"answers to {len(self.held_out)} held-out prompts, before and after, are in answers.jsonl. The first:"
        )
        example = {"prompt": after.prompts[0], "before": before.answers[0], "after": after.answers[0]}
        for label, content in example.items():
            self.run.say(f"{label:>11}  {' '.join(content.split())}")


def freeze_policy(batch: PolicyBatch) -> PolicyBatch:
    """The batch with nothing to learn for the policy: its old log-probabilities, and advantages of 0."""
    logps = batch.old_logps + 0 * batch.logps
    return dataclasses.replace(batch, logps=logps, advantages=0 * batch.advantages, entropy=batch.entropy.detach())
