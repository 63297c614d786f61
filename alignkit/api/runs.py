"""Finished runs in Python. No torch here until a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit import paths
from alignkit.api import libraries
from alignkit.api.settings import FilePath, PluginLike, plugin_names
from alignkit.errors import ConfigError
from alignkit.registry.checks import shown
from alignkit.runs import answers, lineage, manifest
from alignkit.runs.answers import Answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelAndTokenizer(NamedTuple):
    """A model in memory, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class FinishedRun:
    """A finished run: what :func:`alignkit.train` and :func:`alignkit.load` return."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._absolute = folder, folder.absolute()
        self.manifest: dict[str, Any] = manifest.read(folder)  # the content of `alignkit.json`

    @property
    def folder(self) -> Path:
        """Its folder, as it was given; the absolute path after a change of the current folder."""
        return self._folder if self._folder.absolute() == self._absolute else self._absolute

    @property
    def stage(self) -> str:
        """The name of its stage."""
        return str(self.manifest["stage"])

    @property
    def metrics(self) -> dict[str, float]:
        """Its metrics: ``train_loss``, and ``eval_...`` and ``first_eval_...`` on held-out rows after and before it."""
        return dict(self.manifest["metrics"])

    def answers(self) -> list[Answers]:
        """The answers to held-out prompts at each evaluation: ``step``, ``prompts``, ``answers`` and ``columns``.

        ``columns`` are metrics of each answer, such as ``score``. Empty if the stage samples no answers.

        Raises:
            AlignkitError: another run has taken its place.
        """
        self._check_unchanged()
        return answers.read(self.folder)

    def model(self) -> ModelAndTokenizer:
        """Load its model, a PEFT or Transformers model in evaluation mode, and its tokenizer.

        The model is on the accelerator if there is one. A reward model returns its normalized score as logits [B, 1].

        Raises:
            AlignkitError: its base, or the plugin of its tuner, is not on this machine; or its base has changed; or
                another run has taken its place.
        """
        self._check_unchanged()
        with libraries.prepared():
            return _load_model(self.folder, self.manifest)

    def _check_unchanged(self) -> None:
        if manifest.read(self.folder) != self.manifest:
            raise ConfigError(
                f"{self.folder} has been trained again. Load it again: alignkit.load({str(self.folder)!r})"
            )

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return f"FinishedRun({str(self.folder)!r}, stage {self.stage}, {self.manifest['steps']} steps)"


def _load_model(folder: Path, record: dict[str, Any]) -> ModelAndTokenizer:
    from alignkit.data.chat_template import tokenizer_of_run
    from alignkit.generation.chat import ModelSource, open_model
    from alignkit.models import adapters, device_and_dtype

    if record["role"] == "policy":
        opened = open_model(ModelSource(str(folder), record))
        return ModelAndTokenizer(opened.model, opened.tokenizer)
    if record["weights"] == "adapter":
        lineage.tuner(record)
    model: Any = adapters.open_run(folder, record, device_and_dtype.dtype_of_run(record))
    model.to(device_and_dtype.run_device({}))
    return ModelAndTokenizer(model, tokenizer_of_run(folder, record))


def load(run: FilePath, *, plugins: Iterable[PluginLike] = ()) -> FinishedRun:
    """The finished run in a folder, such as ``"runs/ppo"``.

    ``plugins`` are those that it was trained with and that no distribution provides, such as a tuner of a notebook.

    Raises:
        ConfigError: the folder is not a finished run.
        AlignkitError: its manifest cannot be read, or is of another version of alignkit.
    """
    plugin_names(plugins)
    if not isinstance(run, str | os.PathLike):
        raise ConfigError(f"load takes a run or its folder, not {shown(run)}")
    folder = paths.expand(run)
    if not manifest.is_run(folder):
        raise lineage.not_a_run("load", os.fspath(run))
    return FinishedRun(folder)
