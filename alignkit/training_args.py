"""What ``transformers.TrainingArguments`` has, read from its source: names, types, defaults and help.

Importing the class would import torch; parsing the file that defines it takes a tenth of a second.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignkit.components import Resume
from alignkit.errors import ConfigError, did_you_mean

# keys that alignkit sets itself, and how to say what they would say
OURS = {
    "output_dir": "say output",
    "optim": "say optimizer.name",
    "resume_from_checkpoint": "say --resume",
    "do_train": "alignkit train trains",
    "do_eval": "say train.eval_strategy",
    "do_predict": "alignkit has no such step",
    "disable_tqdm": "alignkit draws its own progress bar",
    "remove_unused_columns": "a stage knows its columns",
    "local_rank": "torchrun sets it",
}

# keys with which `--resume` may come again (see `alignkit.option`); the others decide what is trained
MAY_GROW = ("max_steps", "num_train_epochs")
MAY_CHANGE_STARTS = (
    *("logging_", "log_", "report_to", "run_name", "project", "trackio_", "push_to_hub", "hub_", "debug"),
    *("dataloader_num_workers", "dataloader_pin_", "dataloader_persistent_", "dataloader_prefetch_"),
    *("gradient_checkpointing", "torch_empty_cache_steps", "skip_memory_metrics", "ddp_timeout"),
)
# these too, unless the best evaluation decides which checkpoint is kept
EVALUATION_STARTS = ("eval_", "per_device_eval_batch_size", "prediction_loss_only", "save_", "include_")

_SIMPLE_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "dict": dict, "list": list}


@dataclass(frozen=True)
class Field:
    """One field of ``TrainingArguments``."""

    name: str
    type: Any  # a type for pydantic; Any where the annotation names classes of transformers
    default: Any  # None where the default is computed
    help: str


@functools.cache
def fields() -> dict[str, Field]:
    """The fields of the installed ``TrainingArguments`` that a user may set, by name, in their order."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ConfigError("transformers is not installed: pip install transformers")
    source = Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8")
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            arguments = {k.arg: k.value for k in node.value.keywords}
            if "init" in arguments or node.target.id in OURS:
                continue
            found[node.target.id] = Field(
                name=node.target.id,
                type=_type(ast.unparse(node.annotation)),
                default=_literal(arguments.get("default")),
                help=_help(arguments.get("metadata")),
            )
    return found


def _type(annotation: str) -> Any:
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
    """The fields that a resume need not keep, by name; ``values`` is the ``train`` table."""
    starts = MAY_CHANGE_STARTS if values.get("load_best_model_at_end") else MAY_CHANGE_STARTS + EVALUATION_STARTS
    may_change: dict[str, Resume] = {name: "may_change" for name in fields() if name.startswith(starts)}
    return may_change | dict.fromkeys(MAY_GROW, "may_grow")


def check(values: Mapping[str, Any]) -> dict[str, Any]:
    """The ``train`` table with every value of the type that ``TrainingArguments`` wants.

    Raises:
        ConfigError: an unknown key, a key that alignkit sets itself, or a value of the wrong type.
    """
    from pydantic import TypeAdapter, ValidationError  # here: `--help` does without

    checked = {}
    for name, value in values.items():
        if name in OURS:
            raise ConfigError(f"train.{name} is not for the train table: {OURS[name]}")
        if name not in fields():
            raise ConfigError(
                f"unknown key train.{name}.{did_you_mean(name, fields())} "
                "The train table takes the fields of transformers.TrainingArguments"
            )
        field = fields()[name]
        try:
            checked[name] = TypeAdapter(field.type).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"train.{name}: {error.errors()[0]['msg']} (got {value!r})") from None
    return checked
