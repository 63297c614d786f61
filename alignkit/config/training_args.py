"""The fields of ``transformers.TrainingArguments``: names, types, defaults and help, read from its source file.

Importing the class would import torch. Parsing the file that defines it takes a tenth of a second.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from alignkit.components import Resume
from alignkit.config import deepspeed, unused_settings
from alignkit.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import TrainingArguments

# fields that no stage accepts -> the reason, or what to do instead
REFUSED = {
    # alignkit sets them
    "output_dir": "set output",
    "optim": "set optimizer.name",
    "resume_from_checkpoint": "use --resume",
    "do_train": "alignkit train always trains",
    "do_eval": "set train.eval_strategy",
    "do_predict": "alignkit has no prediction step",
    "disable_tqdm": "alignkit draws its own progress bar",
    "remove_unused_columns": "each stage selects its own columns",
    "label_names": "each stage selects its own columns",
    "length_column_name": "alignkit measures lengths itself",
    "local_rank": "torchrun sets it",
    # plugins do it
    "label_smoothing_factor": "the loss is a plugin: choose a loss with label smoothing",
    "use_liger_kernel": "its kernels would replace the loss, which is a plugin",
    "liger_kernel_config": "its kernels would replace the loss, which is a plugin",
    "optim_args": "set the optimizer's options in the optimizer table",
    "optim_target_modules": "set the optimizer's options in the optimizer table",
    "prediction_loss_only": "each stage computes its own evaluation metrics",
    "eval_do_concat_batches": "each stage computes its own evaluation metrics",
    "eval_use_gather_object": "each stage computes its own evaluation metrics",
    "include_for_metrics": "each stage computes its own evaluation metrics",
    "batch_eval_metrics": "each stage computes its own evaluation metrics",
    "include_num_input_tokens_seen": "stages that count tokens log num_tokens",
    # the result would be wrong
    "use_cache": "with a cache, packed rows would attend to each other",
    "bf16_full_eval": "it would round the trained weights; evaluation uses the precision of training",
    "fp16_full_eval": "it would round the trained weights; evaluation uses the precision of training",
    "average_tokens_across_devices": "the loss is always a mean over all processes",
    "auto_find_batch_size": "it would change the batch of a step: lower train.per_device_train_batch_size and raise "
    "train.gradient_accumulation_steps",
    "accelerator_config": "it would change how rows become batches",
    "parallelism_config": "set train.shard=fsdp2",
    "fsdp": "set train.shard=fsdp2",
    "fsdp_config": "set train.shard=fsdp2",
    # --resume would not be exact
    "save_only_model": "such checkpoints cannot be resumed; to write none, set train.save_strategy=no",
    "ignore_data_skip": "a resumed run would train on the same rows again",
    "dataloader_in_order": "batches in arbitrary order cannot be resumed",
    "enable_jit_checkpoint": "Ctrl-C and SIGTERM already write a checkpoint and stop the run",
    # runs upload nothing
    **dict.fromkeys(
        (
            *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"),
            *("hub_strategy", "hub_always_push", "hub_revision"),
        ),
        "upload the finished model with alignkit export RUN --to FOLDER --push USER/NAME",
    ),
}

BOUNDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor"),
            *("save_total_limit", "ddp_timeout", "ddp_bucket_cap_mb"),
        ),
        (Ge(1),),
    ),
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "eval_delay"),
            "dataloader_num_workers",
        ),
        (Ge(0),),
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps", "neftune_noise_alpha"), (Gt(0),)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (Ge(0), Lt(1))),
    **dict.fromkeys(("seed", "data_seed"), (Ge(0), Lt(2**32))),
}

# fields that have an effect only if another one is set
ONLY_WITH = {
    "activation_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
    "gradient_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
    "dataloader_persistent_workers": ("dataloader_num_workers",),
    "dataloader_prefetch_factor": ("dataloader_num_workers",),
    "dataloader_multiprocessing_context": ("dataloader_num_workers",),
}

# fields that `--resume` accepts new values of (see `alignkit.option`); the others change what is trained
MAY_GROW = ("max_steps", "num_train_epochs")
MAY_CHANGE_STARTS = (
    *("logging_", "log_", "report_to", "run_name", "project", "trackio_", "debug"),
    *("dataloader_num_workers", "dataloader_pin_", "dataloader_persistent_", "dataloader_prefetch_"),
    *("gradient_checkpointing", "torch_empty_cache_steps", "skip_memory_metrics", "ddp_timeout"),
)
# these too, unless evaluations decide which checkpoint is kept
EVALUATION_STARTS = ("eval_", "per_device_eval_batch_size", "save_")

# where the annotation of a field is less precise than the values that it accepts
CHOICES: dict[str, Any] = {
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length", "batch_rebalance"],
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
}
CHECKPOINTING = ("every_n_layers", "offload", "use_reentrant", "preserve_rng_state", "determinism_check", "selective")
TRACKER_PACKAGES = {  # of trackers whose package has another name; one of them must be installed
    "tensorboard": ("tensorboard", "tensorboardX"),
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "kubeflow": (),
}

_SIMPLE_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "dict": dict, "list": list}


@dataclass(frozen=True)
class Field:
    """One field of ``TrainingArguments``."""

    name: str
    type: Any  # a type for pydantic; Any if the annotation names classes of transformers
    default: Any  # None if the default is computed
    help: str


SHARD = "fsdp2: each process holds a part of every weight, gradient and optimizer state; null: all of them"
OWN = {"shard": Field("shard", Literal["fsdp2"] | None, None, SHARD)}  # alignkit's own keys of the table


@functools.cache
def fields() -> dict[str, Field]:
    """The fields that users may set: those of the installed ``TrainingArguments``, in their order, then ``OWN``."""
    return {name: field for name, field in every_field().items() if name not in REFUSED} | OWN


@functools.cache
def every_field() -> dict[str, Field]:
    """All fields of the installed ``TrainingArguments``."""
    enums = _enums(_tree("trainer_utils.py"))
    body = next(
        node.body
        for node in _tree("training_args.py").body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    result = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            arguments = {k.arg: k.value for k in node.value.keywords}
            if "init" in arguments:
                continue
            result[node.target.id] = Field(
                name=node.target.id,
                type=CHOICES.get(node.target.id) or _type(ast.unparse(node.annotation), enums),
                default=_literal(arguments.get("default")),
                help=_help(arguments.get("metadata")),
            )
    return result


def _tree(file: str) -> ast.Module:
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ConfigError("transformers is not installed: pip install transformers")
    return ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))


def _enums(tree: ast.Module) -> dict[str, tuple[str, ...]]:
    """The values of each string enumeration that a module defines."""
    return {
        node.name: tuple(
            str(line.value.value)
            for line in node.body
            if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
        )
        for node in tree.body
        if isinstance(node, ast.ClassDef) and ast.unparse(node.bases[0] if node.bases else node) == "ExplicitEnum"
    }


def _type(annotation: str, enums: Mapping[str, tuple[str, ...]]) -> Any:
    if (enum := annotation.removesuffix(" | str")) in enums:
        return Literal[enums[enum]]
    scope = {**_SIMPLE_TYPES, "Any": Any, "Literal": Literal, "__builtins__": {}}
    try:
        return eval(annotation, scope)
    except (NameError, AttributeError, TypeError):
        return Any


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _help(node: ast.expr | None) -> str:
    for key, value in zip(getattr(node, "keys", []), getattr(node, "values", []), strict=True):
        if _literal(key) == "help":
            return " ".join(str(_literal(value) or "").split())
    return ""


def on_resume(values: Mapping[str, Any]) -> dict[str, Resume]:
    """The fields that a resume may change, by name. ``values`` is the ``train`` table."""
    starts = MAY_CHANGE_STARTS if values.get("load_best_model_at_end") else MAY_CHANGE_STARTS + EVALUATION_STARTS
    may_change: dict[str, Resume] = {name: "may_change" for name in fields() if name.startswith(starts)}
    return may_change | dict.fromkeys(MAY_GROW, "may_grow")


def check(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the types and ranges of a ``train`` table.

    Raises:
        ConfigError: an unknown key, a key that no stage accepts, or a value of the wrong type or out of range.
    """
    checked = {}
    for name, value in values.items():
        if name in REFUSED:
            if value is None or value == getattr(every_field().get(name), "default", None):
                continue  # the default, which has no effect
            raise ConfigError(f"train.{name} is not supported: {REFUSED[name]}")
        if name not in fields():
            raise ConfigError(
                f"unknown key train.{name}.{did_you_mean(name, fields())} "
                "The train table takes the fields of transformers.TrainingArguments"
            )
        checked[name] = _checked(name, value)
    return checked


def _checked(name: str, value: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError  # slow to import

    type_ = fields()[name].type
    if value is not None and name in BOUNDS:
        type_ = Annotated[(type_, *BOUNDS[name])]
    try:
        checked = TypeAdapter(type_).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"train.{name}: {error.errors()[0]['msg']} (got {value!r})") from None
    if isinstance(value, bool) and not isinstance(checked, bool):  # Pydantic takes True for 1
        raise ConfigError(f"train.{name} must be a number, not {value!r}")
    if name == "deepspeed" and checked is not None:
        return deepspeed.read(checked)
    if isinstance(checked, float) and not math.isfinite(checked):
        raise ConfigError(f"train.{name} must be a finite number (got {value!r})")
    if name == "max_steps" and checked < 1 and checked != -1:
        raise ConfigError(f"train.max_steps must be 1 or more, or -1 for no limit (got {value!r})")
    if (
        name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps")
        and checked
        and checked > 1
        and checked % 1
    ):
        raise ConfigError(f"train.{name} must be a whole number of steps, or a fraction below 1 (got {value!r})")
    return checked


def check_together(train: Mapping[str, Any]) -> None:
    """Check that the values of a complete ``train`` table are consistent.

    Raises:
        ConfigError: two values contradict each other, or one has no effect without another.
    """
    if train.get("bf16") and train.get("fp16"):
        raise ConfigError("train.bf16 and train.fp16 are both true. Set only one of them")
    deepspeed.check(train)
    unused_settings.check_only_with(train, {name: ONLY_WITH[name] for name in ONLY_WITH if train.get(name)}, "train.")
    for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        for name in train[key] if isinstance(train.get(key), Mapping) else ():
            if name not in CHECKPOINTING:
                raise ConfigError(f"unknown key train.{key}.{name}. Valid keys: {', '.join(CHECKPOINTING)}")
    _check_trackers(train.get("report_to") or [])
    for other in ("deepspeed", "torch_compile"):
        if train.get("shard") and train.get(other):
            raise ConfigError(f"train.shard: fsdp2 does not support train.{other}. Remove one of them")
    if train.get("save_strategy") == "best" and not train.get("metric_for_best_model"):
        raise ConfigError("train.save_strategy=best needs train.metric_for_best_model, such as loss")
    if train.get("load_best_model_at_end") and train.get("eval_strategy", "no") not in _saved_with(train):
        raise ConfigError(
            "train.load_best_model_at_end needs a checkpoint at every evaluation. Set train.eval_strategy and "
            "train.save_strategy to the same value"
        )


def _check_trackers(report_to: str | list[str]) -> None:
    named = [report_to] if isinstance(report_to, str) else report_to
    if named in (["none"], ["all"]):
        return
    for tracker in named:
        if tracker not in trackers():
            raise ConfigError(
                f"train.report_to: '{tracker}' is unknown.{did_you_mean(tracker, trackers())} "
                f"Trackers: {', '.join(trackers())}"
            )
        packages = TRACKER_PACKAGES.get(tracker, (tracker,))
        if packages and not any(map(importlib.util.find_spec, packages)):
            raise ConfigError(f"train.report_to: {tracker} is not installed: pip install {packages[0]}")


@functools.cache
def trackers() -> list[str]:
    """The trackers that the installed Transformers can report to."""
    (table,) = [
        node.value
        for node in _tree("integrations/integration_utils.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK"
    ]
    assert isinstance(table, ast.Dict)
    return sorted(str(_literal(key)) for key in table.keys)


def _saved_with(train: Mapping[str, Any]) -> tuple[str, ...]:
    """The values of ``eval_strategy`` with which every evaluation has a checkpoint."""
    saved = train.get("save_strategy", "steps")
    return ("steps", "epoch") if saved == "best" else () if saved == "no" else (saved,)


def check_batches(args: TrainingArguments, rows: Any) -> None:
    """Check that the ``rows`` of a trainer fill at least one batch.

    Raises:
        ConfigError: they do not, and ``train.dataloader_drop_last`` would drop them all.
    """
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and hasattr(rows, "__len__") and len(rows) < batch:
        raise ConfigError(
            f"train.dataloader_drop_last leaves nothing to train on: {len(rows)} examples do not fill a batch of "
            f"{batch}. Lower train.per_device_train_batch_size"
        )
