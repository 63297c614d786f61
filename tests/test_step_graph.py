"""Steps of decoding that a CUDA graph can repeat: tested without CUDA, as the same forward over fixed memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_decode import PROMPTS, TOKENIZER, VARIED, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignkit import ConfigError, Sampling
from alignkit.generation import step_graph
from alignkit.generation.decode import decode
from alignkit.generation.sampling import difference


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "granite", "mixtral"])
def test_steps_over_fixed_memory_give_the_answers_of_the_plain_loop(architecture: str) -> None:
    model = tiny(architecture, **VARIED[architecture])
    sampling = Sampling(12, temperature=1.0, stop_ids=tuple(range(0, 576, 9)), samples=4)
    torch.manual_seed(0)
    expected = decode(model, PROMPTS, sampling)
    torch.manual_seed(0)
    answers = decode(model, PROMPTS, sampling, graphs=True)

    assert difference(model, PROMPTS[0], graphs=True) is None
    assert answers == expected
    assert {len(answer) for answer in answers} != {12}  # some ended before, so that rows left


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gpt_neo", "bloom"])
def test_sliding_windows_and_positions_from_the_mask_need_other_shapes_in_each_step(architecture: str) -> None:
    assert difference(tiny(architecture, **VARIED[architecture]), PROMPTS[0], graphs=True) is not None


class Replayed(TorchDispatchMode):
    """Notes the operations of a forward pass: their names, the memory of their inputs, and their other arguments.

    A CUDA graph repeats them as they were. So they must be the same in every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: set[int] = set()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        leaves = []
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, torch.Tensor):
                leaves.append(leaf)
                continue
            address = leaf.untyped_storage().data_ptr()
            leaves.append((tuple(leaf.shape), leaf.stride(), address if address not in self.inputs else None))
        self.inputs |= own  # made within the step
        self.operations.append((func.__name__, leaves))
        return result


def test_each_step_repeats_the_same_operations_on_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, noted = tiny("llama"), list[Any]()
    forward = step_graph.StepGraph._forward

    def note(self: Any) -> Any:
        kept = [self.ids, self.positions, self.slot, self.bias, *model.parameters()]
        with Replayed() as mode:
            logits = forward(self)
        fixed = {tensor.untyped_storage().data_ptr() for tensor in kept}
        fixed |= {buffer.untyped_storage().data_ptr() for layer in self.cache.layers for buffer in layer.buffers}
        noted.append(
            [
                (name, [leaf if not isinstance(leaf, tuple) or leaf[2] in fixed else leaf[:2] for leaf in leaves])
                for name, leaves in mode.operations
            ]
        )
        return logits

    monkeypatch.setattr(step_graph.StepGraph, "_forward", note)
    decode(model, PROMPTS, Sampling(5, temperature=0.0, stop_ids=()), graphs=True)

    assert len(noted) == 5
    assert noted[0]
    assert all(operations == noted[0] for operations in noted[1:])
    assert not {"_local_scalar_dense", "nonzero", "_to_cpu"} & {name.split(".")[0] for name, _ in noted[0]}


def test_graphs_are_refused_without_cuda_before_anything_is_sampled() -> None:
    from alignkit_rollouts.config import DecodeConfig
    from alignkit_rollouts.engines import decode as engine

    run: Any = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(train={}), say=print)
    with pytest.raises(ConfigError, match=r"rollout.cuda_graphs needs a CUDA device"):
        engine(DecodeConfig(cuda_graphs=True), TOKENIZER, Sampling(1, temperature=1.0, stop_ids=()), run)


def test_an_engine_that_does_not_work_with_shards_says_so() -> None:
    from alignkit_rollouts.config import VllmConfig
    from alignkit_rollouts.vllm_engine import VllmEngine

    config = SimpleNamespace(train={"shard": "fsdp2"})
    run: Any = SimpleNamespace(device=torch.device("cpu"), config=config, say=print)
    sampling = Sampling(1, temperature=1.0, stop_ids=())
    with pytest.raises(ConfigError, match=r"rollout.name=vllm does not support train.shard yet"):
        VllmEngine(VllmConfig(), sampling, run)
