"""Memory and communication of models from 1.5B to 70B on 1 to 64 cards, computed from shapes alone.

    python benchmarks/scale_computed.py --card 80

Nothing is measured here. For each model, tuner and layout, the table has the smallest number of cards of that size on
which a run fits, and the time of its communication there, divided by that of its computation. Above 1, a run waits for
the network even if both overlap. The assumptions are the defaults of :class:`Setting` and the comments of each formula.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

GIB = 2**30
CARDS = (1, 2, 4, 8, 16, 32, 64)
TUNERS = ("full", "lora", "qlora")
LAYOUTS = {"sft": ("ddp", "fsdp2", "zero2", "zero3"), "ppo": ("ddp", "fsdp2", "fsdp2+vllm")}


@dataclass(frozen=True)
class Shape:
    """A decoder with gated MLPs, as Llama and Qwen2."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_size: int = 128
    tied: bool = False  # the head is the embeddings
    biased: bool = False  # queries, keys and values have biases

    @property
    def linears(self) -> list[tuple[int, int]]:
        """The sizes (in, out) of the linear layers of a decoder layer."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]

    @property
    def layer(self) -> int:
        """The weights of a decoder layer."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_size if self.biased else 0
        return sum(i * o for i, o in self.linears) + 2 * self.hidden + biases

    @property
    def outside(self) -> int:
        """The weights outside of the decoder layers: embeddings, head and the last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def weights(self) -> int:
        return self.layers * self.layer + self.outside

    def adapter(self, rank: int) -> int:
        """The weights of LoRA on all linear layers of the decoder."""
        return self.layers * sum(rank * (i + o) for i, o in self.linears)


MODELS = {
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151936, tied=True, biased=True),  # Qwen2.5-1.5B
    "3B": Shape(3072, 8192, 28, 24, 8, 128256, tied=True),  # Llama-3.2-3B
    "8B": Shape(4096, 14336, 32, 32, 8, 128256),  # Llama-3.1-8B
    "32B": Shape(5120, 27648, 64, 40, 8, 152064, biased=True),  # Qwen2.5-32B
    "70B": Shape(8192, 28672, 80, 64, 8, 128256),  # Llama-3.1-70B
}


@dataclass(frozen=True)
class Setting:
    """The hardware, and the sizes of a run. Bandwidths are bytes/s in one direction, as reached."""

    memory: float = 80e9  # bytes of a card
    flops: float = 400e12  # per second, as reached in training
    in_node: float = 300e9  # bandwidth of a card within its node
    between_nodes: float = 40e9  # bandwidth of a card to other nodes
    cards_of_node: int = 8
    tokens: int = 4096  # of a microbatch on each card; a step is one microbatch
    answers: int = 16  # that a card samples at a time, of `length` tokens with their prompts
    length: int = 1024
    rank: int = 16

    def bandwidth(self, cards: int) -> float:
        return self.in_node if cards <= self.cards_of_node else self.between_nodes


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights of a run: those of the base if frozen in bf16 or 4 bits, all others in fp32."""

    trained: int
    frozen: float
    per_layer: float  # of one decoder layer of the policy
    outside: float  # of the policy's embeddings and head
    policy: float  # of the whole policy, as it samples

    @property
    def all(self) -> float:
        return self.trained + self.frozen


def weights(shape: Shape, tuner: str, stage: str, rank: int) -> Weights:
    """SFT has one model. PPO has a trained policy and value, and a frozen reference and reward.

    With adapters these four share one base. NF4 takes 4.127 bits per weight with double quantization.
    """
    trained, frozen = (2, 2) if stage == "ppo" else (1, 0)
    if tuner == "full":
        size = 4 * shape.weights
        return Weights(trained * size, frozen * size / 2, 4 * shape.layer, 4 * shape.outside, size)
    of_layer = (2 if tuner == "lora" else 4.127 / 8) * shape.layer
    base, adapter = shape.layers * of_layer + 2 * shape.outside, 4 * shape.adapter(rank)
    layer = of_layer + adapter / shape.layers
    return Weights(trained * adapter, base + frozen * adapter, layer, 2 * shape.outside, base + adapter)


def activations(shape: Shape, tokens: int) -> float:
    """Bytes with gradient checkpointing: the inputs of all layers, one layer that is recomputed, and a tile of logits.

    All in bf16, except the residual stream of the layer and the tile of 32,768 logits per token, in fp32 and twice.
    """
    inputs = 2 * shape.layers * tokens * shape.hidden
    layer = tokens * (2 * sum(i + o for i, o in shape.linears) + 8 * shape.hidden)
    return inputs + layer + 2 * 4 * tokens * min(32768, shape.vocabulary)


def memory(shape: Shape, tuner: str, stage: str, layout: str, cards: int, setting: Setting) -> float:
    """The bytes that a card needs at the peak of a run.

    Adam has two states in fp32 for each trained weight. DDP and ZeRO-2 hold bf16 copies of trained weights during a
    step, and DDP a second copy of gradients, its buckets. FSDP2 and ZeRO-3 gather the embeddings, the head and two
    layers at a time. DeepSpeed holds a second copy of the trained weights, in parts. CUDA and its allocator take 0.65
    GiB and 3 %.
    """
    of = weights(shape, tuner, stage, setting.rank)
    states = 2 * of.trained
    if layout in ("ddp", "zero2"):
        copies = of.trained / 2
        if layout == "ddp":
            held = of.all + copies + states + of.trained * (2 if cards > 1 else 1)
        else:
            held = of.all + copies + (states + 2 * of.trained) / cards
        gathered = sampling = 0.0
    else:
        master = of.trained if layout == "zero3" else 0
        held = (of.all + of.trained + states + master) / cards
        gathered = of.outside + 2 * of.per_layer if cards > 1 else 0.0
        sampling = of.policy if cards > 1 else 0.0
    peak = held + gathered + activations(shape, setting.tokens)
    if stage == "ppo" and layout != "fsdp2+vllm":  # the cache of keys and values
        cache = 4 * setting.answers * setting.length * shape.layers * shape.kv_heads * shape.head_size
        peak = max(peak, held + sampling + cache)
    return 1.03 * peak + 0.65 * GIB


def communication(shape: Shape, tuner: str, stage: str, layout: str, cards: int, setting: Setting) -> float:
    """The bytes that a card sends for an optimizer step, with ring algorithms.

    DDP and ZeRO-2 reduce the gradients of trained weights and distribute the result. FSDP2 and ZeRO-3 gather all
    weights for the forward and again for the backward pass, and reduce gradients once. PPO gathers them once more to
    score answers, and the policy to sample.
    """
    of = weights(shape, tuner, stage, setting.rank)
    ring = (cards - 1) / cards
    if layout in ("ddp", "zero2"):
        return 2 * ring * of.trained
    trained_models = of.trained if tuner == "full" else of.all  # frozen models take no part in training steps
    scoring = of.all if stage == "ppo" else 0
    sampling = of.policy if stage == "ppo" and layout == "fsdp2" else 0
    return ring * (2 * trained_models + of.trained + scoring + sampling)


def computation(shape: Shape, tuner: str, stage: str, setting: Setting) -> float:
    """The FLOPs of a card for an optimizer step, without sampling: 2 per weight and token and pass.

    Passes: forward, the same again for checkpointing, gradients of activations, and of weights if all train.
    PPO trains two models and has scored with four.
    """
    passes = 4 if tuner == "full" else 3
    if stage == "ppo":
        passes = 2 * passes + 4
    return 2.0 * shape.weights * setting.tokens * passes


def ratio(shape: Shape, tuner: str, stage: str, layout: str, cards: int, setting: Setting) -> float:
    """The time of communication, divided by that of computation."""
    sent = communication(shape, tuner, stage, layout, cards, setting) / setting.bandwidth(cards)
    return sent / (computation(shape, tuner, stage, setting) / setting.flops)


def fewest(shape: Shape, tuner: str, stage: str, layout: str, setting: Setting) -> int | None:
    """The fewest cards on which a run fits, two if it is sharded; None if it does not fit on the most."""
    fits = (n for n in CARDS[layout != "ddp" :] if memory(shape, tuner, stage, layout, n, setting) <= setting.memory)
    return next(fits, None)


def cell(shape: Shape, tuner: str, stage: str, layout: str, setting: Setting) -> str:
    """``"4: 61 GB, 0.3"``: cards, memory of each, communication / computation; and that at 64 cards."""
    cards = fewest(shape, tuner, stage, layout, setting)
    if cards is None:
        return "does not fit"
    size = memory(shape, tuner, stage, layout, cards, setting) / 1e9
    shares = (ratio(shape, tuner, stage, layout, n, setting) for n in (cards, CARDS[-1]))
    return f"{cards}: {size:.0f} GB, " + " to ".join(f"{share:.2g}" for share in shares)


def table(stage: str, setting: Setting) -> str:
    """All models and tuners of a stage, in Markdown."""
    lines = [f"| model | tuner | {' | '.join(LAYOUTS[stage])} |", "|---|---|" + "---|" * len(LAYOUTS[stage])]
    for name, shape in MODELS.items():
        for tuner in TUNERS:
            # ZeRO-3 does not work with quantized weights
            cells = [
                "no" if (tuner, layout) == ("qlora", "zero3") else cell(shape, tuner, stage, layout, setting)
                for layout in LAYOUTS[stage]
            ]
            lines.append(f"| {name} | `{tuner}` | {' | '.join(cells)} |")
    return "\n".join(lines)


SMALL_CARD = {"memory": 24e9, "flops": 60e12, "in_node": 12e9, "between_nodes": 2.5e9}  # PCIe 4, and Ethernet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", type=int, choices=(24, 80), default=80, help="GB of a card, and its usual speeds")
    for name in ("flops", "in_node", "between_nodes", "tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help=f"instead of the default {name}")
    parsed = vars(parser.parse_args())
    setting = {**(SMALL_CARD if parsed.pop("card") == 24 else {}), **{k: v for k, v in parsed.items() if v}}
    card = Setting(**setting)
    for stage in LAYOUTS:
        print(f"\n{stage.upper()}, cards of {card.memory / 1e9:.0f} GB\n\n{table(stage, card)}")


if __name__ == "__main__":
    main()
