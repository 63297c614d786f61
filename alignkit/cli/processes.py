"""Reporting the error of a command, by one process or by one of several."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from alignkit.errors import ConfigError

SIZES_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LAUNCHED = "ALIGNKIT_LAUNCHED"  # set by `alignkit launch`, which prints one error for all its processes


def report(message: str) -> None:
    """Print an error as one line. A process of torchrun also writes it to the file that torchrun reads.

    A process of ``alignkit launch`` only writes it there.
    """
    line = " ".join(message.split())
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        error = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": error}), encoding="utf-8")
    if not file or LAUNCHED not in os.environ:
        print("alignkit: error:", line, file=sys.stderr)


def check_launcher() -> None:
    """Check that a launcher which was asked for several processes has connected them.

    Raises:
        ConfigError: it has not, so that each process would train by itself.
    """
    if "WORLD_SIZE" in os.environ:
        return
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError(
            "accelerate launch was asked for several processes and started one, as it does on CPUs. Use "
            "alignkit launch --processes N -- train ..., or a config with distributed_type: MULTI_GPU and use_cpu: true"
        )
    if any(int(os.environ.get(name, "1")) > 1 for name in SIZES_OF_MPI):
        raise ConfigError(
            "processes that MPI starts do not train together. Use alignkit launch --processes N -- train ..."
        )
