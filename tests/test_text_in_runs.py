"""What becomes of conversations in whole runs: dates, special tokens, bad rows, and what the model cannot read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.runs import manifest

DATED = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"


def rows(file: Path, *made: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return str(file)


def test_a_run_keeps_its_day_when_resumed_and_hands_it_on(
    run_stage: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dated.jinja").write_text(DATED, encoding="utf-8")
    asked = ("--plugin", "full", f"chat_template={tmp_path / 'dated.jinja'}", "train.save_steps=1")

    def killed(*arguments: Any) -> None:
        raise KeyError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("alignkit.training.run.today", lambda: "2026-01-01")
        patch.setattr("alignkit.training.execution.save", killed)
        with pytest.raises(AssertionError, match="killed"):
            run_stage("sft", *asked)
    monkeypatch.setattr("alignkit.training.run.today", lambda: "2026-01-02")
    sft = run_stage("sft", *asked, "--resume")
    dpo = run_stage("dpo", *asked, f"dpo.policy={sft}")

    assert manifest.read(sft)["today"] == "2026-01-01"
    assert manifest.read(dpo)["today"] == "2026-01-01"
    from alignkit.data.chat_template import prompt_ids, tokenizer_of_run

    tokenizer = tokenizer_of_run(sft, manifest.read(sft))
    assert tokenizer.decode(prompt_ids(tokenizer, [{"role": "user", "content": "Hi"}])).startswith("01 Jan 2026 ")


def test_a_token_without_an_embedding_is_reported_with_both_numbers(
    run_stage: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(tiny_model(), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<tool_{n}>" for n in range(100)])
    tokenizer.save_pretrained(model)
    data = rows(tmp_path / "tools.jsonl", *({"prompt": f"Use {n}", "response": f"<tool_{80 + n}>"} for n in range(8)))

    message = r"tools.jsonl line \d: the token '<tool_80>' .* 612 tokens, .* 576 rows"
    with pytest.raises(AssertionError, match=message):
        run_stage("sft", "--model", str(model), "--data", data, "data.eval_size=0")


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_rows_longer_than_learnt_positions_are_an_error(
    run_stage: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, stage: str
) -> None:
    long, model = "many words here " * 200, str(tiny_model("gpt2"))
    made = {"sft": {"prompt": "Say", "response": long}, "dpo": {"prompt": "Say", "chosen": long, "rejected": "No."}}
    data = rows(tmp_path / "long.jsonl", *[made.get(stage, {"prompt": f"Say {n}"}) | {"n": n} for n in range(4)])
    own = {
        "sft": ["sft.max_length=4096"],
        "dpo": ["dpo.policy=base", "dpo.max_length=4096"],
        "ppo": ["ppo.policy=base", "reward.name=function", "reward.call=builtins:len", "ppo.response_length=510"],
    }

    with pytest.raises(AssertionError, match=r"long.jsonl line [14]: \d+ tokens .*are more than the 512 positions"):
        run_stage(stage, "--model", model, "--data", data, "data.eval_size=0", *own[stage])


def test_a_row_that_the_template_refuses_is_a_bad_row(
    run_stage: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    good = [{"messages": turns} for _ in range(6)]
    bad = {"messages": [{"role": "system", "content": "S"}, *turns]}
    asked = ("--data", rows(tmp_path / "mixed.jsonl", *good, bad), f"chat_template={template}", "data.eval_size=0")

    says = "mixed.jsonl line 7: the chat template refuses this conversation: TemplateError: no system turns"
    with pytest.raises(AssertionError, match=says):
        run_stage("sft", *asked)
    record = manifest.read(run_stage("sft", *asked, "data.on_bad_row=skip"))
    assert (record["data"]["train_rows"], record["data"]["skipped_rows"]) == (6, 1)
    # `check` finds it too, in seconds
    code = (
        "import sys; from alignkit.cli import main; main(); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "check", "--plugin", "sft", "--model", str(tiny_model()), *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert says in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_rows_that_no_preview_could_see_are_skipped_and_counted_at_the_start_of_training(
    run_stage: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignkit.runs.row_checks.ROWS", 0)  # as where the model is not on this disk yet
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{{ raise_exception('no') if m.role == 'system' else m.content }}{% endfor %}"
    )
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    made = [{"messages": turns} for _ in range(6)]
    data = rows(tmp_path / "mixed.jsonl", *made, {"messages": [{"role": "system", "content": "S"}, *turns]})
    asked = ("--data", data, f"chat_template={template}", "data.eval_size=0", "data.on_bad_row=skip")

    record = manifest.read(run_stage("sft", *asked))
    assert (record["data"]["train_rows"], record["data"]["skipped_rows"]) == (6, 1)


def test_pairs_that_a_template_makes_equal_are_left_out_and_counted(
    run_stage: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "trims.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ':' + m.content | trim + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    good = [{"prompt": f"Q{n}", "chosen": "Yes.", "rejected": "No."} for n in range(6)]
    data = rows(tmp_path / "pairs.jsonl", *good, {"prompt": "Q", "chosen": "Yes.", "rejected": "Yes. "})
    asked = ("--data", data, f"chat_template={template}", "data.eval_size=0")

    for stage, own in (("dpo", "dpo.policy=base"), ("rm", "rm.policy=base")):
        run_stage(stage, *asked, own)
        assert "2 of 14 answers are left out: they are the same tokens" in capsys.readouterr().out


def test_sampling_past_learnt_positions_is_an_error(tiny_model: Callable[..., Path]) -> None:
    from alignkit import DataError
    from alignkit.batches import Sampling
    from alignkit.generation import chat
    from alignkit.generation.sampling import sample

    opened = chat.open_model(chat.locate(str(tiny_model("gpt2"))))
    with pytest.raises(DataError, match="a prompt of 500 tokens .*: 520 tokens are more than the 512 positions"):
        sample(opened.model, opened.tokenizer, [[1] * 500], Sampling(20, 1.0, (0,)))


def test_the_card_of_a_reward_model_scores_as_alignkit_does_where_a_template_writes_two_ends(
    run_stage: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    from transformers import AutoTokenizer

    from alignkit.generation.scoring import RewardModel

    model = tmp_path / "model"
    shutil.copytree(tiny_model(), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + '\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{{ 'assistant\\n' if add_generation_prompt else eos_token }}"
    )
    tokenizer.save_pretrained(model)
    folder = run_stage("rm", "--model", str(model), "--plugin", "full", "rm.policy=base")
    record = manifest.read(folder)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert record["stop_ids"] == [tokenizer.eos_token_id, end]

    scorer = RewardModel(folder, record)
    encoded = scorer.encode([{"role": "user", "content": "..."}], "...")
    assert encoded.answers[0][-1] == end
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = next(block for block in card.split("```python\n")[1:] if "SequenceClassification" in block).split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(folder)), names)
    assert names["ids"][: names["end"] + 1] == encoded.prompt + encoded.answers[0]
    assert names["score"].item() == pytest.approx(scorer.scores([encoded], 1)[0], rel=0.05)  # a trunk in bf16


def test_check_reports_rows_that_a_template_refuses_though_it_refuses_all(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from alignkit.cli import main

    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "tool_calls": [call]}]
    data = rows(tmp_path / "calls.jsonl", *({"messages": turns} for _ in range(4)))
    asked = ["check", "--plugin", "sft", "--model", str(tiny_model()), "--data", data, "data.eval_size=0"]

    says = "calls.jsonl line 1: the chat template leaves out the call of the tool 'weather'"
    assert main(asked) == 2
    assert says in capsys.readouterr().err
    assert main([*asked, "data.on_bad_row=skip"]) == 2
    assert f"all 4 training rows are bad. The first: {says}" in capsys.readouterr().err


def test_check_finds_the_prompts_of_ppo_that_are_too_long(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from alignkit.cli import main

    long, answers = "many words here " * 60, {"responses": ["A", "B" * 3000], "ranks": [0, 1]}
    common = ["check", "--plugin", "ppo", "sft.data.eval_size=0", "ppo.data.eval_size=0", "--output", str(tmp_path)]
    sft = rows(tmp_path / "sft.jsonl", {"prompt": "Q", "response": "A"})
    rm = rows(tmp_path / "rm.jsonl", {"prompt": "Q", "responses": ["A", "B"], "ranks": [0, 1]})
    common += [f"sft.data.path={sft}", f"rm.data.path={rm}", "rm.data.eval_size=0", "rm.max_length=512"]
    for beside in ({}, answers):
        data = rows(tmp_path / "prompts.jsonl", {"prompt": "Q", **beside}, {"prompt": long, **beside})
        asked = [*common, "--model", str(tiny_model("gpt2")), "--data", data]
        assert main([*asked, "ppo.max_prompt_length=100"]) == 2
        assert "prompts.jsonl line 2: the prompt has" in (said := capsys.readouterr().err)
        assert "tokens, over ppo.max_prompt_length=100" in said
        assert main([*asked, "ppo.response_length=512"]) == 2
        assert "ppo.response_length=512 are more than the 512 positions" in capsys.readouterr().err
        assert main([*asked, "ppo.max_prompt_length=512", "ppo.response_length=4"]) == 0, capsys.readouterr().err
        capsys.readouterr()
