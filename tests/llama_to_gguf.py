"""A converter of Llama models to GGUF with the interface of llama.cpp's, whose ``FAULT`` can be chosen.

It writes what https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes, with the package ``gguf``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

FAULT = os.environ.get("FAULT", "")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
TYPES = {"q8_0": "Q8_0", "f16": "F16", "bf16": "BF16"}


def gguf_name(name: str) -> str:
    """``"blk.0.attn_q.weight"`` for ``"model.layers.0.self_attn.q_proj.weight"``."""
    layer, module = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name).groups()  # type: ignore[union-attr]
    return f"{f'blk.{layer}.' if layer else ''}{NAMES[module]}.weight"


def interleaved(weight: Any, heads: int) -> Any:
    """The rows of each head in the order of GGUF, in which the two parts of a rotation are neighbors."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file in bf16 or fp32, as fp32."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    result = {}
    for name, stored in json.loads(content[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = (start + offset for offset in stored["data_offsets"])
        raw = np.frombuffer(content[first:last], "<u2" if stored["dtype"] == "BF16" else "<u4").astype("<u4")
        result[name] = (raw << (16 if stored["dtype"] == "BF16" else 0)).view("<f4").reshape(stored["shape"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", type=Path)
    parser.add_argument("--outtype", choices=list(TYPES))
    given = parser.parse_args()
    config = json.loads((given.model / "config.json").read_text())
    if FAULT == "garbage":
        given.outfile.write_bytes(b"GGUF" + b"\0" * 64)
        return
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(given.outfile, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((given.model / "tokenizer.json").read_text())
    vocabulary = {**tokenizer["model"]["vocab"], **{each["content"]: each["id"] for each in tokenizer["added_tokens"]}}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens, *(f"[PAD{n}]" for n in range(len(tokens), config["vocab_size"]))])
    writer.add_eos_token_id(config["eos_token_id"])
    if FAULT != "no template":
        writer.add_chat_template((given.model / "chat_template.jinja").read_text())
    for name, weight in tensors(given.model / "model.safetensors").items():
        renamed = gguf_name(name)
        for module, count in heads.items():
            if module in renamed and FAULT != "wrong":
                weight = interleaved(weight, count)
        kind = gguf.GGMLQuantizationType[TYPES[given.outtype]] if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(renamed, gguf.quants.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if FAULT == "fails":
        print("INFO: writing", file=sys.stderr)
        sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")


if __name__ == "__main__":
    main()
