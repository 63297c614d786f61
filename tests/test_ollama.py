"""The Modelfile: what Ollama would render is what the chat template renders, or it is said that it is not."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from go_templates import render as render_go

from alignkit.exporting import go_template, ollama

TEMPLATES = sorted(Path(str(importlib.util.find_spec("trl").origin)).parent.glob("chat_templates/*.jinja"))  # type: ignore[union-attr]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGED = (  # the system prompt is a part of the first user turn, as in Llama 2
    "{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "[INST] {{ (system if loop.first else '') + m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)


def conversations(system: bool) -> list[list[dict[str, str]]]:
    user, answer = {"role": "user", "content": 'Say "hi" to {{ me }}.\nNow.'}, {"role": "assistant", "content": "hi"}
    asked = [[user], [user, answer, user], [user, answer, user, answer, user]]
    return asked + [[{"role": "system", "content": "Be brief."}, *each] for each in asked if system]


@pytest.fixture
def export(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``export(template)``: a folder like that of an export, with this chat template."""

    def make(template: str, generation: dict[str, Any] | None = None, **tokens: str) -> Path:
        from transformers import AutoTokenizer

        folder = tmp_path / "export"
        shutil.copytree(tiny_model(), folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, **tokens)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        eos = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, **(generation or {})}))
        return folder

    return make


def modelfile(folder: Path, weights: Path | None = None) -> tuple[str, list[str]]:
    """The content of the Modelfile, and what was printed."""
    lines: list[str] = []
    return ollama.write_modelfile(folder, weights, lines.append).read_text(), lines


def test_ollama_gets_the_prompts_stop_tokens_and_sampling_of_the_export(export: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    folder = export(CHATML)
    written, notes = modelfile(folder, folder / "export-q8_0.gguf")
    (template,) = re.findall(r'^TEMPLATE """(.*?)"""$', written, re.M | re.S)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert notes == []
    for each in conversations(system=True):
        expected = tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True)
        assert render_go(template, each) == expected
    assert written.startswith("FROM ./export-q8_0.gguf\n")
    assert re.findall(r"^PARAMETER stop (.*)$", written, re.M) == ['"<eos>"', '"<|im_end|>"']
    parameters = dict(re.findall(r"^PARAMETER (\w+) ([\d.]+)$", written, re.M))
    assert parameters == {"temperature": "1", "top_k": "0", "top_p": "1", "min_p": "0", "repeat_penalty": "1"}


def test_the_sampling_of_a_generation_config_is_kept(export: Callable[..., Path]) -> None:
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}
    written, _ = modelfile(export(CHATML, sampling))

    parameters = dict(re.findall(r"^PARAMETER (\w+) ([\d.]+)$", written, re.M))
    assert parameters == {"temperature": "0.7", "top_k": "50", "top_p": "0.8", "min_p": "0", "repeat_penalty": "1.1"}
    assert written.startswith("FROM .\n")


def test_what_of_a_chat_template_is_not_carried_over_is_printed_and_written(export: Callable[..., Path]) -> None:
    written, notes = modelfile(export(MERGED))

    assert "TEMPLATE" not in written
    assert len(notes) == 1
    assert "the chat template is not carried over" in notes[0]
    assert f"# {notes[0].removeprefix('Modelfile: ')}" in written


def test_a_token_that_the_runtime_puts_first_is_not_written_twice(
    export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = export("{{ bos_token }}" + CHATML, bos_token="<eos>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, _ = modelfile(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    tokenizer.save_pretrained(folder)
    after, _ = modelfile(folder)

    assert before.count('{{ "<eos><|im_start|>system') == 2  # a default system prompt, and a given one
    assert '{{ "<eos>' not in after


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_many_families_are_rendered_exactly_or_left_out(template: Path, tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, bos_token="<bos>")
    tokenizer.chat_template = template.read_text(encoding="utf-8")

    def render(messages: Any, generation_prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))

    fixed = go_template.turns(render)
    # the others write parts of images, or the system prompt into the first turn of the user
    assert (fixed is None) == template.stem.startswith(("gemma3", "idefics3", "llava_next", "smolvlm"))
    if fixed is None:
        return
    for each in conversations(system=fixed.system is not None):
        assert render_go(fixed.write(), each) == render(each, True)
