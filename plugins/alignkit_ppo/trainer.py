"""PPO as a ``transformers.Trainer`` whose data are the policy's own answers."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import transformers
from torch import Tensor

from alignkit import AlignkitError, Answers, DataError, PolicyBatch, Prompt, Ranking, Sampling
from alignkit.chat_template import prompt_ids
from alignkit.sampling import text
from alignkit.trunk import Roles, Sequences, assemble
from alignkit_ppo import advantages as adv
from alignkit_ppo import diagnosis

if TYPE_CHECKING:
    from alignkit.rows import Conversation
    from alignkit.run import Run
    from alignkit_ppo.config import PPOConfig


INSTEAD = {
    "num_train_epochs": "ppo.iterations",
    "gradient_accumulation_steps": "ppo.minibatches",
    "eval_steps": "ppo.eval_every",
    "save_steps": "ppo.save_every",
}


@dataclass(frozen=True)
class Prompted:
    """A prompt, as messages and as token ids."""

    messages: Conversation
    ids: list[int]


@dataclass
class Rollouts:
    """A batch of answers and what PPO has to know of them; tensors are [B, A] or [B]."""

    prompts: list[list[int]]
    answers: list[list[int]]
    mask: Tensor
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def take(self, rows: list[int], pad: int, device: Any) -> dict[str, Any]:
        """A microbatch."""
        sequences = Sequences.of([self.prompts[i] for i in rows], [self.answers[i] for i in rows], pad, device)
        width = sequences.mask.shape[1]
        names = ("old_logps", "old_values", "advantages", "returns")
        return {"sequences": sequences, **{name: getattr(self, name)[rows, :width] for name in names}}


def build(run: Run) -> PPOTrainer:
    """Encode the prompts, put the roles on one trunk, and both into a trainer."""
    config: PPOConfig = run.config.stage.config
    train, held_out = encode(run, run.train_rows, config), encode(run, run.eval_rows, config)
    if config.batch_size % (config.minibatches * config.samples_per_prompt):
        raise AlignkitError("ppo.batch_size must be a multiple of ppo.minibatches times ppo.samples_per_prompt")
    steps = config.epochs * config.minibatches  # optimizer steps an iteration
    minibatch = config.batch_size // config.minibatches
    micro = min(run.config.train["per_device_train_batch_size"], minibatch)
    if minibatch % micro:
        raise AlignkitError(
            f"a minibatch of {minibatch} answers (ppo.batch_size / ppo.minibatches) is no multiple of "
            f"train.per_device_train_batch_size={micro}"
        )
    for key, instead in INSTEAD.items():
        if key in run.config.train:
            run.say(f"train.{key} has no part in ppo: {instead} has")
    wanted = run.config.train.get("max_steps", -1)
    run.steps_between_checkpoints = steps
    args = run.training_arguments(
        transformers.TrainingArguments,
        max_steps=wanted if wanted > 0 else config.iterations * steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=minibatch // micro,
        logging_steps=steps,
        save_strategy="no" if run.config.train.get("save_strategy") == "no" else "steps",
        save_steps=config.save_every * steps,
        eval_strategy="steps" if held_out else "no",
        eval_steps=config.eval_every * steps,
        ignore_data_skip=True,
        remove_unused_columns=False,
    )
    loss, optimizer = run.loss(), run.optimizer(args)  # before the models: they may refuse
    roles = assemble(run, value=config.value, temperature=config.temperature)
    run.say(roles.describe())
    trainer = PPOTrainer(
        run=run,
        loss=loss,
        prompts=train,
        held_out=held_out,
        steps=steps,
        model=roles,
        args=args,
        eval_dataset=held_out or None,
        callbacks=run.callbacks(),
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.reward = run.reward(roles)
    return trainer


def encode(run: Run, rows: Sequence[Any], config: PPOConfig) -> list[Prompted]:
    """Prompts as token ids, each once.

    Raises:
        DataError: one is too long.
    """
    found: dict[str, Prompted] = {}
    for where, row in rows:
        assert isinstance(row, Prompt | Ranking)
        ids = prompt_ids(run.tokenizer, row.prompt)
        if len(ids) > config.max_prompt_length:
            raise DataError(f"{where}: the prompt has {len(ids)} tokens, over ppo.max_prompt_length")
        found.setdefault(row.key, Prompted(row.prompt, ids))
    return list(found.values())


class PPOTrainer(transformers.Trainer):
    """Sampling, scoring and advantages in the data loader; the loss, through the hook, in ``compute_loss``."""

    loss_is_scaled_for_ga = True  # the loss is divided by the response tokens of the whole optimizer step

    def __init__(
        self, *, run: Run, loss: Any, prompts: list[Prompted], held_out: list[Prompted], steps: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.ppo: PPOConfig = run.config.stage.config
        self.run, self.loss, self.prompts, self.held_out, self.steps = run, loss, prompts, held_out, steps
        self.tokenizer, self.pad = run.tokenizer, run.tokenizer.pad_token_id
        self.kl_coef = self.ppo.kl_coef
        self.reward: Any = None
        self.sampling = Sampling(
            max_new_tokens=self.ppo.response_length, temperature=self.ppo.temperature, stop_ids=tuple(run.stop_ids)
        )
        self.engine = run.rollout(self.sampling)
        self.average = {n: p.detach().clone() for n, p in self.policy_weights()} if self.ppo.ema else {}
        self.told: dict[str, float] = {}  # of this iteration's sampling, for the log
        self.sums: dict[str, float] = defaultdict(float)  # of its optimizer steps
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.before: list[str] = []  # the first evaluation's answers, which are the SFT model's
        self.watch = diagnosis.Watch(run.say)
        self.add_callback(AfterStep(self))

    @property
    def iteration(self) -> int:
        """How many iterations are complete."""
        return int(self.state.global_step) // self.steps

    # --- an iteration: sample, score, advantages ---------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Microbatches without end: each iteration's are made of answers that the policy gives when it begins."""
        return self._microbatches()

    def _microbatches(self) -> Iterator[dict[str, Any]]:
        while True:
            rollouts = self.collect()
            shuffle = torch.Generator().manual_seed(self._seed(1))
            for _ in range(self.ppo.epochs):
                order = torch.randperm(len(rollouts.answers), generator=shuffle).tolist()
                for start in range(0, len(order), self.args.per_device_train_batch_size):
                    rows = order[start : start + self.args.per_device_train_batch_size]
                    yield rollouts.take(rows, self.pad, self.args.device)
            self.told["seconds_training"] = time.monotonic() - self.began

    def _seed(self, what: int) -> int:
        """A seed that depends on nothing but the run's seed, the iteration and the process: resuming needs no more."""
        return (((self.args.seed * 1_000_003 + self.iteration) * 1_009 + self.args.process_index) * 7 + what) % 2**32

    def collect(self) -> Rollouts:
        """Answers to the next prompts, with all that the loss needs (steps 1 to 6)."""
        began = time.monotonic()
        prompts = self._next_prompts()
        answers = self.sample([p.ids for p in prompts], self._seed(2))  # 1
        sampled = time.monotonic()
        scores = self.score(prompts, answers)  # 2
        device = self.args.device
        old, reference, values = self.old([p.ids for p in prompts], answers)  # 3
        mask = Sequences.of([p.ids for p in prompts], answers, self.pad, device).mask
        penalised = scores - self.ppo.missing_eos_penalty * ~self.ended(answers)
        rewards = adv.rewards(penalised, old.logps, reference.logps, mask, self.kl_coef)  # 4
        if self.ppo.whiten_rewards:
            rewards = adv.whiten(rewards, mask, self._moments(rewards, mask), shift=False)
        advantages, returns = adv.gae(rewards, values, mask, self.ppo.gamma, self.ppo.lam)  # 5
        advantages = adv.whiten(advantages, mask, self._moments(advantages, mask)).float()  # 6

        kl = ((old.logps - reference.logps) * mask).sum(1)
        count, total, squares = self._moments(returns, mask)
        _, error, error_squares = self._moments(returns - values, mask)
        spread, unexplained = squares / count - (total / count) ** 2, error_squares / count - (error / count) ** 2
        self.began = time.monotonic()
        self.told = {
            "score": self._mean(scores),
            "kl": self._mean(kl),
            "kl_coef": self.kl_coef,
            "length": self._mean(mask.sum(1).float()),
            "eos_rate": self._mean(self.ended(answers).float()),
            "entropy": float((old.entropy * mask).sum() / mask.sum()),
            "explained_variance": float(1 - unexplained / spread) if spread > 0 else 0.0,
            "sampled_tokens_per_second": float(mask.sum()) / max(sampled - began, 1e-9),
            "seconds_sampling": sampled - began,
            "seconds_scoring": self.began - sampled,
        }
        if self.ppo.kl_target is not None:
            self.kl_coef = adv.next_kl_coef(
                self.kl_coef, self.told["kl"], self.ppo.kl_target, self.ppo.batch_size, self.ppo.kl_horizon
            )
        return Rollouts([p.ids for p in prompts], answers, mask, old.logps, values, advantages, returns)

    def _next_prompts(self) -> list[Prompted]:
        """This iteration's prompts, each as often as it is answered: pass after pass over all, newly shuffled."""
        wanted = self.ppo.batch_size // self.ppo.samples_per_prompt
        order: list[int] = []
        place, passes = self.iteration * wanted, self.iteration * wanted // len(self.prompts)
        while len(order) < place % len(self.prompts) + wanted:
            generator = torch.Generator().manual_seed(self.args.seed + passes)
            order += torch.randperm(len(self.prompts), generator=generator).tolist()
            passes += 1
        chosen = order[place % len(self.prompts) :][:wanted]
        mine = chosen[self.args.process_index :: self.args.world_size]
        return [self.prompts[i] for i in mine for _ in range(self.ppo.samples_per_prompt)]

    def sample(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """Answers of the policy, as token ids."""
        transformers.set_seed(seed)
        roles = self.accelerator.unwrap_model(self.model)
        roles.eval()
        with roles.using("policy") as policy, torch.no_grad(), self.compute_loss_context_manager():
            answers: list[list[int]] = self.engine(policy, prompts)
        return answers

    def score(self, prompts: list[Prompted], answers: list[list[int]]) -> Tensor:
        """The reward's score of each answer, [B]."""
        texts = [text(self.tokenizer, answer) for answer in answers]
        batch = Answers([p.messages for p in prompts], texts, [p.ids for p in prompts], answers)
        scores: list[float] = self.reward(batch)
        clip = self.ppo.score_clip
        found = torch.tensor(scores, device=self.args.device)
        return found.clamp(-clip, clip) if clip is not None else found

    @property
    def per_forward(self) -> int:
        """Answers in a forward without gradients."""
        return int(self.args.per_device_eval_batch_size)

    @torch.no_grad()
    def old(self, prompts: list[list[int]], answers: list[list[int]]) -> tuple[Any, Any, Tensor]:
        """Log-probabilities of the policy and the reference, and values, from the forward that training does."""
        from alignkit.trunk import Logps

        width = max(map(len, answers))
        roles = self.accelerator.unwrap_model(self.model)
        roles.train(self.model.training)
        parts = []
        for start in range(0, len(answers), self.per_forward):
            some = slice(start, start + self.per_forward)
            sequences = Sequences.of(prompts[some], answers[some], self.pad, self.args.device)
            with self.compute_loss_context_manager():
                parts.append(roles(sequences, ("policy", "reference", "value")))

        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors])

        policy, reference = (
            Logps(joined([p[role].logps for p in parts]), joined([p[role].entropy for p in parts]))
            for role in ("policy", "reference")
        )
        return policy, reference, joined([part["value"] for part in parts])

    def ended(self, answers: list[list[int]]) -> Tensor:
        """Whether each answer ended by itself, [B] bool."""
        return torch.tensor([answer[-1] in self.sampling.stop_ids for answer in answers], device=self.args.device)

    def _moments(self, values: Tensor, mask: Tensor) -> Any:
        return tuple(self.accelerator.reduce(each) for each in adv.moments(values, mask))

    def _mean(self, values: Tensor) -> float:
        return float(self.accelerator.reduce(values.double().mean(), "mean"))

    # --- one optimizer step ------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The microbatches of a step, and how many response tokens they hold on all processes."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        tokens = sum((batch["sequences"].length.sum() for batch in batches), torch.tensor(0, device=device))
        return batches, self.accelerator.reduce(tokens)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a microbatch, as its share of the step's (step 7)."""
        sequences: Sequences = inputs["sequences"]
        output = model(sequences, ("policy", "value"))
        batch = PolicyBatch(
            logps=output["policy"].logps,
            old_logps=inputs["old_logps"],
            advantages=inputs["advantages"],
            values=output["value"],
            old_values=inputs["old_values"],
            returns=inputs["returns"],
            entropy=output["policy"].entropy,
            mask=sequences.mask,
            num_tokens=num_items_in_batch,
        )
        if self.state.global_step == 0 and not self.sums:
            diagnosis.first_step(batch, self.model, exact=not (self.args.bf16 or self.args.fp16))
        if self.iteration < self.ppo.value_warmup:
            batch = diagnosis.value_only(batch)
        found = self.loss(batch)
        for name, value in found.metrics.items():
            self.sums[name] += value / self.steps
        return found.loss * self.accelerator.num_processes  # DDP averages gradients; the tokens are of every process

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the iteration's figures to what the Trainer logs."""
        if "loss" in logs:
            self.told["seconds_training"] = time.monotonic() - self.began
            logs.update({**self.told, **self.sums})
            self.sums.clear()
            self.watch.iteration(logs)
            if self.ppo.max_kl is not None and logs["kl"] > self.ppo.max_kl:
                self.run.say(f"stopping: an answer's KL of {logs['kl']:.1f} is over ppo.max_kl={self.ppo.max_kl:g}")
                self.control.should_training_stop = True
        super().log(logs, start_time)

    def optimizer_step_done(self) -> None:
        """Average the policy's weights, if they are to be (step 11)."""
        if self.ppo.ema:
            with torch.no_grad():
                for name, parameter in self.policy_weights():
                    self.average[name].lerp_(parameter, 1 - self.ppo.ema)

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained of the policy."""
        roles: Roles = self.accelerator.unwrap_model(self.model)
        return roles.trained("policy")

    # --- evaluation (step 12) ----------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score, KL, length and end rate on the held-out prompts, and the answers beside the SFT model's."""
        answers = []
        for start in range(0, len(self.held_out), self.ppo.batch_size):
            part = self.held_out[start : start + self.ppo.batch_size]
            answers += self.sample([p.ids for p in part], self.args.seed)
        scores = self.score(self.held_out, answers)
        policy, reference, _ = self.old([p.ids for p in self.held_out], answers)
        texts = [text(self.tokenizer, answer) for answer in answers]
        metrics = {
            "eval_score": float(scores.mean()),
            "eval_score_error": float(scores.std() / len(scores) ** 0.5),
            "eval_kl": float((policy.logps - reference.logps).sum(1).mean()),
            "eval_length": sum(map(len, answers)) / len(answers),
            "eval_eos_rate": float(self.ended(answers).float().mean()),
        }
        if not self.state.global_step:
            self.before = texts
        elif self.is_world_process_zero():
            self._write_table(texts, scores.tolist())
        kept = self.ppo.max_kl is None or metrics["eval_kl"] <= self.ppo.max_kl
        if self.ppo.keep == "best" and kept and (self.best is None or metrics["eval_score"] > self.best[0]):
            self.best = (metrics["eval_score"], {n: p.detach().clone() for n, p in self.policy_weights()})
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _write_table(self, texts: list[str], scores: list[float]) -> None:
        file = self.run.folder / "answers.jsonl"
        rows = [
            {"prompt": prompt.messages[-1]["content"], "before": before, "after": after, "score": round(score, 4)}
            for prompt, before, after, score in zip(self.held_out, self.before, texts, scores, strict=True)
        ]
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    # --- what is saved -----------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint holds everything that is trained, the value function too; the run folder the policy alone."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        roles: Roles = self.accelerator.unwrap_model(self.model)
        if _internal_call:
            trained = {n: p.detach().cpu().contiguous() for n, p in roles.named_parameters() if p.requires_grad}
            more = {f"average/{n}": t.cpu() for n, t in self.average.items()}
            more |= {f"best/{n}": t.cpu() for n, t in self.best[1].items()} if self.best else {}
            safetensors.torch.save_file({**trained, **more}, folder / "trained.safetensors")
            state = {"kl_coef": self.kl_coef, "best": self.best[0] if self.best else None, "before": self.before}
            (folder / "ppo.json").write_text(json.dumps(state), encoding="utf-8")
            return
        roles.save_policy(folder)
        self.tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        saved = safetensors.torch.load_file(folder / "trained.safetensors")
        state = json.loads((folder / "ppo.json").read_text(encoding="utf-8"))
        kinds: dict[str, dict[str, Tensor]] = {"": {}, "average": {}, "best": {}}
        for name, tensor in saved.items():
            kind, slash, rest = name.partition("/")
            kinds[kind if slash else ""][rest if slash else name] = tensor
        self.model.put(kinds[""])
        self.average = {name: tensor.to(self.args.device) for name, tensor in kinds["average"].items()}
        self.best = (state["best"], kinds["best"]) if kinds["best"] else None
        self.kl_coef, self.before = state["kl_coef"], state["before"]

    def keep(self) -> bool:
        """Put the policy in place that is to be kept, if it is another than the last; whether it is."""
        kept = self.best[1] if self.best else self.average
        self.accelerator.unwrap_model(self.model).put(kept)
        return bool(kept)


class AfterStep(transformers.TrainerCallback):
    """Tells the trainer that an optimizer step is done."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.optimizer_step_done()


def finish(run: Run, trainer: PPOTrainer) -> dict[str, Any]:
    """Keep the policy that the config asks for, and evaluate it."""
    if trainer.keep() and trainer.held_out:
        trainer.evaluate()
    return {}
