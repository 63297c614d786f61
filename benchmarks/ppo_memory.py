"""The memory that PPO takes on one GPU: 1.5B, 3B and 8B models, full, LoRA and QLoRA. No weights are downloaded.

::

    python benchmarks/ppo_memory.py
    python benchmarks/ppo_memory.py --shapes 8B --tuners qlora --optimizer adamw_8bit

Computed: the real modules and adapters are built on tensors without data, and a sampling and a training step are run on
them with every allocation counted (:class:`Live`). What cannot run so is added by arithmetic: 4-bit weights, optimizer
states and the cache of sampling. What CUDA takes for itself (about half a GiB) and what its allocator wastes is not in
it. Measured, where there is a GPU: alignkit's own PPO run on random weights, by ``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
import weakref
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignkit import hookimpl
from alignkit.models import adapters, logit_form, peft_internals
from alignkit.models.roles import apply_head
from alignkit.models.token_logps import token_logps
from alignkit.runs import base
from alignkit_lora import lora

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "1.5B": (  # Qwen2.5-1.5B
        "qwen2",
        {
            **{"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
            **{"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
        },
    ),
    "3B": (  # Llama-3.2-3B
        "llama",
        {
            **LLAMA,
            **{"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
            "tie_word_embeddings": True,
        },
    ),
    "8B": (  # Llama-3.1-8B
        "llama",
        {
            **LLAMA,
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
            "tie_word_embeddings": False,
        },
    ),
    "tiny": (  # for tests; the vocabulary is that of the bundled tokenizer
        "llama",
        {
            **{"vocab_size": 49152, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        },
    ),
}
TUNERS = ("full", "lora", "qlora")
BLOCK = 64  # weights that share a constant in NF4
STATE_BLOCK = 256  # states that share one in an 8-bit optimizer
SMALL = 4096  # parameters of fewer weights keep 32-bit states there
GIB = 2**30


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


def config_of(shape: str) -> Any:
    kind, sizes = SHAPES[shape]
    return transformers.CONFIG_MAPPING[kind](**sizes, bos_token_id=None, eos_token_id=0, pad_token_id=None)


def linears(model: nn.Module) -> list[nn.Linear]:
    """Those that QLoRA puts into 4 bits: all but the head."""
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n and "lm_head" not in n]


def nf4_bytes(weights: int) -> int:
    """Of ``weights`` in NF4 with double quantisation: 4 bits each, 8 for a block of them, 32 for 256 blocks."""
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
            logps, _ = token_logps(inner, hidden, ids[:, -options.response :].flatten(), 1.0)
        (logps.sum() + values.sum()).backward()
        del hidden, of_value, values, logps
    return live.peak


# --- with a GPU ------------------------------------------------------------------------------------------------------


class RandomWeights:
    """A plugin that makes the model of a shape where it would be loaded; 4-bit layers one at a time."""

    def __init__(self, shape: str, tuner: str, device: str) -> None:
        self.shape, self.tuner, self.device = shape, tuner, device

    @hookimpl
    def alignkit_load_model(self, run: Any, role: str, kwargs: dict[str, Any]) -> Any:
        head = role in adapters.WITH_HEAD
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
            model.model.layers = nn.ModuleList(quantised(kind(config, i).to(dtype)) for i in range(layers))
        model.config.num_hidden_layers = layers
        model.is_loaded_in_4bit = True  # where PEFT looks
        return model


def quantised(layer: nn.Module) -> nn.Module:
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
    from alignkit.runs.plan import pipeline
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
    transformers.AutoTokenizer.from_pretrained(base.locate("bundled:smollm2-135m", print)).save_pretrained(
        Path(folder) / "base"
    )


random_weights: Any = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.5B", "3B", "8B"])
    parser.add_argument("--tuners", nargs="+", choices=TUNERS, default=list(TUNERS))
    parser.add_argument("--optimizer", default="adamw_8bit", choices=("adamw", "adamw_8bit"))
    parser.add_argument("--microbatch", type=int, default=4, help="answers in a forward with gradients")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt with its answer")
    parser.add_argument("--response", type=int, default=256, help="tokens of the answer among them")
    parser.add_argument("--sampled", type=int, default=16, help="answers that are sampled at a time")
    parser.add_argument("--value", choices=("adapter", "head"), default="adapter", help="ppo.value")
    parser.add_argument("--no-checkpointing", dest="gradient_checkpointing", action="store_false")
    parser.add_argument("--bf16-weights", action="store_true", help="full: tuner.dtype=bfloat16")
    options = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Parts)]
    print("GiB    tuner     " + "".join(f"{name:>10}" for name in [*names, "peak"]) + "   how")
    for shape in options.shapes:
        for tuner in options.tuners:
            parts = compute(shape, tuner, options)
            row = [*dataclasses.astuple(parts), parts.peak]
            print(f"{shape:<7}{tuner:<10}" + "".join(f"{n / GIB:>10.2f}" for n in row) + "   computed", flush=True)
            if torch.cuda.is_available():
                peak = measure(shape, tuner, options)
                print(f"{shape:<7}{tuner:<10}{'':>50}{peak / GIB:>10.2f}   measured", flush=True)


if __name__ == "__main__":
    main()
