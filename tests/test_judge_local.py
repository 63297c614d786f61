"""The judge `local`: log-probabilities of the letters, worked out with plain Transformers."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit import AlignkitError, Question
from alignkit_judges import local, prompts
from alignkit_judges.config import LocalConfig, check_local, identity_of_local

pytestmark = pytest.mark.usefixtures("fp32")


def asked(*answers: str) -> Question:
    return Question([{"role": "user", "content": "What is 2 + 3?"}], answers)


QUESTIONS = [
    asked("It is 5.", "It is 6."),
    asked("It is 6.", "It is 5."),
    asked("A long answer. " * 6, "No."),
    asked("No.", "x" * 40),
]


def judge(model: Path | str, *questions: Question, **settings: Any) -> tuple[list[Any], list[str]]:
    """The verdicts, and the lines that were printed."""
    config, lines = LocalConfig(model=str(model), **settings), list[str]()
    check_local(config)
    run: Any = SimpleNamespace(say=lines.append, device=torch.device("cpu"))
    return list(local.build(config, run)(questions)), lines


def by_hand(folder: Path, question: Question, **template: Any) -> list[float]:
    """The costs of A and B: the model's own chat template, one forward pass of the prompt, all logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = prompts.write(question, prompts.ONE_LETTER, prompts.RUBRIC)
    messages = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", **template)
    with torch.no_grad():
        logps = model(ids["input_ids"]).logits[0, -1].log_softmax(-1)
    return [-logps[tokenizer.convert_tokens_to_ids(letter)].item() for letter in ("A", "B")]


@pytest.fixture
def chat_model(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``chat_model("llama", template)``: a tiny model with a chat template."""

    def make(architecture: str = "llama", template: str = CHATML) -> Path:
        folder = tmp_path / architecture
        shutil.copytree(tiny_model(architecture), folder)
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


CHATML = (
    "{% for m in messages %}{{ '<eos>' + m['role'] + '\\n' + m['content'] + '<eos>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<eos>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_costs_are_the_log_probabilities_of_the_letters(architecture: str, chat_model: Callable[..., Path]) -> None:
    folder = chat_model(architecture)
    costs, _ = judge(folder, *QUESTIONS[:2])

    assert costs == [pytest.approx(by_hand(folder, question), abs=1e-4) for question in QUESTIONS[:2]]
    assert costs[0] != costs[1]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_padding_does_not_change_a_verdict(batch: int, chat_model: Callable[..., Path]) -> None:
    folder = chat_model()
    costs, _ = judge(folder, *QUESTIONS, batch=batch)

    assert costs == [pytest.approx(by_hand(folder, question), abs=1e-4) for question in QUESTIONS]


def test_letters_after_a_space_and_of_several_tokens_are_read_in_their_place(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The plain template ends in "Assistant:", so that the answer is " A"; a tokenizer may split it into two tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "plain"
    shutil.copytree(tiny_model(), folder)  # without a chat template
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [merge for merge in merges if merge not in (["Ġ", "A"], ["Ġ", "B"])]
    file.write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = f"User: {prompts.write(QUESTIONS[0], prompts.ONE_LETTER, prompts.RUBRIC)}\nAssistant:"
    by_letter = {letter: tokenizer(f"{text} {letter}", return_tensors="pt")["input_ids"] for letter in "AB"}
    assert [tokenizer.convert_ids_to_tokens(ids[0, -2:].tolist()) for ids in by_letter.values()] == [
        ["Ġ", "A"],
        ["Ġ", "B"],
    ]
    with torch.no_grad():  # the space is common to both, so only the letters count
        logps = {letter: model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]] for letter, ids in by_letter.items()}

    ((costs,), _) = judge(folder, QUESTIONS[0])
    assert costs == pytest.approx([-logps["A"].item(), -logps["B"].item()], abs=1e-4)


def test_what_a_template_writes_after_an_answer_does_not_count(chat_model: Callable[..., Path]) -> None:
    spaced = CHATML.replace("m['content'] + '<eos>", "m['content'] + ' <eos>")
    folder = chat_model("llama", spaced)

    assert judge(folder, *QUESTIONS[:2])[0] == [pytest.approx(by_hand(folder, q), abs=1e-4) for q in QUESTIONS[:2]]


def test_letters_of_different_lengths_get_their_whole_probability(tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()
    one, two, other = [5, 6, 7], [5, 6, 8, 9], [30, 31, 32, 33, 34, 35]

    with torch.no_grad():
        a, b, c = (model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in (one, two, other))
    expected = [a[1, 7], b[1, 8] + b[2, 9], c[3, 34] + c[4, 35]]
    rows = [(one[:2], one[2:]), (two[:2], two[2:]), (other[:4], other[4:])]
    assert local.answer_logps(model, rows) == pytest.approx([logp.item() for logp in expected], abs=1e-4)


def test_logits_of_a_bf16_model_are_not_rounded(tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.bfloat16).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state.float()
        local.head_in_fp32(model)
        logits = model(ids).logits

    assert logits.dtype == torch.float32
    assert torch.allclose(logits, hidden @ model.lm_head.weight.float().T, atol=1e-6)


def test_a_run_of_an_adapter_judges_with_its_adapter(train: Callable[..., Path]) -> None:
    from peft import AutoPeftModelForCausalLM

    folder = train("--plugin", "lora", "train.max_steps=3", "train.learning_rate=0.05")
    base = json.loads((folder / "alignkit.json").read_text())["base"]["located"]
    merged = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).merge_and_unload()
    plain = folder.parent / "merged"
    merged.save_pretrained(plain)
    for file in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        shutil.copy(file, plain)

    assert judge(folder, *QUESTIONS)[0] == [pytest.approx(costs, abs=1e-3) for costs in judge(plain, *QUESTIONS)[0]]
    assert judge(folder, *QUESTIONS)[0] != [pytest.approx(costs, abs=1e-2) for costs in judge(base, *QUESTIONS)[0]]


def test_a_question_that_is_too_long_has_no_verdict(chat_model: Callable[..., Path]) -> None:
    folder = chat_model()
    costs, lines = judge(folder, QUESTIONS[0], asked("long " * 500, "x"), asked("y", "long " * 500), QUESTIONS[1])

    assert [cost is None for cost in costs] == [False, True, True, False]
    assert costs[3] == pytest.approx(by_hand(folder, QUESTIONS[1]), abs=1e-4)
    assert [line for line in lines if "512" in line] == [
        f"warning: no verdict on questions of more than the 512 tokens that {folder} reads"
    ]


def test_a_model_that_answers_otherwise_is_reported(chat_model: Callable[..., Path]) -> None:
    folder = chat_model()
    costs, lines = judge(folder, *QUESTIONS)
    mean = sum(math.exp(-cost) for pair in costs for cost in pair) / len(QUESTIONS)

    assert lines == [
        f"warning: {folder} gives A and B together a probability of only {mean:.2g}: its verdicts may mean little"
    ]


def test_a_model_that_was_trained_to_judge_prefers_what_it_was_trained_for(chat_model: Callable[..., Path]) -> None:
    """It learns to choose the answer with the word "Yes", wherever it stands."""
    from transformers import AutoModelForCausalLM

    from alignkit.data import encode_answer, load_tokenizer

    folder = chat_model()
    tokenizer = load_tokenizer(str(folder), None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for step in range(60):
        rows = []
        for n in range(8):
            good = (step * 8 + n) % 2
            question = asked(*(("Yes." if slot == good else "No.") + f" {step} {n}" for slot in (0, 1)))
            text = prompts.write(question, prompts.ONE_LETTER, prompts.RUBRIC)
            rows.append(encode_answer(tokenizer, [{"role": "user", "content": text}], "AB"[good], [0])[0][:-1])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        last = torch.tensor([len(row) - 1 for row in rows])
        logits = model(ids).logits[torch.arange(8), last - 1]
        loss = torch.nn.functional.cross_entropy(logits, ids[torch.arange(8), last])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    costs, lines = judge(folder, asked("Yes. x", "No. y"), asked("No. y", "Yes. x"))
    assert lines == []
    assert costs[0][0] < costs[0][1]
    assert costs[1][0] > costs[1][1]


def test_verdicts_are_stored_under_the_weights_and_the_prompts(
    chat_model: Callable[..., Path], train: Callable[..., Path], tmp_path: Path
) -> None:
    folder = chat_model()
    config = LocalConfig(model=str(folder))
    before = identity_of_local(config)
    shutil.copytree(folder, tmp_path / "copy")
    run = train("--plugin", "lora", "train.max_steps=1")
    of_run = identity_of_local(LocalConfig(model=str(run)))

    assert identity_of_local(LocalConfig(model=str(tmp_path / "copy"), batch=1)) == before
    assert identity_of_local(dataclasses.replace(config, principles=["p"])) != before
    assert of_run not in (before, None)
    assert identity_of_local(LocalConfig(model="someone/not-on-this-machine")) is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "judge 'local' needs judge.model"),
        ("./nowhere", "no model folder ./nowhere"),
        ("RM", "is a reward model"),
    ],
)
def test_a_model_that_cannot_judge_is_refused_before_it_is_loaded(
    model: str | None, message: str, train_rm: Callable[..., Path]
) -> None:
    named = str(train_rm("--plugin", "lora", "train.max_steps=1")) if model == "RM" else model
    with pytest.raises(AlignkitError, match=message):
        check_local(LocalConfig(model=named))
