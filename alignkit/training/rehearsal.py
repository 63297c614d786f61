"""What can fail when a run is saved is tried before it trains: a run must not be lost after its last step."""

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
    """Write everything but the weights into a temporary folder, and look whether the disk has room for them.

    A generation config that Transformers refuses to save is mended where that is possible.

    Raises:
        AlignkitError: the result could not be saved.
    """
    saved = list(_saved(trainer.accelerator.unwrap_model(trainer.model)))
    for model in saved:
        if not _is_adapter(model) and model.can_generate():
            mend_generation_config(model, run.say)
    if not trainer.is_world_process_zero():
        return
    with tempfile.TemporaryDirectory(dir=run.folder) as folder:
        try:
            json.dumps(run.config.to_dict())
            run.tokenizer.save_pretrained(folder)
            for model in saved:
                _save_configs(model, folder)
        except Exception as error:  # whatever it is, it would come after the last step
            raise AlignkitError(f"the trained model could not be saved: {one_line(error)}") from error
    needed = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    check_disk(run.folder, needed)


def _is_adapter(model: Any) -> bool:
    import peft

    return isinstance(model, peft.PeftModel)


def _saved(module: Any) -> Iterator[Any]:
    """The models in a module that have a ``save_pretrained`` of their own, the outermost ones."""
    import transformers

    if _is_adapter(module) or isinstance(module, transformers.PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _saved(child)


def _save_configs(model: Any, folder: str) -> None:
    if _is_adapter(model):
        for config in model.peft_config.values():
            config.save_pretrained(folder)
        return
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def mend_generation_config(model: Any, say: Callable[[str], None]) -> None:
    """Make the model's generation config one that Transformers saves, and say so.

    Some published ones have a temperature without ``do_sample``, without which it has no effect; ``do_sample=True``
    then is what Transformers recommends.

    Raises:
        AlignkitError: that does not help.
    """
    config = model.generation_config
    try:
        config.validate(strict=True)
        return
    except ValueError:
        former, config.do_sample = config.do_sample, True
    try:
        config.validate(strict=True)
    except ValueError as error:
        config.do_sample = former
        raise AlignkitError(
            f"the generation config of {model.name_or_path} is invalid and cannot be saved: {one_line(error)}. Correct "
            "its generation_config.json"
        ) from error
    say(
        f"the generation config of {model.name_or_path} has settings of sampling without do_sample: do_sample is set "
        "to true in what is saved"
    )


def check_disk(folder: Path, needed: int) -> None:
    """Whether the disk of a folder has room for ``needed`` bytes.

    Raises:
        AlignkitError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise AlignkitError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, and what is trained takes {needed / 1e9:.1f} GB: make "
            "room, or choose another --output"
        )
