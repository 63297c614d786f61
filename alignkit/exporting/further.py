"""Further steps of ``alignkit export``, after a finished export: a GGUF file, a Modelfile for Ollama, an upload."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.errors import ConfigError
from alignkit.exporting import card, gguf, ollama, push
from alignkit.runs import fingerprints


class Further(NamedTuple):
    """The options of a command."""

    gguf: gguf.Kind | None
    llama_cpp: Path | None
    ollama: bool
    push: str | None
    public: bool

    @property
    def is_asked_for(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.gguf or self.ollama or self.push)

    def check(self, record: Mapping[str, Any]) -> None:
        """Check that it can be done, before anything is exported. ``record`` is the manifest of the run.

        Raises:
            AlignkitError: the run is not a policy, an option has no effect, or the converter or the hub is missing.
        """
        for option, value, needed, given in (
            ("--llama-cpp", self.llama_cpp, "--gguf", self.gguf),
            ("--public", self.public, "--push", self.push),
        ):
            if value and not given:
                raise ConfigError(f"export: {option} has no effect without {needed}")
        if (self.gguf or self.ollama) and record["role"] != "policy":
            option = "--gguf" if self.gguf else "--ollama"
            raise ConfigError(f"export: {option} is for policies. A {record['role']} model has a scalar head")
        if self.gguf:
            gguf.find_converter(self.llama_cpp)
        if self.push:
            push.check(self.push)

    def do(self, folder: Path, say: Callable[[str], None]) -> None:
        """Do it with a finished export.

        Raises:
            AlignkitError: something failed. The export is as it was.
        """
        if self.gguf:
            gguf.write(folder, self.gguf, gguf.find_converter(self.llama_cpp), say)
        if self.ollama:
            written = sorted(folder.glob(f"*-{self.gguf or '*'}.gguf"))
            ollama.write_modelfile(folder, written[0] if written else None, say)
        if self.push:
            address = push.upload(folder, self.push, self.public)
            say(f"{'uploaded':<10} {address} ({'public' if self.public else 'private'})")


def is_export(folder: Path, record: Mapping[str, Any], settings: Mapping[str, str]) -> bool:
    """Whether a folder is the unchanged export of a run with these settings. ``record`` is the manifest of the run."""
    try:
        exported = json.loads((folder / card.FILE).read_text(encoding="utf-8"))
        made_with = {"max_shard_size": "5GB", **exported["export"]}  # earlier versions did not record it
        return (
            exported["run"]["weights"] == record["fingerprints"]["weights"]
            and all(made_with[name] == value for name, value in settings.items())
            and not fingerprints.differences(exported["fingerprints"], fingerprints.of(folder))
        )
    except (OSError, ValueError, TypeError, KeyError):  # no such file, or one that another program wrote
        return False
