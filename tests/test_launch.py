"""``alignkit launch``: what it refuses before it starts a process, and launchers that leave each process alone."""

from __future__ import annotations

import json
import re
import shlex
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_servers import free_port
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from alignkit import yaml
from alignkit.cli import launch, main
from alignkit.errors import ConfigError
from alignkit.models import device_and_dtype

CLUSTER = Path(__file__).parents[1] / "examples" / "cluster"
NODES = ["--processes", "1", "--nodes", "2"]


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of what would have been started."""
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(launch, "start", lambda *arguments: started.append(arguments))
    return started


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0", "--", "train"], "'--processes' / '-n': Input should be greater than or equal to 1"),
        (["--", "train"], "Missing option '--processes' / '-n'"),
        (["--processes", "2"], "Missing argument '-- train ...'"),
        (["--processes", "2", "--", "sweep"], "only train runs in several processes, and this is 'sweep'"),
        ([*NODES, "--", "train"], "several nodes need --rendezvous HOST:PORT"),
        ([*NODES, "--node-rank", "2", "--", "train"], "--node-rank 2 must be less than --nodes 2"),
        (["-n", "2", "--rendezvous", "a:1", "--", "train"], "--rendezvous has no effect without --nodes"),
        ([*NODES, "--rendezvous", "localhost:x", "--", "train"], "--rendezvous localhost:x is not HOST:PORT"),
        ([*NODES, "--rendezvous", "localhost:70000", "--", "train"], "--rendezvous localhost:70000 is not HOST:PORT"),
        ([*NODES, "--rendezvous", "a.invalid:1", "--", "train"], "the host a.invalid has no address"),
        ([*NODES, "--rendezvous", "192.0.2.1:29500", "--", "train"], "node 0 cannot listen at 192.0.2.1:29500"),
    ],
)
def test_a_wrong_command_is_one_line(
    arguments: list[str], message: str, no_processes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert no_processes == []


def test_node_0_needs_a_free_port_and_the_others_need_node_0(
    no_processes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        assert main(["launch", *NODES, "--rendezvous", address, "--", "train"]) == 2
        assert f"node 0 cannot listen at {address}: Address already in use" in capsys.readouterr().err
        assert main(["launch", *NODES, "--node-rank", "1", "--rendezvous", address, "--", "train"]) == 0
    assert len(no_processes) == 1

    address = f"localhost:{free_port()}"
    arguments = [*NODES, "--node-rank", "1", "--rendezvous", address, "--wait", "1", "--", "train"]
    assert main(["launch", *arguments]) == 2
    assert f"node 0 does not listen at {address} after 1 s" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(current_accelerator=lambda check_available: torch.device("cuda"), device_count=lambda: 1)
    monkeypatch.setattr(torch, "accelerator", cuda)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    with pytest.raises(ConfigError, match="^2 processes need 2 GPUs, and this machine has 1"):
        device_and_dtype.run_device({})
    assert device_and_dtype.run_device({"use_cpu": True}).type == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert device_and_dtype.run_device({}) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "accelerate launch was asked for several"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "processes that MPI starts do not train together"),
    ],
)
def test_a_launcher_that_connects_no_processes_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert main(["train", "--plan"]) == 2
    assert message in capsys.readouterr().err


def test_the_error_is_that_of_the_process_that_failed_first(tmp_path: Path) -> None:
    """torchrun ends the other processes with SIGTERM, and some lose the connection before that."""

    def failures(*processes: tuple[int, str]) -> str:
        failed = {}
        for rank, (status, message) in enumerate(processes):
            file = tmp_path / f"{rank}.json"
            error = {"message": message, "extraInfo": {"timestamp": "1"}}
            file.write_text(json.dumps({"message": error if message else "<NONE>"}))
            failed[rank] = ProcessFailure(rank, 100 + rank, status, str(file) if message else "")
        return launch.first_error(ChildFailedError("alignkit", failed))

    lost = "process 0 lost the connection to another one"
    assert failures((-15, ""), (-9, "")).startswith("process 1 was killed by SIGKILL, perhaps because memory ran out")
    assert failures((2, lost), (-11, "")).startswith("process 1 was killed by SIGSEGV. ")
    assert failures((-15, ""), (2, "the loss is nan")) == "the loss is nan"
    assert failures((-9, ""), (2, "the loss is nan")) == "the loss is nan"
    assert failures((2, lost), (2, "the loss is nan")) == "the loss is nan"
    assert failures((2, "no file"), (2, "no file")) == "no file"


@pytest.mark.parametrize("name", ["train.sbatch", "skypilot.yaml"])
def test_scripts_for_clusters_launch_a_node(
    name: str, no_processes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their variables are those of a second node of two, whose node 0 listens here."""
    text = (CLUSTER / name).read_text(encoding="utf-8")
    script = yaml.load(CLUSTER / name)["run"] if name.endswith(".yaml") else text
    with socket.create_server(("localhost", 0)) as server:
        script = script.replace('$(echo "$SKYPILOT_NODE_IPS" | head -n 1)', "localhost").replace("$NODE0", "localhost")
        script = script.replace("29500", str(server.getsockname()[1])).replace("\\\n", " ")
        (command,) = re.findall(r"alignkit launch [^'\n]*", script)
        values = {"GPUS_ON_NODE": "8", "NUM_GPUS_PER_NODE": "8", "NNODES": "2", "NUM_NODES": "2"}
        values |= {"NODEID": "1", "NODE_RANK": "1"}
        command = re.sub(r"\$(SLURM|SKYPILOT)_(\w+)", lambda found: values[found[2]], command)
        assert main(shlex.split(command)[1:]) == 0

    ((train, processes, nodes, node_rank, address, _),) = no_processes
    assert train[:3] == ["train", "-c", "run.yaml"]
    assert (processes, nodes, node_rank, address.host) == (8, 2, 1, "localhost")
