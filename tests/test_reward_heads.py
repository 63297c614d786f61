"""A scalar head is opened in fp32, wherever it is opened, and what it scores is what plain Transformers scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from alignkit.cli import main
from alignkit.data.encoding import Branches
from alignkit.models import Member, Roles, Sequences, adapters, pretrained, prompt_trees
from alignkit.runs import manifest


def test_as_many_scores_as_hidden_states(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model: Any = pretrained.load(str(tiny_model("llama")), {"dtype": torch.bfloat16}, head=True)
    torch.manual_seed(0)
    model.score.weight.data.normal_()
    model.save_pretrained(tmp_path)
    opened: Any = adapters.open_run(
        tmp_path, {"role": "reward", "weights": "model", "config": {}, "base": {}}, torch.bfloat16
    )

    assert opened.model.embed_tokens.weight.dtype is torch.bfloat16
    assert torch.equal(opened.score.weight, model.score.weight)
    answers = [Branches([1, 2], [[3, first]]) for first in range(256)]
    inputs = prompt_trees.collate_separate(answers, 0)
    hidden = opened.model(**{n: t for n, t in inputs.items() if n != "ends"}).last_hidden_state[:, -1]
    with torch.no_grad():
        scores = prompt_trees.answer_scores(prompt_trees.with_answer_scores(opened), inputs)
    assert len(hidden.unique(dim=0)) == 256
    assert len(scores.unique()) == 256


@pytest.mark.parametrize("tuner", [("full", "tuner.dtype=bfloat16"), ("lora",)])
def test_a_reward_run_opens_with_the_head_that_it_saved(run_stage: Callable[..., Path], tuner: tuple[str, ...]) -> None:
    folder = run_stage("rm", "--plugin", *tuner, "train.bf16=true")
    saved = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items() if "score" in n}
    opened: Any = adapters.open_run(folder, manifest.read(folder), torch.bfloat16)
    head = (opened.get_base_model() if hasattr(opened, "peft_config") else opened).score

    (weight,) = saved.values()
    assert weight.dtype is torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())
    assert torch.equal(head.weight, weight)


def test_plain_transformers_scores_at_the_end_of_sequence_on_a_policy_that_was_trained_whole(
    run_stage: Callable[..., Path], tmp_path: Path, fp32: None
) -> None:
    """Where the pad token is the end-of-sequence token, the folder's config names none to be skipped."""
    sft = run_stage("sft", "--plugin", "full")
    rm = run_stage("rm", "--plugin", "lora", f"rm.policy={sft}", "train.learning_rate=0.02")
    asked, scored = tmp_path / "asked.jsonl", tmp_path / "scored.jsonl"
    asked.write_text(json.dumps({"prompt": "Why?", "response": "No."}))
    assert main(["score", str(rm), str(asked), "-o", str(scored)]) == 0
    plain = peft.AutoPeftModelForSequenceClassification.from_pretrained(rm, num_labels=1).eval()
    ids = AutoTokenizer.from_pretrained(rm)("User: Why?\nAssistant: No.<eos>", return_tensors="pt")

    assert AutoConfig.from_pretrained(sft).pad_token_id is None
    assert float(plain(**ids).logits) == pytest.approx(json.loads(scored.read_text())["score"], abs=2e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "bloom", "gpt_neox", "gemma2", "qwen3", "mistral"])
def test_scores_are_those_of_plain_transformers(name: str) -> None:
    policy = architectures.build(name, pad_token_id=0, eos_token_id=1)
    model = architectures.scorer(policy)
    prompt, answer = [1, 2, 3], [4, 5, 6]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt + answer])).logits[0, 0]
        members = {"policy": Member(policy), "reward": Member(model, None, model.score)}
        sequences = Sequences.of([prompt, [7]], [answer, [8]], 0, "cpu")
        torch.testing.assert_close(Roles(members)(sequences, ("reward",))["reward"][0], expected)
        inputs = prompt_trees.collate_separate([Branches(prompt, [answer]), Branches([7], [[8]])], 0)
        if name in ("falcon", "bloom"):  # they take no position_ids
            inputs.pop("position_ids")
        torch.testing.assert_close(
            prompt_trees.answer_scores(prompt_trees.with_answer_scores(model), inputs)[0], expected
        )
