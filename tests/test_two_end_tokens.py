"""A chat template that writes two end tokens, as Phi-3's: training, sampling and scoring end an answer at one place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.cli import main

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
ANSWERS = ["It is 4.", "I know not.", "No.", "Count on! Count on!"]

# It "samples" fixed answers as a policy would that has learned the template: up to the first token that stops it.
PARROT = f"""
    import itertools

    from alignkit import Rollout, hookimpl

    def build(config, tokenizer, sampling):
        def ids(text):
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            return whole[: 1 + next(i for i, token in enumerate(whole) if token in sampling.stop_ids)]

        answers = itertools.cycle([ids(text + "<|end|>\\n<eos>") for text in {ANSWERS}])
        return lambda policy, prompts: list(itertools.islice(answers, len(prompts)))

    @hookimpl
    def alignkit_rollout():
        return [Rollout(name="parrot", summary="fixed answers", build=build)]
"""


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "two-ends")
    AutoModelForCausalLM.from_pretrained(tiny_model()).save_pretrained(tmp_path / "two-ends")
    return tmp_path / "two-ends"


def test_the_score_in_ppo_is_that_of_the_command_line_and_of_plain_peft(
    install: Callable[..., None], run_stage: Callable[..., Path], model: Path, tmp_path: Path, fp32: None
) -> None:
    install("parrot", PARROT)
    small = ["ppo.batch_size=2", "ppo.minibatches=1", "ppo.response_length=16"]
    more = ["--model", str(model), "--plugin", "lora", "rm.train.learning_rate=0.02"]
    ppo = run_stage("ppo", "--plugin", "parrot", *more, *small)
    rm = ppo.parent / "rm"

    rows = [json.loads(line) for line in (ppo / "answers.jsonl").read_text().splitlines()]
    assert {row["answer"] for row in rows} == set(ANSWERS)
    asked, scored = tmp_path / "asked.jsonl", tmp_path / "scored.jsonl"
    asked.write_text("".join(json.dumps({"prompt": row["prompt"], "response": row["answer"]}) + "\n" for row in rows))
    assert main(["score", str(rm), str(asked), "-o", str(scored)]) == 0

    scores = [row["score"] for row in rows]
    assert scores == pytest.approx([json.loads(line)["score"] for line in scored.read_text().splitlines()], abs=2e-4)
    assert scores == pytest.approx(plain(rm, rows), abs=2e-4)


@torch.no_grad()
def plain(rm: Path, rows: list[dict[str, Any]]) -> list[float]:
    """The score at ``<|end|>``, the first token that stops an answer."""
    import peft
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(rm)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(rm, num_labels=1).eval()
    found = []
    for row in rows:
        text = f"<|user|>\n{row['prompt']}<|end|>\n<|assistant|>\n{row['answer']}<|end|>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        found.append(float(model(**ids).logits))
    return found
