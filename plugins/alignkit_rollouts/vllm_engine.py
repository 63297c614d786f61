"""The engine ``vllm``: answers from servers, to which the policy's adapter goes whenever it has changed.

The server's base model stays loaded, and only the adapter is sent: as files, which the server reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit import AlignkitError, ConfigError, OffPolicy, Run, SampledAnswers, Sampling, UnavailableError
from alignkit_rollouts.vllm_check import check_policy
from alignkit_rollouts.vllm_server import Adapter, Server

if TYPE_CHECKING:
    from alignkit_rollouts.config import VllmConfig

FOLDER = "rollout"  # of adapters, in the run folder
DIFFERENCE, OF_QUANTIZED = 0.1, 0.5  # nats per token; a quantized base is another one than the server's
CAP = 2.0  # of importance weights


class VllmEngine:
    """Sends the policy's adapter to the servers if it has changed, and the prompts, a share to each server.

    Raises:
        ConfigError: the policy is sharded.
        AlignkitError: a server does not answer, or has another base model.
    """

    def __init__(self, config: VllmConfig, sampling: Sampling, run: Run) -> None:
        if run.config.train.get("shard") is not None:
            raise ConfigError("rollout.name=vllm does not support train.shard yet. Remove one of them")
        self.config, self.sampling = config, sampling
        self.folder, self.run_name = run.folder / FOLDER, run.config.folder.name
        self.servers = [Server(url, config) for url in config.urls]
        length = getattr(run.config.stage.config, "max_prompt_length", 1) + sampling.max_new_tokens
        for server in self.servers:
            server.check(run.base, run.base_weights, length)
        remove_adapters(run, run.folder)  # of a process that was killed
        self.version = 0
        self.adapter: Adapter | None = None

    def __call__(self, policy: Any, prompts: list[list[int]], roles: Any = None) -> SampledAnswers:
        """``sampling.samples`` answers to each prompt, with log-probabilities of the servers.

        Neighboring equal prompts are one request. Each request has a seed from torch's generator.
        """
        import torch

        check_policy(policy)
        groups = [(list(prompt), len(list(equal))) for prompt, equal in itertools.groupby(prompts)]
        seeds = torch.randint(2**31, (len(groups),)).tolist()
        self._publish(policy, roles)
        servers = itertools.cycle(self.servers)
        with ThreadPoolExecutor(self.config.concurrency * len(self.servers)) as pool:
            requests = [
                pool.submit(self._sample, server, prompt, times * self.sampling.samples, seed)
                for server, (prompt, times), seed in zip(servers, groups, seeds, strict=False)
            ]
            try:
                answered = list(itertools.chain.from_iterable(request.result() for request in requests))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        quantized = getattr(policy.get_base_model(), "is_quantized", False)
        difference = self.config.max_logps_difference or (OF_QUANTIZED if quantized else DIFFERENCE)
        off_policy = OffPolicy(difference, self.config.importance_cap or (CAP if quantized else None))
        return SampledAnswers((ids for ids, _ in answered), [logps for _, logps in answered], off_policy)

    def _sample(self, server: Server, prompt: list[int], number: int, seed: int) -> list[tuple[list[int], list[float]]]:
        """The token ids and the log-probabilities of so many answers to a prompt."""
        assert self.adapter is not None
        times = 1 if self.sampling.temperature else number  # vLLM gives one greedy answer: all are the same
        body = {
            "prompt": prompt,
            "n": number // times,
            "seed": seed,
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "stop_token_ids": list(self.sampling.stop_ids),
            "ignore_eos": True,  # only the tokens above end an answer
            "logprobs": 0,  # of the sampled tokens only
            "return_token_ids": True,
            **{"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},  # whatever the server's defaults are
        }
        choices = server.complete(self.adapter, body)
        try:
            answers = [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]
        except (KeyError, TypeError):
            raise UnavailableError(
                f"the vLLM server at {server.url} returned no token ids or log-probabilities: it is too old"
            ) from None
        for ids, _ in answers:
            if len(ids) < self.sampling.max_new_tokens and not set(ids[-1:]) & set(self.sampling.stop_ids):
                raise UnavailableError(
                    f"the vLLM server at {server.url} cut an answer after {len(ids)} tokens: its --max-model-len is "
                    "too small, or it was stopped"
                )
        return answers * times

    def _publish(self, policy: Any, roles: Any) -> None:
        """Load the policy's adapter into every server, if it is not the one that they have."""
        from accelerate import PartialState  # type: ignore[import-untyped]
        from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

        result: list[Any] = [None]
        if PartialState().is_main_process:
            try:
                result = [self._publish_changes(policy, roles)]
            except AlignkitError as error:  # other processes wait
                result = [error]
        if isinstance((adapter := broadcast_object_list(result)[0]), AlignkitError):
            raise adapter
        self.adapter = adapter

    def _publish_changes(self, policy: Any, roles: Any) -> Adapter:
        """Write the adapter to a folder, and replace the last one by it on every server."""
        self.version += 1
        folder, unfinished = self.folder / f"v{self.version}", self.folder / f".v{self.version}"
        (roles.save_policy if roles else policy.save_pretrained)(unfinished)
        digest = hashlib.sha256((unfinished / "adapter_model.safetensors").read_bytes()).hexdigest()[:8]
        if self.adapter and self.adapter.name.endswith(digest):
            shutil.rmtree(unfinished)
            self.version -= 1
            return self.adapter
        unfinished.rename(folder)
        adapter = Adapter(f"alignkit-{self.run_name}-v{self.version}-{digest}", folder.absolute())
        for server in self.servers:
            server.load(adapter)
        if self.adapter:
            for server in self.servers:
                server.unload(self.adapter.name)
            shutil.rmtree(self.adapter.folder, ignore_errors=True)
        return adapter


def remove_adapters(run: Run, folder: Path) -> None:
    """Remove the adapters of a run from its servers, and from ``folder``, its run folder."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    assert run.config.rollout is not None
    config = dataclasses.replace(run.config.rollout.config, retry_for=0)
    for url in config.urls:
        with contextlib.suppress(AlignkitError):  # a server that does not answer
            _unload_all(Server(url, config), (run.folder / FOLDER).absolute())
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _unload_all(server: Server, folder: Path) -> None:
    """Remove the adapters in a folder from a server."""
    for model in server.models():
        if model.get("parent") and Path(str(model.get("root"))).parent == folder:
            server.unload(str(model["id"]))
