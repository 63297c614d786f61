"""What a model folder holds, as hashes: enough to tell, without torch and in milliseconds, that two are the same."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

_SAMPLES = 64  # places per weight file that are read
_SAMPLE_BYTES = 4096
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def of(folder: Path) -> dict[str, Any]:
    """Fingerprints of the weights, the tokenizer, the chat template and the special tokens in a model folder."""
    config = _json(folder / "tokenizer_config.json")
    vocabularies = [(folder / name).read_bytes() for name in _VOCABULARIES if (folder / name).exists()]
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.exists() else config.get("chat_template")
    special = {name: config.get(name) for name in _SPECIAL}
    return {
        "weights": weights(folder),
        "tokenizer": hashlib.sha256(b"".join(vocabularies)).hexdigest() if vocabularies else None,
        "chat_template": text(template if isinstance(template, str) else json.dumps(template)) if template else None,
        "special_tokens": {k: v["content"] if isinstance(v, dict) else v for k, v in special.items()},
    }


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs between two results of :func:`of`, in words."""
    words = {"weights": "weights", "tokenizer": "tokenizer", "chat_template": "chat template"}
    found = [word for key, word in words.items() if a[key] != b[key]]
    found += [
        f"{name} ({a['special_tokens'].get(name)!r}, {b['special_tokens'].get(name)!r})"
        for name in _SPECIAL
        if a["special_tokens"].get(name) != b["special_tokens"].get(name)
    ]
    return found


def weights(folder: Path) -> str | None:
    """A hash of the weights in a model folder: every tensor's name, type and shape, and bytes sampled all over.

    It reads 256 KiB a file, so that it costs milliseconds for any size of model. Training changes some of the
    sampled places; a copy or a download of the same files has the same fingerprint. None where there are no weights.
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
                (header,) = struct.unpack("<Q", file.read(8))
                digest.update(file.read(header))
            for place in range(_SAMPLES):
                file.seek(place * size // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def text(content: str) -> str:
    """A hash of a text."""
    return hashlib.sha256(content.encode()).hexdigest()


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
