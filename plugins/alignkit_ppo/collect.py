"""An iteration's data: sample answers, score them, and turn scores into advantages (steps 1 to 6 of PPO)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from alignkit import Answers, DataError, RewardFunction, Run, Sampling
from alignkit.data.chat_template import prompt_ids
from alignkit.data.encoding import check_fit, encode_each
from alignkit.generation.sampling import text
from alignkit.models import Logps, Roles, Sequences
from alignkit_ppo import advantages as adv
from alignkit_ppo import diagnosis

if TYPE_CHECKING:
    from alignkit.rows import Conversation
    from alignkit_ppo.config import PPOConfig


@dataclass(frozen=True)
class Prompted:
    """A prompt, as messages and as token ids."""

    messages: Conversation
    ids: list[int]


@dataclass(frozen=True)
class Rollouts:
    """A batch of answers and what PPO has to know of them; tensors are [B, A]."""

    prompts: list[list[int]]
    answers: list[list[int]]
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    kept: Tensor  # [B] bool, False where the reward refused the answer, which then has no part in the update
    figures: dict[str, float]  # for the log

    def take(self, rows: list[int], pad: int, device: Any) -> dict[str, Any]:
        """A microbatch."""
        sequences = Sequences.of([self.prompts[i] for i in rows], [self.answers[i] for i in rows], pad, device)
        width = sequences.mask.shape[1]
        names = ("old_logps", "old_values", "advantages", "returns")
        mask = sequences.mask & self.kept[rows, None]
        return {"sequences": sequences, "mask": mask, **{name: getattr(self, name)[rows, :width] for name in names}}


def encode(run: Run, rows: list[Any], config: PPOConfig) -> list[Prompted]:
    """Prompts as token ids, each once.

    Raises:
        DataError: one is too long.
    """
    encoded = encode_each(
        run, rows, lambda row, _: Prompted(row.prompt, prompt_ids(run.tokenizer, row.prompt, row.tools))
    )
    for where, prompted in encoded:
        if len(prompted.ids) > config.max_prompt_length:
            raise DataError(
                f"{where}: the prompt has {len(prompted.ids)} tokens, over ppo.max_prompt_length="
                f"{config.max_prompt_length}. Raise it, or remove the row"
            )
    check_fit(
        run, ((where, prompted.ids) for where, prompted in encoded), config.response_length, "ppo.response_length"
    )
    return list({tuple(prompted.ids): prompted for _, prompted in reversed(encoded)}.values())[::-1]


def pass_after_pass(size: int, first: int, number: int, seed: int) -> list[int]:
    """Items ``first`` to ``first + number`` of an endless row: pass after pass over ``size`` items, each shuffled anew.

    It is computed from the place alone, so that resuming needs no state.
    """
    passes, skipped = divmod(first, size)
    order: list[int] = []
    while len(order) < skipped + number:
        generator = torch.Generator().manual_seed(seed + passes)
        order += torch.randperm(size, generator=generator).tolist()
        passes += 1
    return order[skipped:][:number]


class Collector:
    """Samples from the policy of a trainer and judges what it sampled."""

    def __init__(self, trainer: Any, run: Run, prompts: list[Prompted], reward: RewardFunction):
        self.trainer, self.prompts, self.reward = trainer, prompts, reward
        self.config: PPOConfig = run.config.stage.config
        self.args, self.accelerator = trainer.args, trainer.accelerator
        self.tokenizer, self.pad = run.tokenizer, run.tokenizer.pad_token_id
        self.sampling = Sampling(
            max_new_tokens=self.config.response_length,
            temperature=self.config.temperature,
            stop_ids=tuple(run.stop_ids),
        )
        self.engine = run.rollout(self.sampling)
        self.fp32 = run.dtype is torch.float32
        self.skips = run.config.reward is not None and run.config.reward.config.on_error == "skip"

    def collect(self, iteration: int, kl_coef: float) -> Rollouts:
        """Answers to the next prompts, with all that the loss needs."""
        began = time.monotonic()
        prompts = self._next_prompts(iteration)
        ids = [prompt.ids for prompt in prompts]
        answers = self.sample(ids, self.seed(iteration, 2))  # 1
        sampled = time.monotonic()
        scores, ended = self.score(prompts, answers), self.ended(answers)  # 2
        kept = ~scores.isnan()
        scores = scores.nan_to_num()
        penalised = scores - self.config.missing_eos_penalty * ~ended
        if iteration == 0 and not self.config.whiten_rewards:
            self.trainer.roles.start_value(self._mean_of(penalised, kept))
        said = self.say(ids, answers, ("policy", "reference", "value"))  # 3
        policy, reference, values = said["policy"][0], said["reference"][0], said["value"][0]
        tokens = Sequences.of(ids, answers, self.pad, self.args.device).mask
        mask = tokens & kept[:, None]
        if iteration == 0:
            diagnosis.first_answers(policy - reference, tokens, self.exact)
        rewards = adv.rewards(penalised, policy, reference, tokens, kl_coef)  # 4
        if self.config.whiten_rewards:
            rewards = adv.whiten(rewards, mask, self._moments(rewards, mask), shift=False)
        advantages, returns = adv.gae(rewards, values, tokens, self.config.gamma, self.config.lam)  # 5
        advantages = adv.whiten(advantages, mask, self._moments(advantages, mask)).float()  # 6
        figures = {
            "score": self._mean_of(scores, kept),
            "kl": self._mean((policy - reference).sum(1)),
            "kl_coef": kl_coef,
            "length": self._mean(tokens.sum(1).float()),
            "eos_rate": self._mean(ended.float()),
            "entropy": self._token_mean(said["policy"][1], tokens),
            "explained_variance": self._explained(values, returns, mask),
            "sampled_tokens_per_second": self._total(tokens.sum()) / max(sampled - began, 1e-9),
            "seconds_sampling": sampled - began,
            "seconds_scoring": time.monotonic() - sampled,
        }
        if self.skips:
            figures["reward_errors"] = self._total((~kept).sum())
        return Rollouts(ids, answers, policy, values, advantages, returns, kept, figures)

    @property
    def exact(self) -> bool:
        """Whether the policy computes in fp32, where two forwards of the same give the same."""
        return self.fp32 and not (self.args.bf16 or self.args.fp16)

    def seed(self, iteration: int, what: int) -> int:
        """A seed that depends on nothing but the run's seed, the iteration and the process: resuming needs no more."""
        return (((self.args.seed * 1_000_003 + iteration) * 1_009 + self.args.process_index) * 7 + what) % 2**32

    def _next_prompts(self, iteration: int) -> list[Prompted]:
        """This iteration's prompts of this process, each as often as it is answered."""
        wanted = self.config.batch_size // self.config.samples_per_prompt
        chosen = pass_after_pass(len(self.prompts), iteration * wanted, wanted, self.args.seed)
        mine = chosen[self.args.process_index :: self.args.world_size]
        return [self.prompts[i] for i in mine for _ in range(self.config.samples_per_prompt)]

    def sample(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """Answers of the policy, as token ids."""
        transformers.set_seed(seed)
        roles: Roles = self.accelerator.unwrap_model(self.trainer.model)
        roles.eval()
        with roles.using("policy") as policy, torch.no_grad(), self.accelerator.autocast():
            return self.engine(policy, prompts, roles)

    def score(self, prompts: list[Prompted], answers: list[list[int]]) -> Tensor:
        """The reward's score of each answer, [B]; NaN where it refused the answer and ``reward.on_error`` is skip."""
        texts = [text(self.tokenizer, answer) for answer in answers]
        given = Answers([p.messages for p in prompts], texts, [p.ids for p in prompts], answers)
        scores = self.reward(given, self.trainer.roles)
        clip = self.config.score_clip
        found = torch.tensor(scores, device=self.args.device)
        return found.clamp(-clip, clip) if clip is not None else found

    @torch.no_grad()
    def say(self, prompts: list[list[int]], answers: list[list[int]], roles: Sequence[str]) -> dict[str, list[Tensor]]:
        """What roles say of answers, from the forward that training does, [B, A] each: values, or logps and entropies.

        Answers of about one length are in one forward, to compute little padding.
        """
        size, width = int(self.args.per_device_eval_batch_size), max(map(len, answers))
        order = sorted(range(len(answers)), key=lambda i: len(prompts[i]) + len(answers[i]))
        back = torch.tensor(order, device=self.args.device).argsort()
        model: Roles = self.accelerator.unwrap_model(self.trainer.model)
        model.train(self.trainer.model.training)
        parts: dict[str, list[list[Tensor]]] = {role: [] for role in roles}
        for start in range(0, len(order), size):
            some = order[start : start + size]
            sequences = Sequences.of([prompts[i] for i in some], [answers[i] for i in some], self.pad, self.args.device)
            with self.trainer.compute_loss_context_manager():
                for role, said in model(sequences, roles).items():
                    both = [said.logps, said.entropy] if isinstance(said, Logps) else [said]
                    parts[role].append([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in both])
        return {role: [torch.cat(of)[back] for of in zip(*some, strict=True)] for role, some in parts.items()}

    def ended(self, answers: list[list[int]]) -> Tensor:
        """Whether each answer ended by itself, [B] bool."""
        return torch.tensor([answer[-1] in self.sampling.stop_ids for answer in answers], device=self.args.device)

    # --- sums over all processes -------------------------------------------------------------------------------------

    def _total(self, value: Tensor) -> float:
        return float(self.accelerator.reduce(value.double()))

    def _mean(self, values: Tensor) -> float:
        return float(self.accelerator.reduce(values.double().mean(), "mean"))

    def _mean_of(self, values: Tensor, which: Tensor) -> float:
        return self._total((values * which).sum()) / self._total(which.sum())

    def _token_mean(self, values: Tensor, mask: Tensor) -> float:
        return self._total((values * mask).sum()) / self._total(mask.sum())

    def _moments(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, total, squares = (self.accelerator.reduce(each) for each in adv.moments(values, mask))
        return count, total, squares

    def _explained(self, values: Tensor, returns: Tensor, mask: Tensor) -> float:
        """1 - Var(returns - values) / Var(returns): 1 is a perfect value function, 0 one that knows the mean."""

        def variance(of: Tensor) -> float:
            count, total, squares = self._moments(of, mask)
            return float(squares / count - (total / count) ** 2)

        spread = variance(returns)
        return 1 - variance(returns - values) / spread if spread > 0 else 0.0
