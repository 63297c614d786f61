"""Runs several ``alignkit`` commands in one process group: ``shard_runs.py COMMANDS REPORT``, in each process of it.

COMMANDS is a file with the words of a command per line. The folder REPORT gets, from each process, a line for each
model that was sharded.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from alignkit.cli import main
from alignkit.models import sharded

COMMANDS, REPORT, RANK = Path(sys.argv[1]), Path(sys.argv[2]), os.environ["RANK"]
shard = sharded.shard


def reported(module: Any, *arguments: Any) -> None:
    """Shard, and report how much is left in this process, and whether whole weights are."""
    whole = [weakref.ref(parameter) for parameter in module.parameters()]
    shard(module, *arguments)
    gc.collect()
    frozen = nn.ParameterList(parameter for parameter in module.parameters() if not parameter.requires_grad)
    line = {
        "model": type(module).__name__ + ("" if any(p.requires_grad for p in module.parameters()) else ", frozen"),
        "run": words[words.index("--output") + 1],
        "processes": int(os.environ["WORLD_SIZE"]),
        "all": sharded.held_bytes(module),
        "frozen": sharded.held_bytes(frozen),
        "whole_weights": sum(each() is not None for each in whole),
    }
    with (REPORT / f"{RANK}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


sharded.shard = reported
for words in map(json.loads, COMMANDS.read_text().splitlines()):
    if status := main(words):
        sys.exit(f"status {status} of {words}")
