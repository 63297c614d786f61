"""A classifier as the reward: which logit, which head, in which precision, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reward_runs import PROMPTS, TEXTS, answers_of, plain_scores, refused, run_of

from alignkit import ConfigError
from alignkit_rewards import classify


def classifier_at(folder: str, base: Path, labels: list[str], **more: Any) -> Any:
    """A classifier of random weights with these labels, saved beside its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    names = dict(enumerate(labels))
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=names, num_labels=len(labels), **more)
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return model.eval()


def logits(model: Any, folder: str) -> torch.Tensor:
    """[B, labels] of plain Transformers, an answer at a time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [f"{prompt}\n{text}" for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


@pytest.mark.parametrize("label", ["POSITIVE", "1"])
def test_a_classifiers_score_is_the_logit_of_the_label_that_is_named(
    reward_runs: Path, label: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = classifier_at("judge", reward_runs / "base", ["NEGATIVE", "POSITIVE"])
    run, score = run_of("lora", "reward.name=classifier", "reward.model=judge", f"reward.label={label}")

    assert score(answers_of(run)) == pytest.approx(logits(model, "judge")[:, 1].tolist(), abs=1e-5)
    assert "score: logit of label 'POSITIVE' (1) of judge" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "label", "said"),
    [
        (
            "judge",
            None,
            "has 2 labels: set reward.label to the one that is the score: NEGATIVE (0), POSITIVE (1)",
        ),
        ("judge", "POSITVE", "judge has no label POSITVE. Did you mean 'POSITIVE'? Labels: NEGATIVE (0), POSITIVE (1)"),
        ("judge", "2", "judge has no label 2. Labels: NEGATIVE (0), POSITIVE (1)"),
        ("base", None, "base is a language model (LlamaForCausalLM) without a trained score head"),
        ("./nowhere", None, "reward.model: no folder ./nowhere"),
    ],
)
def test_a_classifier_is_checked_before_anything_is_trained(
    reward_runs: Path, model: str, label: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier_at("judge", reward_runs / "base", ["NEGATIVE", "POSITIVE"])
    named = [] if label is None else [f"reward.label={label}"]

    assert said in refused(capsys, "reward.name=classifier", f"reward.model={model}", *named)


def test_a_classifier_without_its_heads_weights_is_refused(reward_runs: Path) -> None:
    """Transformers would make the head up, and PPO would train against noise."""
    from transformers import AutoModelForCausalLM

    shutil.copytree("base", "headless")
    AutoModelForCausalLM.from_pretrained("base").save_pretrained("headless")
    facts = json.loads(Path("headless/config.json").read_text())
    facts |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "id2label": {"0": "GOOD"}}
    Path("headless/config.json").write_text(json.dumps(facts))

    with pytest.raises(ConfigError, match=r"headless is not a trained classifier: its files lack score\.weight"):
        run_of("lora", "reward.name=classifier", "reward.model=headless")


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_reward_run_as_a_classifier_scores_where_it_was_trained_to(reward_runs: Path, tuner: str) -> None:
    """At the token that ends the answer, not at what the template writes after it."""
    run, score = run_of("lora", "reward.name=classifier", f"reward.model={tuner}-a/rm")
    answers = answers_of(run)

    assert score(answers) == pytest.approx(plain_scores(f"{tuner}-a/rm", answers), abs=1e-4)


def test_a_classifier_reads_an_end_of_sequence_that_is_its_pad_token_too(reward_runs: Path) -> None:
    from transformers import AutoTokenizer

    model = classifier_at("judge", reward_runs / "base", ["GOOD"])
    tokenizer = AutoTokenizer.from_pretrained("judge")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    tokenizer.save_pretrained("judge")
    run, score = run_of("lora", "reward.name=classifier", "reward.model=judge")
    texts = [f"{prompt}<eos>{text}<eos>" for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]

    assert score(answers_of(run)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_an_adapter_is_a_classifier_where_its_head_was_saved_with_it(reward_runs: Path, task: str | None) -> None:
    """Without a task, PEFT saves the adapter alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    model = get_peft_model(base, LoraConfig(task_type=task, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained("adapter")
    settings = ["reward.name=classifier", "reward.model=adapter", "reward.label=2"]

    if task is None:
        with pytest.raises(ConfigError, match=r"adapter is not a trained classifier: its files lack score\.weight"):
            run_of("lora", *settings)
        return
    run, score = run_of("lora", *settings)
    assert score(answers_of(run)) == pytest.approx(logits(model.eval(), "base")[:, 2].tolist(), abs=1e-5)


def test_the_head_of_a_bf16_classifier_computes_in_fp32(reward_runs: Path) -> None:
    """In bf16 close scores would become the same."""
    model = classifier_at("half", reward_runs / "base", ["GOOD"], dtype=torch.bfloat16)
    run, score = run_of("lora", "reward.name=classifier", "reward.model=half", "reward.batch=1")
    scores = score(answers_of(run))
    model.score.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))

    assert scores == pytest.approx(logits(model, "half")[:, 0].tolist(), abs=1e-6)
    assert any(torch.tensor(one).bfloat16().item() != one for one in scores)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_head_saved_in_fp32_is_not_rounded_beside_a_bf16_trunk(reward_runs: Path, adapter: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    classifier_at("half", reward_runs / "base", ["GOOD"], dtype=torch.bfloat16)
    model: Any = AutoModelForSequenceClassification.from_pretrained(Path("half").absolute(), dtype="auto")
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    head = next(p for name, p in model.named_parameters() if "score" in name and "original" not in name)
    head.data = torch.randn(head.shape)
    model.save_pretrained("judge" if adapter else "half")
    run: Any = SimpleNamespace(say=print, device="cpu")
    opened, _ = classify.load("judge" if adapter else "half", run)

    assert opened.get_input_embeddings().weight.dtype is torch.bfloat16
    assert any(torch.equal(p, head) for name, p in opened.named_parameters() if "score" in name)


def test_prompts_that_a_classifier_cannot_read_are_named_before_the_start(
    reward_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    classifier_at("short", reward_runs / "base", ["GOOD"])
    tokenizer = AutoTokenizer.from_pretrained("short")
    most = max(len(tokenizer(f"{prompt}\n")["input_ids"]) for prompt in PROMPTS)
    tokenizer.model_max_length = most + 5
    tokenizer.save_pretrained("short")
    settings = ["reward.name=classifier", "reward.model=short", "ppo.response_length"]
    run_of("lora", *settings[:2], "ppo.response_length=5")
    assert "warning" not in capsys.readouterr().out
    run_of("lora", *settings[:2], "ppo.response_length=6")
    said = f"takes up to {most + 5} tokens; the longest prompt has {most}, and answers have up to 6"
    assert said in capsys.readouterr().out
    tokenizer.model_max_length = most
    tokenizer.save_pretrained("short")
    with pytest.raises(ConfigError, match=f"takes up to {most} tokens, and the longest prompt alone has {most}"):
        run_of("lora", *settings[:2])
