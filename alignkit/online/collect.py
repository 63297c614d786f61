"""An iteration's answers: sample them, score them, and compute their log-probabilities and values (steps 1 to 3)."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Answers, SampledAnswers, Sampling
from alignkit.data import Branches
from alignkit.errors import DataError, UnavailableError
from alignkit.generation.sampling import text
from alignkit.models import Logps, Sequences, decide_shared_prompt, gathered
from alignkit.models.prompt_trees import supports_tree
from alignkit.online import diagnosis, seeds
from alignkit.online.config import OnlineConfig
from alignkit.online.microbatches import by_length
from alignkit.online.off_policy import importance_weights
from alignkit.online.prompts import EncodedPrompt
from alignkit.online.roles_trainer import RolesTrainer
from alignkit.online.rollouts import Rollouts
from alignkit.online.statistics import Statistics
from alignkit.protocols import RewardFunction, Run
from alignkit.runs import lineage

TYPICAL = 256  # prompts from which it is decided whether sharing them saves work


class Collector:
    """Samples answers from the policy of a trainer, scores them, and computes what the roles give for them."""

    def __init__(
        self,
        trainer: RolesTrainer,
        run: Run,
        prompts: Sequence[EncodedPrompt],
        reward: RewardFunction,
        on_first_scores: Callable[[float], None],
        to_redraw: Callable[[Tensor, Tensor, int], Tensor],
    ):
        self.trainer, self.prompts, self.reward = trainer, prompts, reward
        self.on_first_scores, self.to_redraw = on_first_scores, to_redraw
        self.config: OnlineConfig = run.config.stage.config
        self.args, self.device, self.statistics = trainer.args, trainer.args.device, Statistics(trainer.accelerator)
        self.tokenizer, self.pad = run.tokenizer, run.tokenizer.pad_token_id
        self.sampling = Sampling(
            max_new_tokens=self.config.response_length,
            temperature=self.config.temperature,
            stop_ids=tuple(run.stop_ids),
        )
        self.engine = run.rollout(self.sampling)
        trainer.roles.shared_mask = self._decide_sharing(run)
        self.group = self.config.samples_per_prompt if trainer.roles.shared_mask else 1  # answers that stay together
        self.exact = run.dtype is torch.float32 and not (self.args.bf16 or self.args.fp16)  # no rounding between shapes
        self.compared = False  # whether the difference to a copy of the policy has been printed
        self.reuse_logps = False  # whether the engine's log-probabilities replace the policy's forward pass
        self.say, self.is_planned = run.say, run.is_planned
        self.seconds_sampling, self.sampled_tokens = 0.0, 0  # of this iteration, on this process
        self.skips_errors = run.config.reward is not None and run.config.reward.config.on_error == "skip"

    def collect(self, iteration: int) -> Rollouts:
        """Answers to the prompts of an iteration, with all that advantages are computed from."""
        with self.trainer.roles.constant_weights():
            return self._collect(iteration)

    def _collect(self, iteration: int) -> Rollouts:
        began, self.seconds_sampling, self.sampled_tokens = time.monotonic(), 0.0, 0
        prompts = self._prompts_of(iteration)
        seed, rank = seeds.seed(self.args, iteration, seeds.SAMPLE), self.args.process_index
        answers = self.sample([prompt.ids for prompt in prompts], seed, rank * len(prompts))  # 1
        raw_scores = self.score(prompts, answers)  # 2
        redrawn = set[int]()
        for attempt in range(1, seeds.REDRAWS + 1):
            chosen = self.to_redraw(self._penalized(raw_scores, answers), ~raw_scores.isnan(), attempt)
            of_processes = self.statistics.by_process(int(chosen.sum()))
            if not sum(of_processes):  # all processes go on until none has rows to replace
                break
            rows, before = chosen.nonzero().flatten().tolist(), sum(of_processes[:rank])
            if self._redraw(rows, before, iteration, attempt, prompts, answers, raw_scores):
                redrawn.update(rows)
        prompt_ids = [prompt.ids for prompt in prompts]
        ended, kept, scores = self.ended(answers), ~raw_scores.isnan(), self._penalized(raw_scores, answers)
        raw_scores = raw_scores.nan_to_num()
        if iteration == 0:
            self.on_first_scores(self.statistics.mean(scores, kept))

        mask = padded([[True] * len(answer) for answer in answers], self.device)
        policy = [] if self.reuse_logps else ["policy"]
        value = ["value"] if self.config.value_function else []
        outputs = self.forward_roles(prompt_ids, answers, ["reference", *policy, *value])  # 3
        logps = outputs["policy"] if policy else padded(answers.logps or [], self.device)
        ref_logps, values = outputs["reference"], outputs.get("value")
        if iteration == 0 and not self.is_planned:
            diagnosis.check_reference(logps - ref_logps, mask, self.exact)
        weights, of_copy = self._compare_copy(answers, logps, mask)
        if iteration == 0:
            self.reuse_logps = self._engine_agrees(answers, logps, mask)

        mean, total = self.statistics.mean, self.statistics.total
        sampling, sampled_tokens = self.seconds_sampling, self.sampled_tokens
        metrics = {
            "score": mean(raw_scores, kept),
            "kl": mean((logps - ref_logps).sum(1)),
            "length": mean(mask.sum(1).float()),
            "eos_rate": mean(ended.float()),
            "sampled_tokens_per_second": total(torch.tensor(sampled_tokens, device=self.device)) / max(sampling, 1e-9),
            "seconds_sampling": sampling,
            "seconds_scoring": time.monotonic() - began - sampling,
        }
        if redraws := total(torch.tensor(len(redrawn), device=self.device)):
            metrics["redrawn"] = redraws
        if self.skips_errors:
            metrics["reward_errors"] = total((~kept).sum())
        metrics |= of_copy
        return Rollouts(prompt_ids, answers, scores, kept, mask, logps, ref_logps, values, metrics, weights)

    def _decide_sharing(self, run: Run) -> torch.dtype | None:
        """The dtype of the mask if each prompt is computed once for all its answers, else None."""
        samples, length = self.config.samples_per_prompt, self.config.response_length
        if samples == 1:
            return None
        roles = self.trainer.roles
        policy = roles.members["policy"].model
        prompts = [self.prompts[number].ids for number in range(min(TYPICAL, len(self.prompts)))]
        answers = [list(itertools.islice(itertools.cycle(prompt), length)) for prompt in prompts]
        groups = [Branches(prompt, [answer] * samples) for prompt, answer in zip(prompts, answers, strict=True)]

        def forward(group: Branches, shared: bool) -> Tensor:
            share = policy.dtype if shared else None
            sequences = Sequences.of([group.prompt] * samples, group.answers, self.pad, self.device, share)
            logps: Tensor = roles(sequences, ("policy",))["policy"].logps
            return logps

        supported = supports_tree(policy.config, self.config.max_prompt_length + length)
        shared = decide_shared_prompt(run, policy, groups, forward, self.device, supported=supported)
        return policy.dtype if shared else None

    def sequences(self, prompts: list[list[int]], answers: list[list[int]]) -> Sequences:
        """Token ids as input of the roles."""
        return self.trainer.roles.sequences(prompts, answers, self.pad, self.device)

    def _penalized(self, raw_scores: Tensor, answers: list[list[int]]) -> Tensor:
        """Clipped scores less the penalty for a missing EOS, [B]; a score of 0 where the reward refused the answer."""
        clip = self.config.score_clip if self.config.score_clip is not None else math.inf
        return raw_scores.nan_to_num().clamp(-clip, clip) - self.config.missing_eos_penalty * ~self.ended(answers)

    def _redraw(
        self,
        rows: list[int],
        before: int,
        iteration: int,
        attempt: int,
        prompts: list[EncodedPrompt],
        answers: SampledAnswers,
        raw_scores: Tensor,
    ) -> bool:
        """Replace the prompts and answers in these rows, and their scores, by others; return whether they were.

        They stay if ``reward.on_error`` is ``skip`` and the reward refuses all the others. All processes sample
        together: one without rows samples an answer and drops it. Processes of lower rank replace ``before`` rows.
        """
        of_attempt = self._prompts_of(iteration, attempt)
        others = [of_attempt[row] for row in rows] or of_attempt[:1]
        sampled = self.sample([p.ids for p in others], seeds.seed(self.args, iteration, seeds.SAMPLE + attempt), before)
        try:
            scores = self.score(others, sampled, alike=False)
        except DataError:
            if not self.skips_errors:
                raise
            return False
        for number, row in enumerate(rows):
            raw_scores[row] = scores[number]
            prompts[row], answers[row] = others[number], sampled[number]
            if answers.logps is not None:
                assert sampled.logps is not None  # of the same engine
                answers.logps[row] = sampled.logps[number]
        return True

    def _prompts_of(self, iteration: int, attempt: int = 0) -> list[EncodedPrompt]:
        """This process's prompts of an iteration, each repeated ``samples_per_prompt`` times.

        Those of an ``attempt`` to draw them again are in an order of its own.
        """
        samples = self.config.samples_per_prompt
        number = self.config.batch_size // samples
        order = self.args.seed + attempt * 1_000_003
        indices = seeds.shuffled_passes(len(self.prompts), iteration * number, number, order)
        share = number // self.args.world_size
        of_process = indices[share * self.args.process_index :][:share]
        return [self.prompts[index] for index in of_process for _ in range(samples)]

    def _engine_agrees(self, answers: SampledAnswers, logps: Tensor, mask: Tensor) -> bool:
        """Whether the engine's log-probabilities are those of the policy's forward pass [B, A], up to rounding.

        They then replace that pass. A value function that is a head on the policy needs the pass in any case.
        """
        if answers.logps is None or answers.off_policy or self.config.value_function == "head":
            return False
        difference = self.statistics.mean((padded(answers.logps, self.device) - logps).abs(), mask)
        agrees = difference <= diagnosis.tolerance(self.exact)
        self.say(
            f"the rollout engine's log-probabilities differ by {difference:.1g} per token from the policy's forward "
            + ("pass: from now on they replace it in scoring" if agrees else "pass: they are not used")
        )
        return agrees

    def _compare_copy(
        self, answers: SampledAnswers, logps: Tensor, mask: Tensor
    ) -> tuple[Tensor | None, dict[str, float]]:
        """Importance weights of answers that a copy of the policy sampled, [B, A] or None, and metrics."""
        if answers.off_policy is None:
            return None, {}
        sampled = padded(answers.logps or [], self.device)
        weights, metrics = importance_weights(answers.off_policy, logps, sampled, mask, self.statistics)
        if not self.compared:
            self.say(
                f"the rollout engine's log-probabilities differ by {metrics['rollout_logps_difference']:.1g} nats per "
                f"token from the policy's; the run stops if it is more than {answers.off_policy.max_difference:g}"
            )
        self.compared = True
        return weights, metrics

    def sample(self, prompts: list[list[int]], seed: int, before: int = 0) -> SampledAnswers:
        """Sample an answer to each prompt from the policy, as token ids. Every process must call it.

        Processes of lower rank sample ``before`` other answers at the same time.

        Raises:
            UnavailableError: the engine's server does not answer, to this process or to another one.
        """
        began = time.monotonic()
        seeds.set_seeds(seed, before, self.sampling.max_new_tokens)
        roles, failure, answers = self.trainer.roles.eval(), None, SampledAnswers([])
        autocast = self.trainer.accelerator.autocast()
        with roles.using("policy") as policy, torch.no_grad(), autocast, gathered(roles, policy):
            try:
                answers = self.engine(policy, prompts, roles)
            except UnavailableError as error:
                failure = error
        if self.statistics.total(torch.tensor(failure is not None, device=self.device)):  # all processes stop
            raise failure or UnavailableError("the rollout engine of another process is unavailable")
        self.seconds_sampling += time.monotonic() - began
        self.sampled_tokens += sum(map(len, answers))
        return answers

    def score(self, prompts: Sequence[EncodedPrompt], answers: list[list[int]], alike: bool = True) -> Tensor:
        """The reward of each answer, [B]; NaN where it refused the answer and ``reward.on_error`` is ``skip``.

        ``alike`` is whether every process scores as many answers. Otherwise, and where answers may be scored again one
        by one, processes call reward models a different number of times, so sharded ones are gathered.
        """
        texts = [text(self.tokenizer, answer) for answer in answers]
        fields = [prompt.fields for prompt in prompts]
        batch = Answers([p.messages for p in prompts], texts, [p.ids for p in prompts], answers, fields)
        with contextlib.ExitStack() as stack:
            if self.skips_errors or not alike:
                roles = self.trainer.roles
                for reward in lineage.rewards_in(roles.members).values():
                    stack.enter_context(gathered(roles, reward.model))
            return torch.tensor(self.reward(batch, self.trainer.roles), device=self.device)

    @torch.no_grad()
    def forward_roles(
        self, prompts: list[list[int]], answers: list[list[int]], roles: Sequence[str]
    ) -> dict[str, Tensor]:
        """The outputs of roles on answers [B, A], from the same forward as in training: log-probabilities or values."""
        size, width = int(self.args.per_device_eval_batch_size), max(map(len, answers))
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        model = self.trainer.roles.train(self.trainer.model.training)
        parts: dict[str, list[Tensor]] = {role: [] for role in roles}
        order: list[int] = []
        for rows in by_length(range(len(answers)), lengths, self.group, size):
            order += rows
            sequences = self.sequences([prompts[i] for i in rows], [answers[i] for i in rows])
            with self.trainer.compute_loss_context_manager():
                outputs = model(sequences, roles)
            for role, output in outputs.items():
                of_answers = output.logps if isinstance(output, Logps) else output
                parts[role].append(torch.nn.functional.pad(of_answers, (0, width - of_answers.shape[1])))
        unsorted = torch.tensor(order, device=self.device).argsort()
        return {role: torch.cat(tensors)[unsorted] for role, tensors in parts.items()}

    def ended(self, answers: list[list[int]]) -> Tensor:
        """Whether each answer ended with a stop token, [B] bool."""
        return torch.tensor([answer[-1] in self.sampling.stop_ids for answer in answers], device=self.device)


def padded(rows: list[list[Any]], device: Any) -> Tensor:
    """Rows of different lengths as a tensor [B, A], with zeros at the ends."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)
