"""Models and the roles that they play: adapters on one trunk, log-probabilities, dtypes and devices.

Importing this package imports no torch; using its names does.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = [
    "Logps",
    "Member",
    "Reference",
    "Roles",
    "Sequences",
    "adapter_on_head",
    "answer_scores",
    "assemble",
    "base_of",
    "check_base_frozen",
    "collate_separate",
    "collate_tree",
    "copy_adapter",
    "decide_shared_prompt",
    "decoder_layers",
    "describe_reference",
    "disable_gradient_checkpointing",
    "full_tensor",
    "fused_logps",
    "gathered",
    "head_in_fp32",
    "install_fused_head",
    "kept_dtypes",
    "layer_outputs",
    "open_run",
    "pack_trees",
    "probing",
    "reference_of",
    "run_device",
    "run_dtype",
    "shard_like",
    "tree_size",
    "use_adapter",
    "uses_fused_head",
    "whole_weights_of",
    "with_answer_scores",
    "without_dropout",
]

if TYPE_CHECKING:
    from alignkit.models.adapters import check_base_frozen, copy_adapter, open_run, without_dropout
    from alignkit.models.device_and_dtype import run_device, run_dtype
    from alignkit.models.fused_head import fused_logps, install_fused_head, uses_fused_head
    from alignkit.models.layers import decoder_layers, layer_outputs
    from alignkit.models.load_roles import assemble
    from alignkit.models.logit_form import base_of, probing
    from alignkit.models.peft_internals import use_adapter
    from alignkit.models.pretrained import head_in_fp32
    from alignkit.models.prompt_trees import (
        answer_scores,
        collate_separate,
        collate_tree,
        pack_trees,
        tree_size,
        with_answer_scores,
    )
    from alignkit.models.reference import Reference, describe_reference, reference_of
    from alignkit.models.roles import Member, Roles
    from alignkit.models.sequences import Logps, Sequences
    from alignkit.models.sharded import full_tensor, gathered, shard_like
    from alignkit.models.shared_prompt import decide_shared_prompt
    from alignkit.models.trl_internals import adapter_on_head, disable_gradient_checkpointing, kept_dtypes
    from alignkit.models.zero3 import whole_weights_of
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
