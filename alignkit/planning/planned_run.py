"""The run with which a plan is rehearsed: its parents need not exist, and its answers have their full length."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from alignkit.batches import Answers, SampledAnswers, Sampling
from alignkit.data.chat_template import load_tokenizer
from alignkit.generation import decode, hf_generate
from alignkit.generation.cache import FixedLayer
from alignkit.generation.rewards import of_role
from alignkit.planning.ledger import Ledger, size_of
from alignkit.planning.replaced import replaced
from alignkit.protocols import Engine, RewardFunction
from alignkit.runs import base, lineage
from alignkit.runs.plan import Plan
from alignkit.training import Run

STEPS = 2  # the second optimizer step has states of the optimizer, and RAHF trains other weights in it
CPU = torch.device("cpu")


class PlannedRun(Run):
    """A run on the CPU, for a few steps, which prints, evaluates and saves nothing."""

    def __init__(self, plan: Plan, folder: Path, dtype: torch.dtype, ledger: Ledger) -> None:
        finished = {role: parent for role, parent in plan.parents.items() if parent.manifest is not None}
        super().__init__(dataclasses.replace(plan, parents=finished), say=lambda line: None)
        self.stream = None  # the rows of the plan stand for it
        self.is_planned = True
        self.folder, self.device, self.dtype, self.ledger = folder, CPU, dtype, ledger
        self.cache = 0  # bytes of the key-value cache, at most
        self.microbatch: int | None = None  # rows of a microbatch; None: as many as in the run
        planned = {role: parent for role, parent in plan.parents.items() if parent.manifest is None}
        self.parents |= {role: _stand_in(parent.folder, folder) for role, parent in planned.items()}
        self.planned = {str(self.parents[role]): self.base for role in planned}  # folder -> its base
        self.records |= {role: self._record(parent.config) for role, parent in planned.items()}

    def _record(self, config: Any) -> dict[str, Any]:
        """The part of a manifest that is needed of a run that does not exist yet."""
        return {
            "role": config.stage.component.role,
            "weights": "adapter" if config.tuner.component.adapters else "model",
            "config": config.to_dict(),
            "tuner": config.tuner.component.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "base": {
                "name": self.base,
                "located": self.base,
                "revision": self.model_kwargs.get("revision"),
                "weights": self.base_weights,
            },
            "stop_ids": base.stop_ids(self.base, self.tokenizer, self.model_kwargs.get("revision")),
        }

    @functools.cached_property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The tokenizer of the policy's run, or of the base if that run does not exist yet."""
        folder = str(self.parents.get("policy", self.base))
        special_tokens, kwargs = self.config.data.special_tokens, base.of_repository(self.model_kwargs)
        located = self.planned.get(folder, folder)
        return load_tokenizer(located, self.config.chat_template, self.today, special_tokens, kwargs)

    def training_arguments(self, cls: Any, **own: Any) -> Any:
        """The arguments of the stage, with so few steps."""
        few_steps = {
            **{"max_steps": STEPS, "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no"},
            **{"load_best_model_at_end": False, "logging_strategy": "no", "report_to": "none", "push_to_hub": False},
            **{"use_cpu": True, "bf16": self.dtype is torch.bfloat16, "fp16": False, "torch_compile": False},
            **{"train_sampling_strategy": "sequential", "dataloader_num_workers": 0},
            **{"dataloader_persistent_workers": False, "dataloader_prefetch_factor": None},
        }
        if self.microbatch is not None:
            few_steps["per_device_train_batch_size"] = self.microbatch
        return super().training_arguments(cls, **{**own, **few_steps})

    def optimizer(self, args: transformers.TrainingArguments) -> tuple[Any, dict[str, Any]]:
        """The optimizer; one that pages its states to CPU memory keeps them on the device."""
        on_gpu = copy.copy(args)
        on_gpu.__dict__["_setup_devices"] = torch.device("cuda")  # paged optimizers refuse the CPU
        cls, kwargs = super().optimizer(on_gpu)
        return cls, {**kwargs, **({"is_paged": False} if "is_paged" in kwargs else {})}

    def callbacks(self) -> list[transformers.TrainerCallback]:
        """None: they write files."""
        return []

    def reward(self) -> RewardFunction:
        """Scores of 0, from the reward models that are roles of the stage."""
        models = [of_role(self, str(folder)) for folder in lineage.rewards_in(self.parents).values()]

        def score(answers: Answers, roles: Any = None) -> list[float]:
            for model in models:
                model(answers, roles)
            return [0.0] * len(answers.texts)

        return score

    def rollout(self, sampling: Sampling) -> Engine:
        """The engine, of whose answers two tokens are sampled. The answers that it returns have their full length."""
        token = _no_stop(sampling)
        assert self.config.rollout is not None
        if self.config.rollout.component.in_other_process:
            return lambda policy, prompts, roles=None: SampledAnswers(
                [token] * sampling.max_new_tokens for _ in range(len(prompts) * sampling.samples)
            )
        engine = super().rollout(sampling)

        def sample(policy: Any, prompts: list[list[int]], roles: Any = None) -> SampledAnswers:
            with self.ledger.phase("sampling"), self._two_tokens(sampling):
                sampled = engine(policy, prompts, roles)
            answers = ([token] * sampling.max_new_tokens for _ in sampled)
            logps = [[0.0] * sampling.max_new_tokens for _ in sampled] if sampled.logps is not None else None
            return SampledAnswers(answers, logps)

        return sample

    @contextlib.contextmanager
    def _two_tokens(self, sampling: Sampling) -> Iterator[None]:
        """Sample the first and the last token of answers only, where :mod:`alignkit.generation.decode` samples.

        The cache has room for all tokens from the beginning, so these steps need as much memory as all.
        """
        run, draw, stop, calls = self, decode.draw, sampling.stop_ids[0], 0

        class Decoder(decode.Decoder):
            def append(self, tokens: Tensor) -> None:
                super().append(tokens)
                run.cache = max(run.cache, size_of(t for layer in self.cache.layers for t in _buffers(layer)))
                length = next((layer.length for layer in self.cache.layers if isinstance(layer, FixedLayer)), 0)
                if (more := length - 1 - self.mask.shape[1]) > 0:
                    self.mask = torch.nn.functional.pad(self.mask, (0, more), value=1)
                    for layer in self.cache.layers:
                        if isinstance(layer, FixedLayer):
                            layer.release(length - 2)

        def drawn(*arguments: Any) -> tuple[Tensor, Tensor]:
            nonlocal calls
            calls += 1
            tokens, logps = draw(*arguments)  # logits without data give any numbers, NaN too
            return torch.full_like(tokens, stop if calls % 2 == 0 else _no_stop(sampling)), torch.zeros_like(logps)

        unchecked = replaced(hf_generate, check_finite=lambda ids, logits: logits)
        with replaced(decode, draw=drawn, Decoder=Decoder), unchecked:
            yield


def _stand_in(run: Path, folder: Path) -> Path:
    """An empty folder in ``folder`` for a run that does not exist yet."""
    place = folder / "parents" / run.absolute().relative_to(run.absolute().anchor)
    place.mkdir(parents=True, exist_ok=True)
    return place


def _no_stop(sampling: Sampling) -> int:
    """A token at which answers do not end."""
    return next(token for token in range(len(sampling.stop_ids) + 1) if token not in sampling.stop_ids)


def _buffers(layer: Any) -> tuple[Tensor, ...]:
    return layer.buffers if isinstance(layer, FixedLayer) else (layer.keys, layer.values)
