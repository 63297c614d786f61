"""``train.shard: fsdp2``: each process holds a part of every weight, gradient and optimizer state.

A stage builds its trainer as usual. :func:`shard` then makes the trainer spread its models over the processes when
training starts, and gather what it saves. Checkpoints have the format of runs that are not sharded. Importing this
module imports torch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from alignkit.errors import ConfigError
from alignkit.models import Roles, sharded
from alignkit.models.torch_internals import tree_map
from alignkit.models.transformers_internals import read_optimizer_on_every_process
from alignkit.protocols import Run

ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def check(run: Run) -> None:
    """Check, before a model is loaded, that a run with ``train.shard`` can be sharded.

    Raises:
        ConfigError: it cannot.
    """
    stage, tuner = run.config.stage.component, run.config.tuner.component
    if run.config.train.get("shard") is None:
        return
    if not stage.shards:
        raise ConfigError(f"train.shard: fsdp2 does not support the stage {stage.name} yet. Remove train.shard")
    if run.processes == 1:
        raise ConfigError(
            "train.shard: there is only one process. Start several with alignkit launch "
            "--processes N -- train ..., or remove train.shard"
        )
    if run.dtype is torch.float16:
        raise ConfigError("train.shard: fsdp2 does not support fp16. Set train.bf16=true, or train.fp16=false")
    if tuner.trains != "weights":
        raise ConfigError(f"train.shard: fsdp2 does not support the tuner {tuner.name}. Use lora, qlora or full")


def check_optimizer(run: Run, optimizer: Any) -> None:
    """Check that an optimizer updates each number of a weight by itself, so that it can update parts of weights.

    Raises:
        ConfigError: it is not one of those of PyTorch of which that is known.
    """
    if run.config.train.get("shard") is not None and optimizer not in ELEMENTWISE:
        raise ConfigError(
            f"train.shard: the optimizer {run.config.optimizer.component.name} cannot update parts of weights. Set "
            "optimizer.name=adamw"
        )


def shard(run: Run, trainer: Any) -> None:
    """Make a trainer spread its models over all processes when it starts to train, if ``train.shard`` says so.

    Raises:
        ConfigError: a model is quantized in another way than to 4 bits by bitsandbytes.
    """
    if run.config.train.get("shard") is None:
        return
    if not all(p.is_floating_point() or sharded.is_4bit(p) for p in trainer.model.parameters()):
        raise ConfigError(
            "train.shard: of quantized models, fsdp2 supports only 4-bit ones of bitsandbytes. Use qlora or lora"
        )
    create_optimizer, save_model = trainer.create_optimizer, trainer.save_model
    accelerator = trainer.accelerator

    @functools.wraps(create_optimizer)
    def shard_then_create(*args: Any, **kwargs: Any) -> Any:
        """The Trainer calls it when weights of a checkpoint are loaded, and before it wraps the model."""
        for module in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
            sharded.shard(module, _models_in(module), trainer.args.device, run.processes)
            held, of_all = sharded.held_bytes(module)
            run.say(f"sharded: this process holds {held / 1e6:,.1f} MB of {of_all / 1e6:,.1f} MB of weights")
        optimizer = create_optimizer(*args, **kwargs)
        optimizer.register_state_dict_post_hook(functools.partial(_whole_state, trainer.args.should_save))
        optimizer.register_load_state_dict_pre_hook(_sharded_state)
        return optimizer

    @functools.wraps(save_model)
    def save_whole(*args: Any, **kwargs: Any) -> None:
        with sharded.whole_weights(trainer.model, _models_in(trainer.model), trainer.args.should_save):
            save_model(*args, **kwargs)

    trainer.create_optimizer, trainer.save_model = shard_then_create, save_whole
    read_optimizer_on_every_process(trainer)  # which takes part in gathering it
    accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)  # without DDP


def _models_in(module: nn.Module) -> list[Any]:
    """The language models of the module that a trainer trains."""
    return list(module.models) if isinstance(module, Roles) else [module]


def _whole_state(keep: bool, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer with whole tensors on the CPU, on processes that ``keep`` them."""

    def gather(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensor = sharded.full_tensor(value)
        return tensor.cpu() if keep else None

    return {**state, "state": tree_map(gather, state["state"])}


def _sharded_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer with its tensors spread over processes as their parameters are."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def parts(number: int, value: Any) -> Any:
        parameter = of_number[number]
        same = isinstance(value, torch.Tensor) and value.shape == parameter.shape  # not the number of steps
        return sharded.shard_like(parameter, value) if same else value

    of_number = dict(zip(numbers, parameters, strict=True))
    of_parameters = {
        number: {name: parts(number, value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": of_parameters}
