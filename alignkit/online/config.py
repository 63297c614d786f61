"""The settings that every online stage has. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from alignkit.components import option
from alignkit.config.data_sources import DataPath, parse
from alignkit.errors import ConfigError
from alignkit.protocols import Plan


@dataclass(frozen=True)
class OnlineConfig:
    """Base of an online stage's config. Derive from it to add settings."""

    iterations: Annotated[int, Gt(0)] = option(100, "rounds of sampling and training", resume="may_grow")
    batch_size: Annotated[int, Gt(0)] = option(64, "answers per iteration, over all processes")
    samples_per_prompt: Annotated[int, Gt(0)] = option(1, "answers per prompt of a batch")
    shared_prompt: bool | None = option(
        None, "compute a prompt once for all its answers; null: if the results are the same and it is faster"
    )
    minibatches: Annotated[int, Gt(0)] = option(
        4, "optimizer steps per epoch, independent of train.per_device_train_batch_size"
    )
    epochs: Annotated[int, Gt(0)] = option(1, "passes over each batch")
    response_length: Annotated[int, Gt(0)] = option(128, "maximum tokens of an answer")
    temperature: Annotated[float, Gt(0)] = option(1.0, "sampling temperature; log-probabilities use it too")
    max_prompt_length: Annotated[int, Gt(0)] = option(512, "maximum tokens of a prompt; longer ones stop the run")
    kl_coef: Annotated[float, Ge(0)] = option(0.05, "coefficient (beta) of the KL penalty to the reference")
    kl_target: Annotated[float, Gt(0)] | None = option(
        None, "adapt kl_coef to keep the KL per answer close to this; null: fixed"
    )
    kl_horizon: Annotated[int, Gt(0)] = option(
        10000, "horizon of the adaptation of kl_coef, in answers; larger is slower", only_with="kl_target"
    )
    missing_eos_penalty: Annotated[float, Ge(0)] = option(
        1.0, "subtracted from the score of an answer that did not end"
    )
    score_clip: Annotated[float, Gt(0)] | None = option(None, "clip scores to plus or minus this; null: no clipping")
    ema: Annotated[float, Ge(0), Lt(1)] | None = option(
        None,
        "decay of an exponential moving average of the policy's weights; if set, the run saves the average",
    )
    ptx_coef: Annotated[float, Ge(0)] = option(0.0, "weight of the loss on pretraining text (PPO-ptx); 0: off")
    ptx_data: DataPath = option(
        None,
        "texts or demonstrations for PPO-ptx, as data.path; null: the data of the policy's SFT run",
        only_with="ptx_coef",
    )
    ptx_batch_size: Annotated[int, Gt(0)] = option(
        8, "PPO-ptx texts per optimizer step, over all processes", only_with="ptx_coef"
    )
    ptx_length: Annotated[int, Gt(1)] = option(
        256,
        "maximum tokens of a PPO-ptx text; longer texts are split, longer demonstrations are left out",
        only_with="ptx_coef",
    )
    max_kl: Annotated[float, Gt(0)] | None = option(
        None, "stop after an iteration whose mean KL per answer exceeds this; null: never", resume="may_grow"
    )
    eval_every: Annotated[int, Gt(0)] = option(
        5,
        "iterations between evaluations on held-out prompts",
        resume=lambda config: "same" if config.keep == "best" else "may_change",
    )
    save_every: Annotated[int, Gt(0)] = option(10, "iterations between checkpoints", resume="may_change")
    keep: Literal["last", "best"] = option(
        "last", "the policy to save: the last one, or the evaluated one with the best held-out score within max_kl"
    )

    @property
    def value_function(self) -> Literal["adapter", "head"] | None:
        """The value function: an adapter (or model) of its own, a head on the policy, or None for no values."""
        return None

    @property
    def steps(self) -> int:
        """Optimizer steps of an iteration."""
        return self.epochs * self.minibatches


def check(table: str, config: OnlineConfig, plan: Plan | None) -> None:
    """Check what can be checked without a model. ``table`` is the stage's name, for messages.

    Without a ``plan``, what depends on the ``train`` table, the data and the number of processes is not checked.

    Raises:
        ConfigError: settings contradict each other.
    """
    if config.batch_size % config.samples_per_prompt:
        raise ConfigError(f"{table}.batch_size must be a multiple of {table}.samples_per_prompt")
    if config.shared_prompt and config.samples_per_prompt == 1:
        raise ConfigError(f"{table}.shared_prompt has no effect without {table}.samples_per_prompt of 2 or more")
    if config.batch_size % config.minibatches:
        raise ConfigError(
            f"{table}.batch_size={config.batch_size} cannot be split into {table}.minibatches={config.minibatches}"
        )
    parse(config.ptx_data, f"{table}.ptx_data")
    if config.keep == "best" and config.ema is not None:
        raise ConfigError(
            f"{table}.keep=best saves a policy that was evaluated, {table}.ema saves an average: choose one"
        )
    if plan is None:
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    microbatches(table, config, plan.config.train["per_device_train_batch_size"], processes)
    if plan.config.train.get("shard") and config.ptx_coef and config.ptx_batch_size % processes:
        raise ConfigError(
            f"{table}.ptx_batch_size={config.ptx_batch_size}: with train.shard, it must be a multiple of the "
            f"{processes} processes"
        )
    if config.keep == "best" and not plan.eval_rows:
        raise ConfigError(f"{table}.keep=best needs held-out prompts: set data.eval_size")


def microbatches(table: str, config: OnlineConfig, wanted: int, processes: int) -> tuple[int, int]:
    """Answers per microbatch, and microbatches per optimizer step and process.

    The microbatch is of ``wanted`` answers, or the whole minibatch of a process if that is smaller.

    Raises:
        ConfigError: batch, minibatches, processes and microbatches do not divide; a process would have no ptx text.
    """
    prompts, rest = divmod(config.batch_size, config.samples_per_prompt)
    if rest or prompts % processes:
        raise ConfigError(
            f"{table}.batch_size must be a multiple of {table}.samples_per_prompt times the number of processes"
        )
    if config.ptx_coef and config.ptx_batch_size < processes:
        raise ConfigError(
            f"{table}.ptx_batch_size={config.ptx_batch_size} is less than one text for each of the {processes} "
            "processes"
        )
    minibatch, rest = divmod(config.batch_size, config.minibatches * processes)
    size = min(wanted, minibatch)
    if rest or not minibatch or minibatch % size:
        raise ConfigError(
            f"{table}.batch_size={config.batch_size} cannot be split into {table}.minibatches={config.minibatches} of "
            f"whole microbatches (train.per_device_train_batch_size={wanted}, {processes} processes)"
        )
    return size, minibatch // size


def refused_train_keys(table: str) -> dict[str, str]:
    """Keys of ``train`` that have no effect in an online stage, and what to set instead."""
    batches = f"the batch is made of sampled answers: set {table}.batch_size"
    logs = "there is one log line per iteration"
    best = f"{table}.keep=best chooses by the held-out score"
    recompute = "each layer is recomputed with the adapter that computed it"
    return {
        "num_train_epochs": f"set {table}.iterations",
        "gradient_accumulation_steps": f"set {table}.minibatches and {table}.batch_size",
        "logging_strategy": logs,
        "logging_steps": logs,
        "logging_first_step": logs,
        "eval_strategy": f"set {table}.eval_every, or data.eval_size=0",
        "eval_steps": f"set {table}.eval_every",
        "eval_on_start": "held-out prompts are always evaluated before training: set data.eval_size",
        "save_steps": f"set {table}.save_every",
        "save_strategy=epoch": f"set {table}.save_every",
        "save_strategy=best": f"set {table}.keep=best",
        "load_best_model_at_end": f"set {table}.keep=best",
        "metric_for_best_model": best,
        "greater_is_better": best,
        "eval_accumulation_steps": "set train.per_device_eval_batch_size",
        "data_seed": "set train.seed",
        "neftune_noise_alpha": "log-probabilities must be exact",
        "activation_checkpointing_kwargs": recompute,
        "gradient_checkpointing_kwargs": recompute,
        "train_sampling_strategy": batches,
        "dataloader_drop_last": batches,
        "dataloader_num_workers": batches,
        "dataloader_pin_memory": batches,
        "dataloader_persistent_workers": batches,
        "dataloader_prefetch_factor": batches,
        "dataloader_multiprocessing_context": batches,
        "deepspeed": "remove it here; for another stage alone, set it as in sft.train.deepspeed",
    }
