"""Writes a Modelfile for Ollama into a finished export."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignkit.exporting import go_template
from alignkit.runs import manifest

FILE = "Modelfile"

# what a Jinja template may depend on and a Go template of fixed texts does not -> how to recognize it
LEFT_OUT = {
    "tools": r"\btools\b",
    "documents": r"\bdocuments\b",
    "the switch for thinking": r"\benable_thinking\b",
    "the date": r"\bstrftime_now\b|\bdate_string\b",
}


def write_modelfile(folder: Path, weights: Path | None, say: Callable[[str], None]) -> Path:
    """Write a Modelfile: the weights, the chat template, the tokens that end an answer, and how answers are sampled.

    Args:
        folder: a finished export of a policy.
        weights: a GGUF file in the folder. None: Ollama converts the safetensors itself.
        say: prints what of the chat template is not carried over.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    template, left_out = _template(tokenizer)
    for note in left_out:
        say(f"{FILE}: {note}")
    eos = generation["eos_token_id"]
    stops = [tokenizer.decode([token]) for token in (eos if isinstance(eos, list) else [eos])]
    lines = [
        *(f"# {note}" for note in left_out),
        f"FROM ./{weights.name}" if weights else "FROM .",
        *([f'TEMPLATE """{template}"""'] if template else []),
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
        *(f"PARAMETER {name} {value:g}" for name, value in _sampling(generation).items()),
    ]
    manifest.write_atomically(folder / FILE, "\n".join(lines) + "\n")
    return folder / FILE


def _template(tokenizer: Any) -> tuple[str | None, list[str]]:
    """The chat template for Ollama, if there is one, and what is not carried over."""

    def render(messages: Any, generation_prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))

    fixed = go_template.turns(render)
    if fixed is None:
        return None, [
            "the chat template is not carried over, since it does not write fixed text around each turn. Ollama uses "
            "its own template if it recognizes the model. Compare its prompts with the chat template"
        ]
    notes = [
        f"{what}, which the chat template handles, are not carried over"
        for what, pattern in LEFT_OUT.items()
        if re.search(pattern, tokenizer.chat_template)
    ]
    if fixed.system is None:
        notes.append("the chat template has no system prompt, so Ollama ignores one")
    if not go_template.keeps_white_space(fixed, render):
        notes.append("the chat template removes white space around messages, and Ollama does not")
    bos = tokenizer.bos_token
    if bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        fixed = fixed.without_bos(bos)
    return fixed.write(), notes


def _sampling(generation: dict[str, Any]) -> dict[str, float]:
    """Ollama's parameters for the sampling of a generation config.

    Without settings, answers are sampled from the policy's own distribution, as they were in training. Ollama's own
    defaults are others.
    """
    top_k = 50 if generation.get("do_sample") else 0  # Transformers' default, or no limit
    defaults = {"temperature": 1.0, "top_k": top_k, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    names = {"repetition_penalty": "repeat_penalty"}
    values = {name: generation.get(name) if generation.get("do_sample") else None for name in defaults}
    return {names.get(name, name): defaults[name] if value is None else value for name, value in values.items()}
