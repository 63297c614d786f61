"""The sizes of the models whose memory is computed and measured."""

from __future__ import annotations

from typing import Any

import transformers

from alignkit.runs import locate_model

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


def write_model(shape: str, folder: str) -> None:
    """Write a model's folder without weights: a config, and the tokenizer of the bundled model."""
    kind, sizes = SHAPES[shape]
    config = transformers.CONFIG_MAPPING[kind](**sizes, bos_token_id=None, eos_token_id=0, pad_token_id=None)
    config.architectures = ["LlamaForCausalLM" if kind == "llama" else "Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    bundled = locate_model("bundled:smollm2-135m", print)
    transformers.AutoTokenizer.from_pretrained(bundled).save_pretrained(folder)
