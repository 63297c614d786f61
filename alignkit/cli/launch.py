"""``alignkit launch``: torchrun for ``alignkit train``, with one line for an error of any process."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import uuid
from typing import TYPE_CHECKING, NamedTuple

import typer

from alignkit.cli.processes import LAUNCHED
from alignkit.errors import AlignkitError, ConfigError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

PORT = 29500  # of torchrun
SHUTDOWN = 3600  # seconds that Ctrl-C waits for the step to end and the checkpoint to be written


class Rendezvous(NamedTuple):
    """The address at which node 0 listens for the other nodes."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def launch(
    command: list[str] = typer.Argument(metavar="-- train ...", help="The command of each process, after `--`."),
    processes: int = typer.Option(..., "--processes", "-n", min=1, help="Processes on this node: one for each GPU."),
    nodes: int = typer.Option(1, min=1, help="Number of nodes. Run the same command on each."),
    node_rank: int = typer.Option(0, min=0, help="The number of this node, from 0."),
    rendezvous: str = typer.Option(
        None, metavar="HOST:PORT", help=f"An address of node 0 that the other nodes reach. Default port: {PORT}."
    ),
    wait: int = typer.Option(300, min=1, metavar="SECONDS", help="How long to wait for the other nodes."),
) -> None:
    """Train in several processes, on one node or on several.

    Example: alignkit launch --processes 2 -- train --plugin sft
    """
    if command[0] != "train":
        raise ConfigError(f"launch: only train runs in several processes, and this is '{command[0]}'")
    if node_rank >= nodes:
        raise ConfigError(f"launch: --node-rank {node_rank} must be less than --nodes {nodes}")
    address = None
    if nodes > 1:
        if rendezvous is None:
            raise ConfigError("launch: several nodes need --rendezvous HOST:PORT, the address of node 0")
        address = parse(rendezvous)
        check_listens(address) if node_rank == 0 else wait_for(address, wait)
    elif rendezvous is not None:
        raise ConfigError("launch: --rendezvous has no effect without --nodes of 2 or more")
    start(command, processes, nodes, node_rank, address, wait)


def parse(rendezvous: str) -> Rendezvous:
    """``HOST:PORT`` or ``HOST``.

    Raises:
        ConfigError: the port is not a number from 1 to 65535, or the host has no address.
    """
    host, _, port = rendezvous.partition(":")
    if not host or not (port or str(PORT)).isdecimal() or not 0 < int(port or PORT) < 65536:
        raise ConfigError(f"launch: --rendezvous {rendezvous} is not HOST:PORT")
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConfigError(f"launch: --rendezvous: the host {host} has no address ({error.strerror})") from None
    return Rendezvous(host, int(port or PORT))


def check_listens(address: Rendezvous) -> None:
    """Check that node 0 can listen at its address.

    Raises:
        ConfigError: the address is not one of this machine, or its port is in use.
    """
    try:
        socket.create_server(address).close()
    except OSError as error:
        raise ConfigError(f"launch: node 0 cannot listen at {address}: {os.strerror(error.errno or 0)}") from None


def wait_for(address: Rendezvous, seconds: float) -> None:
    """Wait until node 0 listens.

    Raises:
        ConfigError: it does not in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(address, timeout=seconds).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"launch: node 0 does not listen at {address} after {seconds:g} s ({error}). Start the same "
                    "command there with --node-rank 0, and check the firewall"
                ) from None
        time.sleep(min(1.0, seconds / 10))


def start(
    command: list[str], processes: int, nodes: int, node_rank: int, address: Rendezvous | None, wait: int
) -> None:
    """Run the command in the processes of this node, and wait for them.

    Raises:
        AlignkitError: a process failed; the others were stopped. It has the error of the process that failed first.
        Exit: the user pressed Ctrl-C.
    """
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if not os.environ.get("ALIGNKIT_DEBUG"):
        logging.disable(logging.ERROR)  # of torchrun, about signals that it sends

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id="alignkit" if address else str(uuid.uuid4()),
        rdzv_backend="static" if address else "c10d",
        rdzv_endpoint=str(address or "localhost:0"),
        rdzv_configs={"rank": node_rank, "timeout": wait} if address else {},
        max_restarts=0,
        shutdown_timeout=SHUTDOWN,
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "alignkit", *command)
    except ChildFailedError as error:
        raise AlignkitError(first_error(error)) from error
    except DistError as error:
        raise AlignkitError(f"launch: not all of the {nodes} nodes connected to {address} within {wait} s") from error
    except SignalException as stop:
        stop_children(stop.sigval)
        raise typer.Exit(128 + stop.sigval) from None


def first_error(error: ChildFailedError) -> str:
    """The error of the process that made the others fail.

    That is an error of its own, else the signal that killed a process. The others lose the connection to it, or
    torchrun ends them: with SIGTERM, and with SIGKILL after half a minute.
    """
    failures = sorted(error.failures.items())
    left = [failure.error_file_data.get("message") for _, failure in failures]
    messages = [str(message["message"]) for message in left if isinstance(message, dict)]
    if own := [message for message in messages if "lost the connection" not in message]:
        return own[0]
    for rank, failure in failures:
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            why = ", perhaps because memory ran out" if name == "SIGKILL" else ""
            return (
                f"process {rank} was killed by {name}{why}. The others were stopped. To continue from the last "
                "checkpoint, add --resume to the same command"
            )
    if messages:
        return messages[0]
    rank, failure = error.get_first_failure()
    return f"process {rank} ended with exit status {failure.exitcode}"


def stop_children(number: int) -> None:
    """Pass a further Ctrl-C on to the processes, and wait until they have ended."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.send_signal(number)
    psutil.wait_procs(children)
