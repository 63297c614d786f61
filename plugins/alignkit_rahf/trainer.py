"""RAHF in one training loop: first the contrast, then the fit, with the differences computed as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from alignkit import HiddenStates, LossOutput, Run
from alignkit.data import Ranked, encode_rankings
from alignkit.models import decoder_layers
from alignkit.online import RolesTrainer
from alignkit.training import Means
from alignkit_rahf.config import adapters, chosen_layers, contrast_steps
from alignkit_rahf.evaluation import HeldOut
from alignkit_rahf.losses import contrast_loss, right_and_wrong, target
from alignkit_rahf.pairs import Texts, asked_for, better, both, check_instructed_fit, collate, pairs_of, worse
from alignkit_rahf.roles import Job, load, train_up_to

if TYPE_CHECKING:
    from alignkit_rahf.config import RAHFConfig

LORA_LR_SCALE = 10.0  # of the contrast's LoRA adapters beside a policy without adapters, as the tuner `lora` has it


def build(run: Run) -> RAHFTrainer:
    """Tokenize the pairs, load the roles, and make the trainer."""
    config: RAHFConfig = run.config.stage.config
    pairs, held_out = (
        pairs_of(encode_rankings(run, rows, config.max_length, config.too_long)) if rows else []
        for rows in (run.train_rows, run.eval_rows)
    )
    if config.contrast == "single" and run.limits.learnt:
        check_instructed_fit(run, config, [*pairs, *held_out])
    args = run.training_arguments(transformers.TrainingArguments, remove_unused_columns=False)
    loss, optimizer = run.loss(), run.optimizer(args)  # before the model is loaded, as their settings may be wrong
    roles = load(run, adapters(config))
    layers = chosen_layers(config, len(decoder_layers(roles.members["policy"].model)))
    train_up_to(roles, layers[-1])
    run.say(f"{roles.describe()}; the outputs of the layers {', '.join(map(str, layers))} move")
    return RAHFTrainer(
        run=run,
        loss=loss,
        layers=layers,
        held_out=held_out,
        model=roles,
        args=args,
        train_dataset=pairs,
        data_collator=collate,
        callbacks=run.callbacks(),
        optimizer_cls_and_kwargs=optimizer,
    )


class RAHFTrainer(RolesTrainer):
    """Trains the adapters of the contrast for the first steps, and the policy for the others."""

    lr_scheduler: Any  # of transformers.Trainer
    loss_is_scaled_for_ga = True  # the losses are divided by the tokens of the whole optimizer step

    def __init__(self, *, run: Run, loss: Any, layers: list[int], held_out: Sequence[Ranked], **kwargs: Any) -> None:
        super().__init__(run=run, eval_dataset=held_out or None, **kwargs)
        self.config: RAHFConfig = run.config.stage.config
        self.loss, self.layers = loss, layers
        self.means = Means(self.accelerator)  # of the steps since the last log
        self.held_out = HeldOut(self)
        self.contrast_steps = 0  # known when training starts
        self.add_callback(EndOfContrast(self))

    @property
    def contrasting(self) -> bool:
        """Whether the next optimizer step trains the contrast. If not, it trains the policy."""
        return self.state.global_step < self.contrast_steps

    # --- inputs ------------------------------------------------------------------------------------------------------

    def job(self, role: str, texts: Texts) -> Job:
        """These texts as the input of a role."""
        pad = self.run.tokenizer.pad_token_id
        return role, self.roles.sequences(texts.prompts, texts.answers, pad, self.args.device, role)

    def contrast(self, pairs: Sequence[Ranked]) -> dict[str, Job]:
        """Both answers of each pair, as the good and as the bad side of the contrast read them."""
        if self.config.contrast == "dual":
            return {role: self.job(role, both(pairs)) for role in ("good", "bad")}
        instructions = {"good": self.config.good_instruction, "bad": self.config.bad_instruction}
        return {side: self.job("contrast", asked_for(self.run, pairs, text)) for side, text in instructions.items()}

    # --- one optimizer step ------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The microbatches of a step, and the numbers of answer tokens and of answers of all processes, [2]."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        answers = [answer for batch in batches for answer in both(batch["pairs"]).answers]
        counts = torch.tensor([sum(map(len, answers)), len(answers)], device=device)
        return batches, self.accelerator.reduce(counts)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a microbatch, as its share of the step's."""
        pairs: Sequence[Ranked] = inputs["pairs"]
        num_tokens, num_answers = num_items_in_batch
        share = sum(map(len, both(pairs).answers)) / num_tokens
        if self.contrasting:
            loss = self.loss_of_contrast(model, pairs, num_tokens, num_answers)
            self.means.add({"contrast_loss": loss / share}, share)
        else:
            output, shift = self.loss_of_fit(model, pairs, num_tokens)
            loss = output.loss
            of_loss = {name: value / share for name, value in output.metrics.items()}
            self.means.add({"fit_loss": loss / share, "shift": shift, **of_loss}, share)
        return loss * self.accelerator.num_processes  # DDP averages gradients over processes

    def loss_of_contrast(self, model: Any, pairs: Sequence[Ranked], num_tokens: Tensor, num_answers: Tensor) -> Tensor:
        """Step 1: good answers become likely under the good side, bad ones under the bad side."""
        lengths = torch.tensor([len(answer) for answer in both(pairs).answers], device=self.args.device)
        if self.config.contrast == "dual":
            logps = model({"good": self.job("good", better(pairs)), "bad": self.job("bad", worse(pairs))})
            right, wrong = torch.cat([logps["good"], logps["bad"]]), None
        else:
            right, wrong = right_and_wrong(**model(self.contrast(pairs)))
        return contrast_loss(right, wrong, lengths, self.config.label_smoothing, num_tokens, num_answers)

    def loss_of_fit(self, model: Any, pairs: Sequence[Ranked], num_tokens: Tensor | int) -> tuple[LossOutput, Tensor]:
        """Steps 2 and 3: the policy's hidden states move to those of its start, plus alpha times the difference.

        Returns the loss, and the mean distance that the hidden states should move.
        """
        with torch.no_grad(), self.accelerator.autocast():
            states = self.roles({"start": self.job("reference", both(pairs)), **self.contrast(pairs)}, self.layers)
        goal = target(states["start"], states["good"], states["bad"], self.config.alpha)
        hidden = model({"policy": self.job("policy", both(pairs))}, self.layers)["policy"]
        shift = torch.linalg.vector_norm(goal - states["start"].float(), dim=-1).mean()
        return self.loss(HiddenStates(hidden, goal, num_tokens)), shift

    # --- the learning rate, logs and evaluation ----------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of ``train.lr_scheduler_type``, from the beginning for each of the two phases."""
        if self.lr_scheduler is None:
            first = self.contrast_steps = contrast_steps(self.config, num_training_steps)
            self.run.policy_learns_from = first
            contrast, fit = self._schedule(first), self._schedule(num_training_steps - first)
            scale = LORA_LR_SCALE if self.roles.members["policy"].adapter is None else 1.0

            def factor(step: int) -> float:
                return scale * contrast(step) if step < first else fit(step - first)

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _schedule(self, steps: int) -> Any:
        """The factor of the learning rate at each of so many steps."""
        schedule = transformers.get_scheduler(
            self.args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=self.args.learning_rate),
            self.args.get_warmup_steps(steps),
            steps,
            self.args.lr_scheduler_kwargs,
        )
        return schedule.lr_lambdas[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the phase, as means over the steps since the last log."""
        if "loss" in logs:
            logs.update(self.means.take())
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics of the held-out pairs, and of answers that the policy samples to their prompts."""
        metrics = self.held_out.evaluate()
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class EndOfContrast(transformers.TrainerCallback):
    """Logs, evaluates and saves at the end of the contrast, so that no logged mean is of both phases."""

    def __init__(self, trainer: RAHFTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.trainer.contrast_steps:
            control.should_log = True
            control.should_evaluate |= args.eval_strategy != "no"
            control.should_save |= args.save_strategy != "no"
