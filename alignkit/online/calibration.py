"""The time of an online run, extrapolated from eight decode steps and two microbatches."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from typing import Any

from alignkit.batches import SampledAnswers, Sampling
from alignkit.online.config import OnlineConfig
from alignkit.planning.calibration import MICROBATCHES, Seconds, decoding, measure
from alignkit.protocols import Plan, Run


def calibrate(plan: Plan, run: Run, trainer: Any) -> dict[str, Seconds]:
    """The seconds of sampling, scoring, training and evaluation. ``trainer`` is an :class:`OnlineTrainer`.

    Answers that are scored and trained on have the maximum length. At least, answers are half as long.
    """
    config: OnlineConfig = trainer.config
    length, size = config.response_length, trainer.args.per_device_train_batch_size
    first, step = _sampling(run, trainer, config)
    ptx = _ptx(trainer)

    rows = MICROBATCHES * math.lcm(size, config.samples_per_prompt)
    short = dataclasses.replace(config, batch_size=rows, minibatches=rows // size, epochs=1)
    trainer.config = trainer.collector.config = short
    trainer.args.gradient_accumulation_steps = 1  # so that every microbatch has an optimizer step
    trainer.collector.engine = lambda policy, prompts, roles: _answers(prompts, length)
    measured = measure(trainer)
    scoring = trainer.metrics["seconds_scoring"] / rows  # of an answer

    steps = plan.config.train.get("max_steps", -1)
    iterations = steps / config.steps if steps > 0 else config.iterations
    prompt = statistics.fmean(len(prompt.ids) for prompt in itertools.islice(trainer.collector.prompts, 256))
    half = (prompt + length / 2) / (prompt + length)  # of the tokens, if answers are half as long
    low, high = measured.training(iterations * config.epochs * config.batch_size / size, iterations * config.steps)
    evaluations, batches = math.floor(iterations / config.eval_every) + 1, len(plan.eval_rows) / config.batch_size
    sampling = first + step * length / 2, first + step * length  # of an iteration
    scored = half * scoring * config.batch_size, scoring * config.batch_size
    return {
        "sampling": (iterations * sampling[0], iterations * sampling[1]),
        "scoring": (iterations * scored[0], iterations * scored[1]),
        "training": (half * low + iterations * config.steps * ptx, high + iterations * config.steps * ptx),
        "evaluation": (  # a batch of few answers may take as many seconds to sample as a whole one
            evaluations * batches * (sampling[0] + scored[0] / 2),
            evaluations * (math.ceil(batches) * sampling[1] + batches * scored[1]),
        ),
    }


def _sampling(run: Run, trainer: Any, config: OnlineConfig) -> Seconds:
    """The seconds to the first tokens of the answers of an iteration, and of each further one."""
    samples = config.samples_per_prompt
    prompts = itertools.islice(itertools.cycle(trainer.collector.prompts), config.batch_size // samples)
    ids = [prompt.ids for prompt in prompts for _ in range(samples)]

    def sample(tokens: int) -> None:
        trainer.collector.engine = run.rollout(Sampling(tokens, config.temperature, ()))
        trainer.collector.sample(ids, trainer.args.seed)

    with trainer.roles.constant_weights():
        return decoding(sample)


def _answers(prompts: list[list[int]], length: int) -> SampledAnswers:
    """An answer of ``length`` tokens to each prompt: the prompt's own, beginning at different ones."""
    return SampledAnswers(
        list(itertools.islice(itertools.cycle(prompt), number, number + length))
        for number, prompt in enumerate(prompts)
    )


def _ptx(trainer: Any) -> float:
    """The seconds of the pretraining texts of an optimizer step, which are then left out of the microbatches."""
    if trainer.ptx is None:
        return 0.0
    began = time.monotonic()
    trainer.model.train()
    trainer.ptx.backward(trainer.model)
    trainer.model.zero_grad()
    trainer.ptx = None
    return time.monotonic() - began
