"""Checks before training that the result can be saved, so that no run is lost after its last step."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import AlignkitError, one_line
from alignkit.protocols import Run

if TYPE_CHECKING:
    import transformers


def rehearse(run: Run, trainer: transformers.Trainer) -> None:
    """Write everything but the weights to a temporary folder, and check that the disk has space for the weights.

    A generation config that Transformers would not save is repaired if possible.

    Raises:
        AlignkitError: the result could not be saved.
    """
    models = list(_saved_models(trainer.accelerator.unwrap_model(trainer.model)))
    for model in models:
        if not _has_adapters(model) and model.can_generate():
            repair_generation_config(model, run.say)
    if not trainer.is_world_process_zero():
        return
    with tempfile.TemporaryDirectory(dir=run.folder, prefix=".rehearsal-") as folder:
        try:
            json.dumps(run.config.to_dict())
            run.tokenizer.save_pretrained(folder)
            for model in models:
                _save_configs(model, folder)
        except Exception as error:  # any error here would otherwise occur after the last step
            raise AlignkitError(f"the trained model could not be saved: {one_line(error)}") from error
    needed = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    check_disk(run.folder, needed)


def _has_adapters(model: Any) -> bool:
    import peft

    return isinstance(model, peft.PeftModel)


def _saved_models(module: Any) -> Iterator[Any]:
    """The outermost models in a module that have a ``save_pretrained``."""
    import transformers

    if _has_adapters(module) or isinstance(module, transformers.PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _saved_models(child)


def _save_configs(model: Any, folder: str) -> None:
    if _has_adapters(model):
        for config in model.peft_config.values():
            config.save_pretrained(folder)
        return
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def repair_generation_config(model: Any, say: Callable[[str], None]) -> None:
    """Set ``do_sample=True`` in a generation config that Transformers would not save without it, and say so.

    Some published models have a temperature without ``do_sample``. Transformers recommends this repair.

    Raises:
        AlignkitError: the generation config is still invalid.
    """
    config = model.generation_config
    try:
        config.validate(strict=True)
        return
    except ValueError:
        do_sample, config.do_sample = config.do_sample, True
    try:
        config.validate(strict=True)
    except ValueError as error:
        config.do_sample = do_sample
        raise AlignkitError(
            f"the generation config of {model.name_or_path} is invalid and cannot be saved: {one_line(error)}. Correct "
            "its generation_config.json"
        ) from error
    say(
        f"the generation config of {model.name_or_path} has sampling settings without do_sample: it is saved with "
        "do_sample=true"
    )


def check_disk(folder: Path, needed: int) -> None:
    """Check that the disk of a folder has ``needed`` bytes of free space.

    Raises:
        AlignkitError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise AlignkitError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, and the trained weights need {needed / 1e9:.1f} GB: "
            "free some space, or choose another --output"
        )
