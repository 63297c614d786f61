"""The processes of one run: they are compared when it starts, and a lost connection is an error of one line."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from alignkit.errors import AlignkitError, ConfigError, one_line
from alignkit.runs import manifest
from alignkit.runs.resume import last_checkpoint
from alignkit.training import trackers

if TYPE_CHECKING:
    from alignkit.training.run import Run

LIBRARIES = ("alignkit", "torch", "transformers", "peft", "trl", "accelerate")
HOST, SHARED = "host", "the run folder (it must be on a file system that all nodes share)"
TIMEOUT = timedelta(minutes=30)  # until the slowest process has read its data

_numbers = itertools.count()  # of the exchanges so far


def check_alike(run: Run) -> None:
    """Check that all processes run the same, with the same versions, config, data and weights, in the same folder.

    The first process has prepared the folder.

    Raises:
        ConfigError: a process differs from the first one. All processes raise it.
    """
    if run.processes == 1 or "RANK" not in os.environ:  # the launcher has not connected them
        return
    providers = [plugin.distribution for plugin in run.registry.active]
    versions = manifest.versions([*LIBRARIES, *providers])
    settings = dict(trackers.flat(run.config.to_dict()))
    _compare(exchange({HOST: socket.gethostname(), **versions, **settings, **run.surroundings()}))
    checkpoint = last_checkpoint(run.folder)
    folder = [run.folder.exists(), checkpoint.name if checkpoint else None]
    _compare(exchange({HOST: socket.gethostname(), SHARED: folder}))


def exchange(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The facts of all processes, by rank. Every process must call it. It needs no process group."""
    name, store = f"alignkit/{next(_numbers)}", _store()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store.set(f"{name}/{rank}", json.dumps(facts, default=str, sort_keys=True))
    keys = [f"{name}/{other}" for other in range(size)]
    _wait(store, keys)
    processes = [json.loads(store.get(key)) for key in keys]
    store.set(f"{name}/{rank}/done", "")
    if rank == 0:  # its node holds the store: it must not end before the others have read
        _wait(store, [f"{key}/done" for key in keys])
    return processes


def _wait(store: Any, keys: list[str]) -> None:
    """Wait until a store has these keys. Signals are handled meanwhile, which they are not in ``store.wait``."""
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.05)
    store.wait(keys, timedelta(seconds=1))


@functools.cache
def _store() -> Any:
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    return store


def _compare(processes: Sequence[Mapping[str, Any]]) -> None:
    first = processes[0]
    for rank, facts in enumerate(processes):
        names = [name for name in {**first, **facts} if name != HOST and first.get(name) != facts.get(name)]
        if names:
            differences = ", ".join(_difference(name, first.get(name), facts.get(name)) for name in names)
            raise ConfigError(
                f"process {rank} on {facts[HOST]} differs from process 0 on {first[HOST]}: {differences}. All "
                "processes need the same versions, config and files"
            )


def _difference(name: str, first: Any, other: Any) -> str:
    values = f"{other}, not {first}"
    return f"{name} ({values})" if len(values) < 100 else name  # a fingerprint says nothing


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """An error of the connection between processes is raised as one that the user can fix."""
    import torch

    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if os.environ.get("WORLD_SIZE", "1") == "1" or not lost:
            raise
        raise AlignkitError(
            f"process {os.environ['RANK']} lost the connection to another one, which has probably failed. To "
            f"continue from the last checkpoint, add --resume ({one_line(error)[:200]})"
        ) from error
