"""The memory of PPO, measured: alignkit's own run on random weights, on a GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch
import transformers
from memory_shapes import config_of
from torch import nn

from alignkit import hookimpl
from alignkit.runs import locate_model

random_weights: Any = None  # the plugin of the run that is measured


class RandomWeights:
    """A plugin that makes the model of a shape where it would be loaded; 4-bit layers one at a time."""

    def __init__(self, shape: str, tuner: str, device: str) -> None:
        self.shape, self.tuner, self.device = shape, tuner, device

    @hookimpl
    def alignkit_load_model(self, run: Any, role: str, kwargs: dict[str, Any]) -> Any:
        head = role in ("value", "reward")
        auto = transformers.AutoModelForSequenceClassification if head else transformers.AutoModelForCausalLM
        dtype = getattr(torch, kwargs["dtype"]) if isinstance(kwargs["dtype"], str) else kwargs["dtype"]
        config = config_of(self.shape)
        config.num_labels, layers = 1, config.num_hidden_layers
        with torch.device(self.device):
            if self.tuner != "qlora":
                return auto.from_config(config, dtype=dtype)
            config.num_hidden_layers = 1
            model: Any = auto.from_config(config, dtype=dtype)
            kind = type(model.model.layers[0])
            config.num_hidden_layers = layers
            model.model.layers = nn.ModuleList(quantized(kind(config, i).to(dtype)) for i in range(layers))
        model.config.num_hidden_layers = layers
        model.is_loaded_in_4bit = True  # where PEFT looks
        return model


def quantized(layer: nn.Module) -> nn.Module:
    """A layer with its linear layers in NF4."""
    import bitsandbytes as bnb

    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                packed = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, child.weight.dtype, True, "nf4"
                )
                packed.weight = bnb.nn.Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                if child.bias is not None:
                    packed.bias = child.bias
                setattr(module, name, packed.to(child.weight.device))
    return layer


def measure(shape: str, tuner: str, options: argparse.Namespace) -> int:
    """Two iterations of alignkit's PPO on random weights; the most that was allocated on the GPU, in bytes."""
    from alignkit.registry import Plugin, Registry, installed
    from alignkit.runs import pipeline
    from alignkit.training import execute

    cuda = torch.cuda.is_available()
    global random_weights
    random_weights = RandomWeights(shape, tuner, "cuda" if cuda else "cpu")
    entry = EntryPoint("random-weights", f"{__name__}:random_weights", "-")
    registry = Registry([*installed(), Plugin("random-weights", "benchmarks", "0", entry)])
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        tokenizer(folder)
        Path("prompts.jsonl").write_text(
            "".join(
                json.dumps({"prompt": "a " * (options.length - options.response - 20) + str(n)}) + "\n"
                for n in range(64)
            )
        )
        Path("reward.py").write_text("def score(prompts, answers):\n    return [len(a) / 100 for a in answers]\n")
        table = {
            "policy": "base",
            "iterations": 2,
            "batch_size": options.sampled,
            "minibatches": 1,
            "response_length": options.response,
            "value": options.value,
            "max_prompt_length": 2 * options.length,  # a small tokenizer takes more than a token a word
        }
        settings = {
            "plugins": ["ppo", tuner, "random-weights"],
            "model": "base",
            "output": "runs",
            "data": {"path": "prompts.jsonl", "eval_size": 0},
            "optimizer": {"name": options.optimizer},
            "reward": {"name": "function", "call": "reward:score"},
            "train": {
                "per_device_train_batch_size": options.microbatch,
                "gradient_checkpointing": options.gradient_checkpointing,
                "save_strategy": "no",
                "use_cpu": not cuda,
            },
            "stages": {"ppo": table},
        }
        (plan,) = pipeline(registry, {}, settings).to_train
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        execute(plan, resume=False, overwrite=False, say=lambda line: None)
    return torch.cuda.max_memory_allocated() if cuda else 0


def tokenizer(folder: str) -> None:
    """A model's folder without weights: a config, and the tokenizer of the bundled model."""
    config = config_of("tiny")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(Path(folder) / "base")
    transformers.AutoTokenizer.from_pretrained(locate_model("bundled:smollm2-135m", print)).save_pretrained(
        Path(folder) / "base"
    )
