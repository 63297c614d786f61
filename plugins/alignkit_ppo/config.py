"""The ``ppo`` table."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from alignkit import ConfigError, option


@dataclass(frozen=True)
class PPOConfig:
    """What PPO has to set beside ``train``; the names are InstructGPT's and TRL's."""

    iterations: Annotated[int, Gt(0)] = option(100, "rounds of sampling and training", resume="may_grow")
    batch_size: Annotated[int, Gt(0)] = option(64, "answers an iteration, on all processes together")
    samples_per_prompt: Annotated[int, Gt(0)] = option(1, "answers to each prompt of a batch")
    minibatches: Annotated[int, Gt(0)] = option(4, "optimizer steps a pass over the batch, whatever the microbatch")
    epochs: Annotated[int, Gt(0)] = option(1, "passes over the batch")
    response_length: Annotated[int, Gt(0)] = option(128, "most tokens of an answer")
    temperature: Annotated[float, Gt(0)] = option(1.0, "of sampling, and of every log-probability")
    max_prompt_length: Annotated[int, Gt(0)] = option(512, "tokens; longer prompts stop the run")
    kl_coef: Annotated[float, Ge(0)] = option(0.05, "beta: what a nat of KL to the reference costs")
    kl_target: Annotated[float, Gt(0)] | None = option(None, "adapt kl_coef to keep the KL of an answer near this")
    kl_horizon: Annotated[int, Gt(0)] = option(10000, "how slowly kl_coef adapts, in answers")
    gamma: Annotated[float, Gt(0), Le(1)] = option(1.0, "discount a token")
    lam: Annotated[float, Ge(0), Le(1)] = option(0.95, "lambda of generalised advantage estimation")
    whiten_rewards: bool = option(False, "divide rewards by their deviation; advantages always are whitened")
    missing_eos_penalty: Annotated[float, Ge(0)] = option(1.0, "taken off the score of an answer that did not end")
    score_clip: Annotated[float, Gt(0)] | None = option(None, "scores are clipped to plus and minus this")
    value: Literal["adapter", "head"] = option("adapter", "the value function: as large as the policy, or a head on it")
    value_warmup: Annotated[int, Ge(0)] = option(0, "iterations at first in which the value alone is trained")
    ema: Annotated[float, Ge(0), Lt(1)] | None = option(
        None, "decay of an average of the policy's weights, which is what is kept"
    )
    ptx_coef: Annotated[float, Ge(0)] = option(0.0, "weight of the loss on pretraining text, PPO-ptx; 0: none")
    ptx_data: str | None = option(None, "its texts or demonstrations; null: what the policy's SFT run was trained on")
    ptx_batch_size: Annotated[int, Gt(0)] = option(8, "its texts an optimizer step, on all processes together")
    ptx_length: Annotated[int, Gt(1)] = option(256, "tokens; longer texts are cut into pieces")
    max_kl: Annotated[float, Gt(0)] | None = option(
        None, "stop when the KL of an answer is above this", resume="may_grow"
    )
    eval_every: Annotated[int, Gt(0)] = option(
        5,
        "iterations between evaluations on held-out prompts",
        resume=lambda config: "same" if config.keep == "best" else "may_change",
    )
    save_every: Annotated[int, Gt(0)] = option(10, "iterations between checkpoints", resume="may_change")
    keep: Literal["last", "best"] = option("last", "the policy to keep: the last, or that of the best held-out score")


PROMPTS = "PPO reads its prompts by itself; ppo.batch_size says how many"
LOGS = "PPO logs once an iteration"
REFUSES = {  # keys of `train`
    "num_train_epochs": "set ppo.iterations",
    "gradient_accumulation_steps": "set ppo.minibatches and ppo.batch_size",
    "logging_strategy": LOGS,
    "logging_steps": LOGS,
    "logging_first_step": LOGS,
    "eval_strategy": "set ppo.eval_every, or data.eval_size=0",
    "eval_steps": "set ppo.eval_every",
    "eval_on_start": "PPO evaluates where there are held-out prompts: set data.eval_size",
    "save_steps": "set ppo.save_every",
    "save_strategy=epoch": "set ppo.save_every",
    "save_strategy=best": "set ppo.keep=best",
    "load_best_model_at_end": "set ppo.keep=best",
    "metric_for_best_model": "ppo.keep=best goes by the held-out score",
    "greater_is_better": "ppo.keep=best goes by the held-out score",
    "eval_accumulation_steps": "set train.per_device_eval_batch_size",
    "data_seed": "set train.seed",
    "neftune_noise_alpha": "PPO compares exact log-probabilities",
    "activation_checkpointing_kwargs": "PPO recomputes every layer with the adapter that computed it",
    "gradient_checkpointing_kwargs": "PPO recomputes every layer with the adapter that computed it",
    "train_sampling_strategy": PROMPTS,
    "dataloader_drop_last": PROMPTS,
    "dataloader_num_workers": PROMPTS,
    "dataloader_pin_memory": PROMPTS,
    "dataloader_persistent_workers": PROMPTS,
    "dataloader_prefetch_factor": PROMPTS,
    "dataloader_multiprocessing_context": PROMPTS,
}


def check(config: PPOConfig) -> None:
    """What can be told of the settings without a model.

    Raises:
        ConfigError: they contradict each other.
    """
    if config.batch_size % config.samples_per_prompt:
        raise ConfigError("ppo.batch_size must be a multiple of ppo.samples_per_prompt")
    if config.batch_size % config.minibatches:
        raise ConfigError(
            f"ppo.batch_size={config.batch_size} cannot be split into ppo.minibatches={config.minibatches}"
        )
    if config.ptx_data is not None and not config.ptx_coef:
        raise ConfigError("ppo.ptx_data does nothing without ppo.ptx_coef")
    if config.keep == "best" and config.ema is not None:
        raise ConfigError("ppo.keep=best keeps a policy that was evaluated and ppo.ema an average: choose one")
