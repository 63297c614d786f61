"""The peak memory of a run, measured: alignkit trains it, and PyTorch's own allocators are asked.

On a CPU these are the memory events of ``torch.profiler``, which has all allocations of PyTorch, on a GPU
``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import gc
import shutil
from importlib.metadata import EntryPoint
from typing import Any

import torch
import transformers

from alignkit import hookimpl
from alignkit.registry import Plugin, Registry, installed
from alignkit.runs import pipeline
from alignkit.runs.plan import Plan

measuring: Any = None  # the plugin


class Measuring(transformers.TrainerCallback):
    """Measures the bytes of tensors from the beginning of training to its end."""

    def __init__(self) -> None:
        self.peak = 0
        self.others = set(storages())  # of what else this process has in memory

    @hookimpl
    def alignkit_callbacks(self, run: Any) -> list[Any]:
        return [self]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        self.before = sum(size for key, size in storages().items() if key not in self.others)
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
            return
        self.profiler.stop()
        now = most = 0
        for event in self.profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        self.peak = self.before + most


def storages() -> dict[int, int]:
    """The bytes of all tensors on the CPU, by the address of their storage."""
    gc.collect()
    kinds = ("Tensor", "Parameter", "Params4bit")  # asking proxies for their class would import what they stand for
    tensors = (
        each for each in gc.get_objects() if type(each).__name__ in kinds and issubclass(type(each), torch.Tensor)
    )
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}


def planned(settings: dict[str, Any], *plugins: str) -> Plan:
    """The plan of the run that these settings describe, with these plugins of the benchmarks."""
    global measuring
    measuring = Measuring()
    modules = {"measuring": __name__, "random_weights": "memory_random"}
    own = [Plugin(name, "benchmarks", "0", EntryPoint(name, f"{modules[name]}:{name}", "-")) for name in plugins]
    settings = {**settings, "plugins": [*settings["plugins"], *plugins]}
    return pipeline(Registry([*installed(), *own]), {}, settings, overwrite=True).to_train[-1]


def measure(settings: dict[str, Any], *plugins: str) -> int:
    """Train the run that these settings describe. Returns the most bytes that tensors took at the same time."""
    from alignkit.training import execute

    plan = planned(settings, "measuring", *plugins)
    execute(plan, resume=False, overwrite=True, say=lambda line: None)
    shutil.rmtree(plan.config.folder)
    return int(measuring.peak)
