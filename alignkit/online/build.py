"""From a run to the trainer of an online stage."""

from __future__ import annotations

from typing import Any, TypeVar

import transformers

from alignkit.models import assemble
from alignkit.online.config import OnlineConfig, microbatches
from alignkit.online.prompts import encode_prompts
from alignkit.online.ptx import encode_texts
from alignkit.online.trainer import OnlineTrainer
from alignkit.protocols import Run

T = TypeVar("T", bound=OnlineTrainer)


class Epoch(transformers.TrainerCallback):
    """An epoch is the whole run. The Trainer would count it from the checkpoint that a run is resumed from."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps


def build_trainer(run: Run, trainer: type[T]) -> T:
    """Encode the prompts, put the roles on one trunk, and make the trainer.

    Raises:
        ConfigError: a setting does not fit the data or the number of processes.
        DataError: a prompt is too long.
    """
    config: OnlineConfig = run.config.stage.config
    table, train = run.config.stage.component.name, run.config.train
    microbatch, accumulation = microbatches(table, config, train["per_device_train_batch_size"], run.processes)
    prompts, held_out = encode_prompts(run, run.train_rows), encode_prompts(run, run.eval_rows)
    texts = encode_texts(run) if config.ptx_coef else []
    max_steps = train.get("max_steps", -1)
    run.steps_between_checkpoints = config.steps
    args = run.training_arguments(
        transformers.TrainingArguments,
        max_steps=max_steps if max_steps > 0 else config.iterations * config.steps,
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=accumulation,
        logging_strategy="steps",
        logging_steps=config.steps,  # one line per iteration, which max_kl and the warnings depend on
        logging_first_step=False,
        save_strategy="no" if train.get("save_strategy") == "no" else "steps",
        save_steps=config.save_every * config.steps,
        eval_strategy="steps" if held_out else "no",
        eval_steps=config.eval_every * config.steps,
        eval_on_start=bool(held_out),  # its answers are those of step 0 in answers.jsonl
        ignore_data_skip=True,
        remove_unused_columns=False,
    )
    loss, optimizer, reward = run.loss(), run.optimizer(args), run.reward()  # before the models: they may refuse
    roles = assemble(run, value=config.value_function, temperature=config.temperature)
    run.say(roles.describe())
    return trainer(
        run=run,
        loss=loss,
        reward=reward,
        prompts=prompts,
        held_out=held_out,
        ptx_texts=texts,
        model=roles,
        args=args,
        callbacks=[*run.callbacks(), Epoch()],
        optimizer_cls_and_kwargs=optimizer,
    )
