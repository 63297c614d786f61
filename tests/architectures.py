"""Every causal architecture of the installed Transformers as a small random model, as far as one can be built."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
BIGGEST = 2_000_000  # weights

VALUES: dict[int, str] = {
    32: "hidden_size n_embd d_model dim embed_dim embedding_size word_embed_proj_dim intermediate_size ffn_dim n_inner "
    "decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dense_intermediate_size prefix_dense_intermediate_size",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size q_lora_rank kv_lora_rank "
    "moe_shared_expert_intermediate_size mamba_d_head mamba_head_dim",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_d_state state_size linear_key_head_dim "
    "linear_value_head_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_window "
    "num_local_experts num_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads rotary_dim",
    2: "num_hidden_layers n_layer n_layers decoder_layers num_layers num_key_value_heads num_experts_per_tok "
    "linear_num_key_heads linear_num_value_heads",
    1: "encoder_layers n_group topk_group mamba_n_groups n_groups",
    64: "vocab_size max_position_embeddings n_positions max_seq_len",
}
SMALL: dict[str, Any] = {name: value for value, names in VALUES.items() for name in names.split()}
SPECIAL: tuple[dict[str, Any], ...] = (
    {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "is_decoder": True},
    {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "is_decoder": True},
    {},
)
OWN: dict[str, dict[str, Any]] = {  # what an architecture needs beside that
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "opt": {"word_embed_proj_dim": 16},  # as in OPT-350m
    "xlnet": {"attn_type": "uni"},
}
LOGITS = re.compile(r"logits?_\w*(scal|cap)|output_multiplier|lm_head_multiplier")


class CannotBuild(Exception):  # noqa: N818
    """The architecture needs other settings, or a package that is not there, or is not small."""


def build(name: str, logits: float | None = None, **fields: Any) -> Any:
    """A model with small sizes and weights that are the same each time, in evaluation mode.

    ``logits`` is the value of each config field that has a part in the logits; the head's weights are then large enough
    that it matters.

    Raises:
        CannotBuild: it cannot be built so.
    """
    reasons = []
    for special in SPECIAL:
        try:
            config = _config(name, special | OWN.get(name, {}) | fields)
            for part in (config, config.get_text_config()) if logits else ():
                for field in filter(LOGITS.search, part.to_dict()):
                    setattr(part, field, logits)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > BIGGEST:
                raise CannotBuild(f"{size / 1e6:.0f}M weights")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                if logits and (head := model.get_output_embeddings()) is not None:
                    head.weight.normal_()
                    if getattr(head, "bias", None) is not None:
                        head.bias.normal_(std=0.1)
                model(input_ids=torch.arange(1, 9)[None], use_cache=False).logits.shape  # noqa: B018
            return model
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
    raise CannotBuild("; ".join(reasons))


def scorer(model: Any) -> Any:
    """A model for sequence classification with one label, of the architecture and the weights of a causal one."""
    torch.manual_seed(0)
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    trunk = getattr(model, model.base_model_prefix)
    getattr(classifier, classifier.base_model_prefix).load_state_dict(trunk.state_dict())
    return classifier


def _config(name: str, fields: dict[str, Any]) -> Any:
    cls = CONFIG_MAPPING[name]
    parts = {part: _small(getattr(cls(), part), fields) for part in getattr(cls, "sub_configs", {})}
    own = _small(cls(), fields)
    return cls(**own, **parts)


def _small(default: Any, fields: dict[str, Any]) -> dict[str, Any]:
    known = default.to_dict()
    sizes = {k: v for k, v in SMALL.items() if isinstance(known.get(k), int)}
    sizes |= {k: SMALL[k] for k in ("head_dim", "num_key_value_heads") if k in known and known[k] is None}
    if known.get("layer_types"):  # one layer of each kind
        sizes["layer_types"] = list(dict.fromkeys(known["layer_types"]))
        layers = [field for field in ("num_hidden_layers", "n_layer", "n_layers") if field in known]
        sizes |= dict.fromkeys(layers, len(sizes["layer_types"]))
    if "kv_lora_rank" in known:  # multi-head latent attention
        sizes["num_key_value_heads"] = SMALL["num_attention_heads"]
    return sizes | {k: v for k, v in fields.items() if k in known}
