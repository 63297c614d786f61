"""The ``ppo`` table."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from alignkit import ConfigError, option


@dataclass(frozen=True)
class PPOConfig:
    """What PPO has to set beside ``train``; the names are InstructGPT's and TRL's."""

    iterations: Annotated[int, Gt(0)] = option(100, "rounds of sampling and training", resume="may_grow")
    batch_size: Annotated[int, Gt(0)] = option(64, "answers per iteration, over all processes")
    samples_per_prompt: Annotated[int, Gt(0)] = option(1, "answers per prompt of a batch")
    minibatches: Annotated[int, Gt(0)] = option(
        4, "optimizer steps per epoch, independent of train.per_device_train_batch_size"
    )
    epochs: Annotated[int, Gt(0)] = option(1, "passes over each batch")
    response_length: Annotated[int, Gt(0)] = option(128, "maximum tokens of an answer")
    temperature: Annotated[float, Gt(0)] = option(1.0, "sampling temperature; log-probabilities use it too")
    max_prompt_length: Annotated[int, Gt(0)] = option(512, "maximum tokens of a prompt; longer ones stop the run")
    kl_coef: Annotated[float, Ge(0)] = option(0.05, "beta: reward penalty per nat of KL to the reference")
    kl_target: Annotated[float, Gt(0)] | None = option(
        None, "adapt kl_coef to keep the KL per answer close to this; null: fixed"
    )
    kl_horizon: Annotated[int, Gt(0)] = option(
        10000, "horizon of the adaptation of kl_coef, in answers; larger is slower"
    )
    gamma: Annotated[float, Gt(0), Le(1)] = option(1.0, "discount factor per token")
    lam: Annotated[float, Ge(0), Le(1)] = option(0.95, "lambda of generalised advantage estimation (GAE)")
    whiten_rewards: bool = option(False, "divide rewards by their standard deviation; advantages are always whitened")
    missing_eos_penalty: Annotated[float, Ge(0)] = option(
        1.0, "subtracted from the score of an answer that did not end"
    )
    score_clip: Annotated[float, Gt(0)] | None = option(None, "clip scores to plus or minus this; null: no clipping")
    value: Literal["adapter", "head"] = option(
        "adapter", "the value function: an adapter (or model) of its own, or a head on the policy"
    )
    value_warmup: Annotated[int, Ge(0)] = option(0, "number of initial iterations that train only the value function")
    ema: Annotated[float, Ge(0), Lt(1)] | None = option(
        None, "decay of an average of the policy's weights, which the run then saves; null: none"
    )
    ptx_coef: Annotated[float, Ge(0)] = option(0.0, "weight of the loss on pretraining text (PPO-ptx); 0: off")
    ptx_data: str | None = option(
        None, "texts or demonstrations for PPO-ptx; null: the data of the policy's SFT run", only_with="ptx_coef"
    )
    ptx_batch_size: Annotated[int, Gt(0)] = option(8, "PPO-ptx texts per optimizer step, over all processes")
    ptx_length: Annotated[int, Gt(1)] = option(256, "maximum tokens of a PPO-ptx text; longer texts are split")
    max_kl: Annotated[float, Gt(0)] | None = option(
        None, "stop if the KL per answer exceeds this; null: never", resume="may_grow"
    )
    eval_every: Annotated[int, Gt(0)] = option(
        5,
        "iterations between evaluations on held-out prompts",
        resume=lambda config: "same" if config.keep == "best" else "may_change",
    )
    save_every: Annotated[int, Gt(0)] = option(10, "iterations between checkpoints", resume="may_change")
    keep: Literal["last", "best"] = option(
        "last", "the policy to save: the last one, or the one with the best held-out score"
    )


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
    if config.keep == "best" and config.ema is not None:
        raise ConfigError("ppo.keep=best keeps a policy that was evaluated and ppo.ema an average: choose one")
