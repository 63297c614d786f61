"""PPO as a ``transformers.Trainer`` whose data are the policy's own answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from alignkit import ConfigError, PolicyBatch, Run
from alignkit.evaluation import error_bar, write_answers
from alignkit.generation.sampling import text
from alignkit.models import Sequences, assemble
from alignkit.online import RolesTrainer
from alignkit.training.meters import Means
from alignkit_ppo import diagnosis, ema
from alignkit_ppo.advantages import next_kl_coef
from alignkit_ppo.collect import Collector, Prompted, encode
from alignkit_ppo.ptx import Pretraining, examples

if TYPE_CHECKING:
    from alignkit_ppo.config import PPOConfig


def build(run: Run) -> PPOTrainer:
    """Encode the prompts, put the roles on one trunk, and both into a trainer."""
    config: PPOConfig = run.config.stage.config
    micro, accumulated = microbatches(config, run.config.train["per_device_train_batch_size"], run.processes)
    if config.keep == "best" and not run.eval_rows:
        raise ConfigError("ppo.keep=best needs held-out prompts: data.eval_size")
    train, held_out = encode(run, run.train_rows, config), encode(run, run.eval_rows, config)
    texts = examples(run, config) if config.ptx_coef else []
    steps = config.epochs * config.minibatches  # optimizer steps an iteration
    wanted = run.config.train.get("max_steps", -1)
    run.steps_between_checkpoints = steps
    run.policy_learns_from = config.value_warmup * steps
    args = run.training_arguments(
        transformers.TrainingArguments,
        max_steps=wanted if wanted > 0 else config.iterations * steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        logging_strategy="steps",
        logging_steps=steps,  # a line an iteration, on which the bound of the KL and the warnings depend
        logging_first_step=False,
        save_strategy="no" if run.config.train.get("save_strategy") == "no" else "steps",
        save_steps=config.save_every * steps,
        eval_strategy="steps" if held_out else "no",
        eval_steps=config.eval_every * steps,
        eval_on_start=bool(held_out),  # its answers are those that later ones stand beside
        ignore_data_skip=True,
        remove_unused_columns=False,
    )
    loss, optimizer, reward = run.loss(), run.optimizer(args), run.reward()  # before the models: they may refuse
    roles = assemble(run, value=config.value, temperature=config.temperature)
    run.say(roles.describe())
    trainer = PPOTrainer(
        run=run,
        loss=loss,
        held_out=held_out,
        steps=steps,
        model=roles,
        args=args,
        eval_dataset=held_out or None,
        callbacks=run.callbacks(),
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.collector = Collector(trainer, run, train, reward)
    if texts:
        trainer.pretraining = Pretraining(trainer, texts, config, run.tokenizer.pad_token_id)
    return trainer


def microbatches(config: PPOConfig, wanted: int, processes: int) -> tuple[int, int]:
    """Answers in a forward with gradients, ``wanted`` where the batch allows it, and such forwards a step and process.

    Raises:
        ConfigError: batch, minibatches, processes and microbatches do not divide; a process would have no ptx text.
    """
    if config.batch_size % config.samples_per_prompt or config.batch_size // config.samples_per_prompt % processes:
        raise ConfigError("ppo.batch_size must be a multiple of ppo.samples_per_prompt times the number of processes")
    if config.ptx_coef and config.ptx_batch_size < processes:
        raise ConfigError(
            f"ppo.ptx_batch_size={config.ptx_batch_size} is less than one text for each of the {processes} processes"
        )
    minibatch, rest = divmod(config.batch_size, config.minibatches * processes)
    micro = min(wanted, minibatch)
    if rest or not minibatch or minibatch % micro:
        raise ConfigError(
            f"ppo.batch_size={config.batch_size} cannot be split into ppo.minibatches={config.minibatches} of whole "
            f"microbatches (train.per_device_train_batch_size={wanted}, {processes} processes)"
        )
    return micro, minibatch // micro


class PPOTrainer(RolesTrainer):
    """Rollouts in the data loader; the loss, through the hook, in ``compute_loss``."""

    loss_is_scaled_for_ga = True  # the loss is divided by the response tokens of the whole optimizer step
    collector: Collector
    pretraining: Pretraining | None = None

    def __init__(self, *, run: Run, loss: Any, held_out: list[Prompted], steps: int, **kwargs: Any) -> None:
        super().__init__(run=run, **kwargs)
        self.config: PPOConfig = run.config.stage.config
        self.loss, self.held_out, self.steps = loss, held_out, steps
        self.kl_coef = self.config.kl_coef
        self.average = ema.start(self.policy_weights()) if self.config.ema else {}
        self.figures: dict[str, float] = {}  # of this iteration's rollouts, for the log
        self.means = Means(self.accelerator)  # of its optimizer steps
        self.microbatches = 0  # of this optimizer step that are done
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.before: list[str] = []  # the first evaluation's answers, which are the SFT model's
        self.after: list[str] = []  # the last evaluation's
        self.watch = diagnosis.Watch(run.say, ends=self.config.missing_eos_penalty > 0)
        self.add_callback(AfterStep(self))

    @property
    def iteration(self) -> int:
        """How many iterations are complete."""
        return int(self.state.global_step) // self.steps

    # --- rollouts ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Microbatches without end: each iteration's are made of answers that the policy gives when it begins."""
        return self._microbatches()

    def _microbatches(self) -> Iterator[dict[str, Any]]:
        size = self.args.per_device_train_batch_size
        while True:
            rollouts = self.collector.collect(self.iteration, self.kl_coef)
            self.figures, self.began = rollouts.figures, time.monotonic()
            if self.config.kl_target is not None:  # step 9
                self.kl_coef = next_kl_coef(
                    self.kl_coef,
                    rollouts.figures["kl"],
                    target=self.config.kl_target,
                    answers=self.config.batch_size,
                    horizon=self.config.kl_horizon,
                )
            shuffle = torch.Generator().manual_seed(self.collector.seed(self.iteration, 1))
            for _ in range(self.config.epochs):
                order = torch.randperm(len(rollouts.answers), generator=shuffle).tolist()
                for start in range(0, len(order), size):
                    yield rollouts.take(order[start : start + size], self.collector.pad, self.args.device)

    # --- one optimizer step (steps 7 and 8) --------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The microbatches of a step, and how many response tokens they hold on all processes.

        None where a run is resumed that had only to be finished: to the Trainer a loader without end has more to give.
        """
        if self.state.global_step >= self.args.max_steps:
            return [], None
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        tokens = sum((batch["mask"].sum() for batch in batches), torch.tensor(0, device=device))
        return batches, self.accelerator.reduce(tokens).clamp(min=1)  # the reward may have refused all of them

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A microbatch's backward pass; before a step's first, that of the pretraining text (step 10)."""
        mixed = self.pretraining if self.iteration >= self.config.value_warmup else None
        if mixed and not self.microbatches:
            model.train()
            self.means.add(mixed.backward(model))
        loss: Tensor = super().training_step(model, *args, **kwargs)
        self.microbatches = (self.microbatches + 1) % self.args.gradient_accumulation_steps
        if mixed and not self.microbatches:
            self.means.add({"ppo_grad_norm": mixed.rest_norm(model)})
        if self.iteration < self.config.value_warmup and not self.microbatches:
            for _, parameter in self.policy_weights():
                parameter.grad = None  # which the value gave it, as a head on it; without one there is no decay either
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a microbatch, as its share of the step's."""
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
            mask=inputs["mask"],
            num_tokens=num_items_in_batch,
        )
        if self.state.global_step == 0 and not self.microbatches:
            self._check_first_step(batch, model, sequences)
        if self.iteration < self.config.value_warmup:
            batch = diagnosis.value_only(batch)
        found = self.loss(batch)
        share = batch.mask.sum() / num_items_in_batch  # of the step; the metrics are shares of its means too
        self.means.add({name: value / share.clamp(min=1e-12) for name, value in found.metrics.items()}, share)
        return found.loss * self.accelerator.num_processes  # DDP averages gradients; the tokens are of every process

    def _check_first_step(self, batch: PolicyBatch, model: Any, sequences: Sequences) -> None:
        @torch.no_grad()
        def again() -> Tensor:
            logps: Tensor = self.accelerator.unwrap_model(model)(sequences, ("policy",))["policy"].logps
            return logps

        if line := diagnosis.first_step(batch, self.model, self.collector.exact, again):
            self.run.say(line)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the iteration's figures to what the Trainer logs."""
        if "loss" in logs:
            logs.update({**self.figures, **self.means.take(), "seconds_training": time.monotonic() - self.began})
            self.watch.iteration(logs, next((log for log in self.state.log_history if "entropy" in log), logs))
            if self.config.max_kl is not None and logs["kl"] > self.config.max_kl:
                self.run.say(f"stopping: an answer's KL of {logs['kl']:.1f} is over ppo.max_kl={self.config.max_kl:g}")
                self.control.should_training_stop = True
        super().log(logs, start_time)

    def optimizer_step_done(self) -> None:
        """Average the policy's weights, if they are to be (step 11)."""
        if self.config.ema:
            ema.update(self.average, self.policy_weights(), self.config.ema)

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained of the policy."""
        return self.roles.trained("policy")

    # --- evaluation (step 12) ----------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score, KL, length and end rate on the held-out prompts, and the answers beside the SFT model's."""
        answers = []
        for start in range(0, len(self.held_out), self.config.batch_size):
            part = self.held_out[start : start + self.config.batch_size]
            answers += self.collector.sample([p.ids for p in part], self.args.seed)
        scores = self.collector.score(self.held_out, answers)
        said = self.collector.say([p.ids for p in self.held_out], answers, ("policy", "reference"))
        self.after = [text(self.collector.tokenizer, answer) for answer in answers]
        scored = scores[~scores.isnan()]
        metrics = {
            "eval_score": float(scored.mean()),
            **error_bar("eval_score_error", scored.cpu()),
            "eval_kl": float((said["policy"][0] - said["reference"][0]).sum(1).mean()),
            "eval_length": sum(map(len, answers)) / len(answers),
            "eval_eos_rate": float(self.collector.ended(answers).float().mean()),
        }
        if self.collector.skips:
            metrics["eval_reward_errors"] = len(scores) - len(scored)
        if not self.state.global_step:
            self.before = self.after
        elif self.is_world_process_zero():
            prompts = [prompt.messages for prompt in self.held_out]
            write_answers(self.run.folder, prompts, self.before, self.after, score=scores.tolist())
        kept = self.config.max_kl is None or metrics["eval_kl"] <= self.config.max_kl
        if self.config.keep == "best" and kept and (self.best is None or metrics["eval_score"] > self.best[0]):
            self.best = (metrics["eval_score"], {n: p.detach().clone() for n, p in self.policy_weights()})
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- what is saved -----------------------------------------------------------------------------------------------

    def checkpoint_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The average of the policy's weights, and those that scored best on the held-out prompts."""
        return {"average": self.average, "best": self.best[1] if self.best else {}}

    def checkpoint_state(self) -> dict[str, Any]:
        """The KL coefficient, the best held-out score, and the answers from before training."""
        return {"kl_coef": self.kl_coef, "best": self.best[0] if self.best else None, "before": self.before}

    def load_checkpoint(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Take back what a checkpoint holds beside the trained weights."""
        self.average = {name: tensor.to(self.args.device) for name, tensor in tensors.get("average", {}).items()}
        self.best = (state["best"], dict(tensors["best"])) if "best" in tensors else None
        self.kl_coef, self.before = state["kl_coef"], state["before"]

    def keep(self) -> bool:
        """Put the policy in place that is to be kept, if it is another than the last; whether it is."""
        kept = self.best[1] if self.best else self.average
        self.roles.load_weights(kept)
        return bool(kept)


class AfterStep(transformers.TrainerCallback):
    """Tells the trainer that an optimizer step is done."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.optimizer_step_done()


def finish(run: Run, trainer: PPOTrainer) -> dict[str, Any]:
    """Keep the policy that the config asks for, evaluate it, and say what became of the answers."""
    if not trainer.held_out:
        trainer.keep()
        return {}
    evaluated = [log for log in trainer.state.log_history if "eval_score" in log]
    first, last = evaluated[0], evaluated[-1]
    if trainer.keep() or last["step"] != trainer.state.global_step or not trainer.after:
        last = trainer.evaluate()
    before, after = (
        f"{log['eval_score']:.2f}" + (f" ± {log['eval_score_error']:.2f}" if "eval_score_error" in log else "")
        for log in (first, last)
    )
    run.say(
        f"held-out score {before} -> {after} at a KL of {last['eval_kl']:.1f} nats; "
        f"{last['eval_length']:.0f} tokens an answer, {last['eval_eos_rate']:.0%} end"
    )
    run.say(f"answers to {len(trainer.held_out)} held-out prompts, before and after, are in answers.jsonl; the first:")
    shown = {
        "prompt": trainer.held_out[0].messages[-1]["content"],
        "before": trainer.before[0],
        "after": trainer.after[0],
    }
    for label, answer in shown.items():
        run.say(f"{label:>11}  {' '.join(answer.split())}")
    return {}
