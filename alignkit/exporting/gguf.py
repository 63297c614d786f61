"""Converts a finished export to GGUF by llama.cpp's converter, and checks the file with Transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from alignkit import data
from alignkit.batches import Sampling
from alignkit.errors import AlignkitError, ConfigError, one_line
from alignkit.evaluation import comparison
from alignkit.exporting import comparing
from alignkit.exporting.comparing import NEW_TOKENS, TEXTS, Difference, Text
from alignkit.runs import base

Kind = Literal["q8_0", "f16", "bf16"]

CONVERTER = "convert_hf_to_gguf.py"
PROMPTS = "bundled:prompts"
# The largest KL, in nats per token, that rounding the weights of the export explains. A wrong conversion is far above.
MAX_KL = {"q8_0": 2e-2, "f16": 1e-3, "bf16": 1e-3}


def find_converter(llama_cpp: Path | None) -> Path:
    """The converter in a folder of llama.cpp, or else on the PATH.

    Raises:
        ConfigError: there is none, or it needs the package ``gguf``, which is not installed.
    """
    if llama_cpp is not None:
        converter = llama_cpp / CONVERTER
        if not converter.is_file():
            raise ConfigError(f"--llama-cpp {llama_cpp}: there is no {CONVERTER} in it")
    else:
        on_path = shutil.which(CONVERTER)
        if on_path is None:
            raise ConfigError(
                f"--gguf needs llama.cpp's {CONVERTER}, which is not on the PATH. Clone "
                "https://github.com/ggml-org/llama.cpp and name its folder with --llama-cpp"
            )
        converter = Path(on_path)
    if importlib.util.find_spec("gguf") is None:  # Transformers reads the file back with it
        raise ConfigError("--gguf needs the package gguf, which is not installed: pip install gguf")
    return converter


def write(folder: Path, kind: Kind, converter: Path, say: Callable[[str], None]) -> Path:
    """Write ``NAME-KIND.gguf`` into the finished export of a policy, where NAME is the folder's name.

    The file is read back with Transformers and compared with the export on greedy answers of the export.

    Args:
        folder: the export.
        kind: the format of the weights. Vectors, such as those of norms, stay in fp32.
        converter: the result of :func:`find_converter`.
        say: prints how the file differs from the export.

    Raises:
        AlignkitError: the converter failed, or the file differs from the export by more than rounding explains. The
            export is left as it was.
    """
    file = folder / f"{folder.name}-{kind}.gguf"
    unfinished = file.with_name(f".{file.name}")
    try:
        _convert(folder, kind, converter, unfinished)
        difference = _compare(folder, kind, unfinished)
        if not (difference.kl is not None and difference.kl <= MAX_KL[kind]):
            raise AlignkitError(
                f"the file that {converter} wrote differs from the export: KL {difference.kl:.2g} per token, where "
                f"{kind} explains {MAX_KL[kind]:.0e}. It was deleted. Update llama.cpp"
            )
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    say(f"{'gguf':<10} {file}, {file.stat().st_size / 1e6:,.0f} MB")
    say(f"{'compared':<10} {comparing.describe(difference, 'bundled prompts')}")
    return file


def _convert(folder: Path, kind: Kind, converter: Path, file: Path) -> None:
    words = [sys.executable, str(converter), str(folder), "--outfile", str(file), "--outtype", kind]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode or not file.is_file():
        printed = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = printed[-1] if printed else f"exit status {done.returncode}"
        raise AlignkitError(f"{converter} failed: {reason}. The export in {folder} is complete without a GGUF file")


def _compare(folder: Path, kind: Kind, file: Path) -> Difference:
    """The difference between a GGUF file and the export that it was made from.

    Raises:
        AlignkitError: it has another chat template, or it cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from alignkit.data.chat_template import load_tokenizer
    from alignkit.generation import sample

    tokenizer = load_tokenizer(str(folder), None)
    export = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    prompts = [data.prompt_ids(tokenizer, prompt) for prompt in comparison.prompts_of(PROMPTS, [], TEXTS).prompts]
    stop_ids = tuple(base.stop_ids(str(folder), tokenizer))
    answers = sample(export, tokenizer, prompts, Sampling(NEW_TOKENS, 0.0, stop_ids), say=lambda line: None)
    texts = [Text(*pair) for pair in zip(prompts, answers, strict=True)]
    of_export = comparing.outputs(export, texts)
    del export  # one model is in memory at a time
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16  # fp16 has more than the 8 bits of q8_0
    try:
        template = _chat_template(file)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its progress bar
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
            ).eval()
    except Exception as error:  # a damaged file raises many kinds
        raise AlignkitError(f"the converter wrote a file that cannot be read: {one_line(error)}") from error
    if template != tokenizer.chat_template:
        raise AlignkitError("the converter did not write the chat template of the export. Update llama.cpp")
    return comparing.difference(of_export, comparing.outputs(model, texts))


def _chat_template(file: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.chat_template")
    return str(field.contents()) if field else None
