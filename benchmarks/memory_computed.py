"""The memory of PPO, computed: its modules run on tensors without data, and every allocation is counted.

4-bit weights, optimizer states and the cache of sampling are added by arithmetic.
"""

from __future__ import annotations

import argparse
import dataclasses
import weakref
from typing import Any
from unittest import mock

import torch
import transformers
from memory_shapes import config_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignkit.models import adapters, logit_form, peft_internals
from alignkit.models.roles import apply_head
from alignkit.models.token_logps import LOGITS, token_logps
from alignkit_lora import lora

BLOCK = 64  # weights that share a constant in NF4
STATE_BLOCK = 256  # states that share one in an 8-bit optimizer
SMALL = 4096  # parameters of fewer weights keep 32-bit states there


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that come and go, those of ``modules`` not."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        held = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        self.known = {tensor.untyped_storage()._cdata: 0 for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = self.known[key] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


@dataclasses.dataclass
class Parts:
    """Bytes, by what they are for."""

    weights: int  # of every model that is loaded: the one trunk under PEFT
    adapters: int  # of four roles, with the heads
    optimizer: int
    sampling: int  # the cache at its longest, and what a forward over the prompts takes
    training: int  # the most that a forward and backward of policy and value take, gradients included

    @property
    def peak(self) -> int:
        return self.weights + self.adapters + max(self.sampling, self.optimizer + self.training)


def linears(model: nn.Module) -> list[nn.Linear]:
    """Those that QLoRA puts into 4 bits: all but the head."""
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n and "lm_head" not in n]


def nf4_bytes(weights: int) -> int:
    """Of ``weights`` in NF4 with double quantization: 4 bits each, 8 for a block of them, 32 for 256 blocks."""
    blocks = -(-weights // BLOCK)
    tables = 4 * (16 + 256 + 1)  # the values of 4 and of 8 bits, and an offset
    return weights // 2 + blocks + 4 * -(-blocks // STATE_BLOCK) + tables


def state_bytes(sizes: list[int], optimizer: str) -> int:
    """Of an AdamW's two moments, for parameters of these many weights."""
    if "8bit" not in optimizer:
        return sum(8 * n for n in sizes)
    return sum(2 * (n + 4 * -(-n // STATE_BLOCK)) if n >= SMALL else 8 * n for n in sizes)


def size(tensors: list[torch.Tensor] | list[nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compute(shape: str, tuner: str, options: argparse.Namespace) -> Parts:
    """The parts for a shape and a tuner; nothing of the model's size is allocated."""
    with FakeTensorMode():
        return with_tensors(shape, tuner, options)


def with_tensors(shape: str, tuner: str, options: argparse.Namespace) -> Parts:
    """As :func:`compute`, on whatever tensors are made here: those with data are counted just the same."""
    dtype = torch.float32 if tuner == "full" and not options.bf16_weights else torch.bfloat16
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype)
        width = model.config.hidden_size
        head = nn.Linear(width, 1, bias=False)
        if tuner == "full":
            value: Any = transformers.AutoModel.from_config(config_of(shape), dtype=dtype)
            # the reference is a copy of the policy; the reward is in the run's bf16
            weights = 2 * size([*model.parameters()]) + size([*value.parameters()]) * 2 // dtype.itemsize
            if options.value == "head":
                value, trained = model, [*model.parameters()]
            else:
                weights, trained = weights + size([*value.parameters()]), [*model.parameters(), *value.parameters()]
            in_adapters, unpacked = 3 * size([*head.parameters()]), 0
        else:
            model = value = lora.wrap(lora.LoraConfig(), model, "policy")
            one = size([p for p in model.parameters() if p.requires_grad])
            weights = size([*model.parameters()]) - one
            if options.value == "adapter":
                adapters.copy_adapter(model, "default", "role_value", trained=True)
            trained = [p for p in model.parameters() if p.requires_grad]
            in_adapters, unpacked = size(trained) + 2 * one + 3 * size([*head.parameters()]), 0
            if tuner == "qlora":
                packed = linears(model)
                weights += sum(nf4_bytes(m.weight.numel()) - size([m.weight]) for m in packed)
                unpacked = max(size([m.weight]) for m in packed)  # one at a time
    adapters.without_dropout(model)
    for module in (model, value, head):
        materialise(module)
    optimizer = state_bytes([p.numel() for p in trained], options.optimizer)
    return Parts(
        weights,
        in_adapters,
        optimizer,
        sample(model, options) + unpacked,
        train(model, value, head, options) + unpacked,
    )


def materialise(module: nn.Module) -> None:
    """Exchange the parameters and buffers on the meta device for ones on the CPU, which may be without data too."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # tied ones stay tied; the old is kept, for its id
    for inside in module.modules():
        for tensors in (inside._parameters, inside._buffers):
            for name, old in tensors.items():
                if old is not None and old.is_meta:
                    if id(old) not in made:
                        new = torch.zeros(old.shape, dtype=old.dtype, device="cpu")
                        made[id(old)] = old, nn.Parameter(new, old.requires_grad) if name in inside._parameters else new
                    tensors[name] = made[id(old)][1]


def sample(model: Any, options: argparse.Namespace) -> int:
    """What a forward over the prompts leaves and takes, and the cache of the answers' tokens."""
    ids = torch.zeros(options.sampled, options.length - options.response, dtype=torch.long)
    with Live(model) as live, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    text = model.config
    per_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * per_head * 2
    return max(live.peak, per_token * options.sampled * options.length)


def logits_of(options: argparse.Namespace) -> int:
    """The logits that ``token_logps`` holds at a time on a GPU of ``options.gpu_memory`` GiB: 1/64 of it, in fp32."""
    return int(max(LOGITS, options.gpu_memory * 2**30 // (64 * 4)))


def train(model: Any, value: Any, head: Any, options: argparse.Namespace) -> int:
    """The peak of a forward and backward pass of policy and value, above what was there before."""
    inner = logit_form.base_of(model)
    if options.gradient_checkpointing:
        for each in {id(inner): inner, id(value): logit_form.base_of(value)}.values():
            if hasattr(each, "gradient_checkpointing_enable"):
                each.gradient_checkpointing_enable(
                    {"use_reentrant": False, "context_fn": lambda: peft_internals.checkpoint_contexts(model)}
                )
    model.train(), value.train()
    ids = torch.zeros(options.microbatch, options.length, dtype=torch.long)
    mask = torch.ones_like(ids)

    def states(of: Any, adapter: str) -> torch.Tensor:
        with peft_internals.use_adapter(of, adapter):
            body = logit_form.trunk_of(of) if hasattr(of, "lm_head") or hasattr(of, "peft_config") else of
            return body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    with Live(model, value, head) as live:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = states(model, "default")[:, -options.response - 1 : -1].flatten(0, 1)
            of_value = hidden if options.value == "head" else states(value, "role_value")[:, -options.response - 1 : -1]
            values = apply_head(head, of_value)
            with mock.patch("alignkit.models.token_logps.logits_at_a_time", return_value=logits_of(options)):
                logps, _ = token_logps(inner, hidden, ids[:, -options.response :].flatten(), 1.0)
        (logps.sum() + values.sum()).backward()
        del hidden, of_value, values, logps
    return live.peak
