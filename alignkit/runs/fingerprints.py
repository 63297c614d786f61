"""Hashes of model folders. They tell in milliseconds, and without torch, whether two models are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError
from alignkit.runs import record

_SAMPLES = 64  # positions that are read per weight file
_SAMPLE_BYTES = 4096
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model")
_NOT_READ = (
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "architectures",
    "use_cache",
    "pad_token_id",
)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def of(folder: Path) -> dict[str, Any]:
    """Fingerprints of the weights, config, tokenizer, chat template and special tokens of a model folder.

    Raises:
        AlignkitError: its chat template is not a text.
    """
    settings = _json(folder / "tokenizer_config.json")
    vocabularies = [(folder / name).read_bytes() for name in _VOCABULARIES if (folder / name).exists()]
    template_file = folder / "chat_template.jinja"
    try:
        template = (
            template_file.read_text(encoding="utf-8") if template_file.exists() else settings.get("chat_template")
        )
    except UnicodeDecodeError as error:
        raise AlignkitError(f"cannot read {template_file}: {error}") from None
    special = {name: settings.get(name) for name in _SPECIAL}
    return {
        "weights": weights(folder),
        "config": config(folder),
        "tokenizer": hashlib.sha256(b"".join(vocabularies)).hexdigest() if vocabularies else None,
        "chat_template": text(template if isinstance(template, str) else json.dumps(template)) if template else None,
        "special_tokens": {k: v.get("content") if isinstance(v, dict) else v for k, v in special.items()},
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The differences between two results of :func:`of`, as text. ``a`` may be of a version without ``config``."""
    differing = ["weights"] if a["weights"] != b["weights"] else []
    differing += ["config.json"] if a.get("config", b["config"]) != b["config"] else []
    return differing + differences_of_tokens(a, b)


def differences_of_tokens(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Like :func:`differences`, of how text becomes tokens: the tokenizer, chat template and special tokens."""
    names = {"tokenizer": "tokenizer", "chat_template": "chat template"}
    differing = [name for key, name in names.items() if a[key] != b[key]]
    differing += [
        f"{name} ({a['special_tokens'].get(name)!r}, {b['special_tokens'].get(name)!r})"
        for name in _SPECIAL
        if a["special_tokens"].get(name) != b["special_tokens"].get(name)
    ]
    return differing


def weights(folder: Path) -> str | None:
    """A hash of the weights in a model folder: the name, dtype and shape of every tensor, and a sample of the bytes.

    It reads 256 KiB per file, so it takes milliseconds for a model of any size. Training changes some of the sampled
    bytes. A copy or a download of the same files has the same fingerprint. None if there are no weights.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                header = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(header, size)))
            for sample in range(_SAMPLES):
                file.seek(sample * size // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def config(folder: Path) -> str | None:
    """A hash of the ``config.json`` of a model folder, without the settings that training does not read.

    None if there is none.
    """
    settings = _json(folder / "config.json")
    read = {key: value for key, value in settings.items() if key not in _NOT_READ}
    return text(json.dumps(read, sort_keys=True)) if settings else None


def text(content: str) -> str:
    """The hash of a text."""
    return hashlib.sha256(content.encode()).hexdigest()


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(record.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not the file of a tokenizer
        return {}
