"""The memory of one of several processes: its share of a batch, and with ``train.shard`` its part of the weights.

Importing this module imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from alignkit.errors import ConfigError
from alignkit.models import Roles, decoder_layers
from alignkit.planning.weightless import Linear4bit
from alignkit.runs.plan import Plan

BATCHES = "batch_size", "ptx_batch_size"  # settings of stages that count all processes together
TRAINED = "trained weights", "gradients", "optimizer states"


def share_of(plan: Plan, processes: int) -> Plan:
    """The plan of one process: a batch that is counted over all processes is its share.

    Raises:
        ConfigError: a batch cannot be divided, a sharded run has a single process, or DeepSpeed spreads the weights.
    """
    stage = plan.config.stage
    if plan.config.train.get("deepspeed"):
        raise ConfigError("plan does not know the memory of train.deepspeed: plan the run with train.shard=fsdp2")
    if processes == 1 and plan.config.train.get("shard"):
        raise ConfigError("train.shard: name the number of processes of the run, as in plan --processes 2")
    batches = {name: getattr(stage.config, name) for name in BATCHES if hasattr(stage.config, name)}
    for name, size in batches.items():
        if size % processes:
            raise ConfigError(f"{stage.component.name}.{name}={size} cannot be divided among {processes} processes")
    shares = {name: size // processes for name, size in batches.items()}
    config = dataclasses.replace(plan.config, stage=stage._replace(config=dataclasses.replace(stage.config, **shares)))
    return dataclasses.replace(plan, config=config)


class Weight(NamedTuple):
    """The bytes of a weight that FSDP2 spreads over processes."""

    whole: int
    part: int  # of the first process, which has the largest
    trained: bool


def sharded(phases: Mapping[str, Mapping[str, int]], trainer: Any, processes: int) -> dict[str, dict[str, int]]:
    """The memory of a process of a sharded run, from the ``phases`` of the same run with whole weights.

    A process holds its part of each weight, gradient and optimizer state. Passes gather one group of weights at a time,
    see :func:`gathered`; a backward pass also has the whole gradients of a group, and a copy of them to reduce.
    """
    modules = [each for each in (trainer.model, getattr(trainer, "ref_model", None)) if each is not None]
    groups = [list(groups_of(module, processes)) for module in modules]
    weights = [weight for of_module in groups for group in of_module for weight in group]
    trained = [weight for weight in weights if weight.trained]
    share = sum(weight.part for weight in trained) / max(1, whole(trained))
    elsewhere = sum(weight.whole - weight.part for weight in weights if not weight.trained)
    of_group = max(whole(weight for weight in group if weight.trained) for of_module in groups for group in of_module)
    result = dict[str, dict[str, int]]()
    for phase, parts in phases.items():
        result[phase] = {name: int(share * size) if name in TRAINED else size for name, size in parts.items()}
        result[phase]["frozen weights"] = parts.get("frozen weights", 0) - elsewhere
        if phase == "training":
            result[phase]["gradients"] = result[phase].get("gradients", 0) + 2 * of_group
        if phase == "sampling":
            result[phase]["gathered weights"] = whole(policy_of(trainer.model, processes))
        elif phase != "optimizer step":
            result[phase]["gathered weights"] = max(map(gathered, groups))
    return result


def gathered(groups: list[list[Weight]]) -> int:
    """The bytes that a pass gathers: the weights outside of layers, two layers, and the buffer of a collective."""
    outside, *layers = map(whole, groups)
    return max(2 * outside, outside + 3 * max(layers))


def groups_of(module: nn.Module, processes: int) -> Iterator[list[Weight]]:
    """The weights that are gathered together: those outside of layers, then those of each layer."""
    models = module.models if isinstance(module, Roles) else [module]
    layers = [layer for model in models for layer in decoder_layers(model)]
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for group in (module, *layers):
        yield list(_weights(group, processes, leave=in_layers if group is module else ()))


def policy_of(module: nn.Module, processes: int) -> Iterator[Weight]:
    """The weights that are gathered to sample: the policy's layers, and all weights outside of layers."""
    yield from next(groups_of(module, processes))
    policy = module.members["policy"].model if isinstance(module, Roles) else module
    yield from _weights(decoder_layers(policy), processes)


def whole(weights: Iterable[Weight]) -> int:
    """The bytes of whole weights."""
    return sum(weight.whole for weight in weights)


def _weights(module: nn.Module, processes: int, leave: Iterable[int] = ()) -> Iterator[Weight]:
    seen = set(leave)
    for each in module.modules():
        for parameter in each.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield _of_4_bits(each, processes) if isinstance(each, Linear4bit) else _weight(parameter, processes)


def _weight(parameter: Tensor, processes: int) -> Weight:
    row = parameter[0].numel() * parameter.element_size()
    return Weight(len(parameter) * row, -(-len(parameter) // processes) * row, parameter.requires_grad)


def _of_4_bits(layer: Linear4bit, processes: int) -> Weight:
    """The packed weights of a layer, in rows of 2 bytes. Their quantization constants are not sharded."""
    rows = layer.in_features * layer.out_features // 4
    return Weight(2 * rows, 2 * -(-rows // processes), trained=False)
