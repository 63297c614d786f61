"""``alignkit export``: what is written equals the run, opens in plain Transformers, and bad input leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import record, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from alignkit.cli import main
from alignkit.exporting import export

PROMPTS = [{"prompt": "What is 3 and one?"}, {"prompt": "Count on!"}]
STRONG = ("train.learning_rate=0.02", "train.max_steps=4", "train.bf16=false")  # an adapter that changes what is likely

LETTERS = ("reward.name=function", "reward.call=letters:score")

PLAIN = """
import json, sys
sys.modules["alignkit"] = None  # cannot be imported
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in ("What is 3 and one?", "Count on!"):
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
        answers.append(answer.strip())  # the template writes a space before an answer
    print(json.dumps({"answers": answers, "class": type(model).__name__, "dtype": str(model.dtype)}))
"""


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of the reward :data:`LETTERS`."""
    (tmp_path / "letters.py").write_text("def score(prompts, answers):\n    return [a.count('e') for a in answers]\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def opened_elsewhere(*folders: Path) -> list[dict[str, Any]]:
    """Greedy answers of exports in another process, in which alignkit cannot be imported."""
    done = subprocess.run([sys.executable, "-I", "-c", PLAIN, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def sampled(run: Path, folder: Path) -> list[str]:
    """Greedy answers by ``alignkit sample``."""
    prompts, answers = folder / "prompts.jsonl", folder / f"{run.parent.name}-answers.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    greedy = ["-k", "1", "--temperature", "0", "--max-new-tokens", "12"]
    assert main(["sample", str(run), str(prompts), "--output", str(answers), *greedy]) == 0
    return [json.loads(line)["responses"][0].strip() for line in answers.read_text().splitlines()]


@pytest.mark.usefixtures("fp32")
def test_exports_open_in_plain_transformers_and_answer_as_alignkit_sample(
    run_stage: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    runs = {
        "lora": run_stage("sft", "--plugin", "lora", *STRONG),
        "qlora": run_stage("sft", "--plugin", "qlora", *STRONG, "--output", str(tmp_path / "four")),
        "full": run_stage(
            "sft", "--plugin", "full", *STRONG, "--output", str(tmp_path / "full"), "train.learning_rate=2e-3"
        ),
    }
    exports = [export(run, tmp_path / f"exported-{name}", dtype="float32") for name, run in runs.items()]
    opened = opened_elsewhere(*(each.folder for each in exports))

    for run, exported, plain in zip(runs.values(), exports, opened, strict=True):
        assert plain == {"answers": sampled(run, tmp_path), "class": "LlamaForCausalLM", "dtype": "torch.float32"}
        assert exported.kl is not None
        assert exported.kl < 1e-6
        assert exported.greedy_agreement == 1
    assert len({tuple(plain["answers"]) for plain in opened}) == 3  # the runs differ


def test_an_export_says_what_it_was_made_from(run_stage: Callable[..., Path], tmp_path: Path) -> None:
    run = run_stage("sft", "--plugin", "lora", *STRONG)
    lines: list[str] = []
    exported = export(run, tmp_path / "exported", say=lines.append)
    made = json.loads((exported.folder / "export.json").read_text())
    config = json.loads((exported.folder / "config.json").read_text())
    card = (exported.folder / "README.md").read_text()

    assert {tensor.dtype for tensor in weights(exported.folder).values()} == {torch.bfloat16}
    assert made["run"] == {"folder": str(run), "weights": record(run)["fingerprints"]["weights"]}
    assert made["export"]["kl"] == exported.kl
    assert made["export"]["texts"] == "prompts that the run held out"
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert "library_name: transformers" in card
    assert "model-index" in card
    assert f"{exported.kl:.2g}" in card
    assert f"KL {exported.kl:.2g} nats per token" in lines[-1]
    assert str(tmp_path) not in (exported.folder / "config.json").read_text()


def test_the_stop_tokens_and_the_template_of_the_run_come_along(run_stage: Callable[..., Path], tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    run = run_stage("sft", "--plugin", "lora", f"chat_template={template}")
    folder = export(run, tmp_path / "exported").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert tokenizer.chat_template == template.read_text()
    assert tokenizer.pad_token_id is not None
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == record(run)["stop_ids"]
    assert "repetition_penalty" not in generation


def test_ppo_on_dpo_on_sft_is_merged_in_that_order(
    run_stage: Callable[..., Path], tmp_path: Path, letters: None
) -> None:
    """SFT in full, DPO as an adapter on it, PPO trains that adapter further: the export has the weights of all."""
    sft = run_stage("sft", "--plugin", "full", *STRONG)
    dpo = run_stage("dpo", "--plugin", "lora", *STRONG, f"dpo.policy={sft}", "dpo.response_length=4")
    ppo = run_stage(
        "ppo", "--plugin", "lora", "train.learning_rate=0.02", "train.bf16=false", f"ppo.policy={dpo}",
        *LETTERS,
        *("ppo.batch_size=4", "ppo.minibatches=1", "ppo.response_length=4", "ppo.iterations=2", "train.max_steps=-1"),
    )  # fmt: skip
    exported = export(ppo, tmp_path / "exported", dtype="float32")
    own, of_sft = weights(exported.folder), weights(sft)
    adapter, config = weights(ppo), json.loads((ppo / "adapter_config.json").read_text())
    layer = "model.layers.1.mlp.up_proj"
    down, up = (adapter[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")

    assert exported.kl is not None
    assert exported.kl < 1e-6
    expected = of_sft[f"{layer}.weight"] + config["lora_alpha"] / config["r"] * up @ down
    torch.testing.assert_close(own[f"{layer}.weight"], expected)
    assert torch.equal(own["model.embed_tokens.weight"], of_sft["model.embed_tokens.weight"])
    assert not torch.equal(up, weights(dpo)[f"base_model.model.{layer}.lora_B.weight"])


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize(
    ("stage", "tuner", "settings"),
    [
        ("kto", "qlora", ("kto.response_length=4",)),
        ("rahf", "qlora", ("rahf.response_length=4", "rahf.layers=[1,2]")),
        ("grpo", "lora", ("grpo.batch_size=4", "grpo.minibatches=1", "grpo.samples_per_prompt=2", *LETTERS)),
    ],
)
def test_policies_of_every_kind_of_stage_equal_their_runs(
    run_stage: Callable[..., Path], tmp_path: Path, letters: None, stage: str, tuner: str, settings: tuple[str, ...]
) -> None:
    run = run_stage(stage, "--plugin", tuner, *STRONG, f"{stage}.policy=base", *settings)
    exported = export(run, tmp_path / "exported", dtype="float32")

    assert exported.kl is not None
    assert exported.kl < 1e-6


def test_merging_into_the_original_base_prints_its_kl_to_the_run(
    run_stage: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_stage("sft", "--plugin", "qlora", *STRONG)
    dequantized = export(run, tmp_path / "dequantized", dtype="float32")
    original = export(run, tmp_path / "original", dtype="float32", base="original")
    adapter, config = weights(run), json.loads((run / "adapter_config.json").read_text())
    layer = "model.layers.0.self_attn.q_proj"
    down, up = (adapter[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
    expected = weights(tiny_model())[f"{layer}.weight"] + config["lora_alpha"] / config["r"] * up @ down

    torch.testing.assert_close(weights(original.folder)[f"{layer}.weight"], expected)
    assert dequantized.kl is not None
    assert original.kl is not None
    assert dequantized.kl < 1e-6 < 1e-5 < original.kl  # what 4 bits lose


@pytest.mark.parametrize("tuner", ["lora", "qlora"])
def test_a_reward_model_opens_for_sequence_classification_with_the_scores_of_the_run(
    train_rm: Callable[..., Path], tmp_path: Path, fp32: None, tuner: str
) -> None:
    run = train_rm("--plugin", tuner, "train.max_steps=2")
    exported = export(run, tmp_path / "exported", dtype="float32")
    model = AutoModelForSequenceClassification.from_pretrained(exported.folder)
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    rows, scored = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    rows.write_text(json.dumps({"prompt": "What is 3 and one?", "response": "It is 4."}) + "\n")
    assert main(["score", str(run), str(rows), "--output", str(scored)]) == 0
    messages = [{"role": "user", "content": "What is 3 and one?"}, {"role": "assistant", "content": "It is 4."}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    ids = ids[: len(ids) - ids[::-1].index(record(run)["stop_ids"][0])]

    with torch.no_grad():
        score = model(torch.tensor([ids])).logits.item()
    assert score == pytest.approx(json.loads(scored.read_text())["score"], abs=1e-5)
    assert exported.kl is None
    assert exported.largest_difference < 1e-4


def test_a_run_that_rounding_changes_as_much_as_training_did_is_warned_of(
    run_stage: Callable[..., Path], tmp_path: Path
) -> None:
    weak = run_stage("sft", "--plugin", "lora", "train.learning_rate=1e-6", "train.bf16=false")
    lines: list[str] = []
    export(weak, tmp_path / "exported", say=lines.append)
    assert "warning: this differs from the run by a KL of" in lines[-1]
    assert "Use --dtype float32" in lines[-1]

    export(weak, tmp_path / "exact", dtype="float32", say=lines.append)
    assert "warning" not in lines[-1]


def test_files_are_no_larger_than_asked_for(run_stage: Callable[..., Path], tmp_path: Path) -> None:
    folder = export(run_stage("sft", "--plugin", "lora"), tmp_path / "exported", max_shard_size="100KB").folder

    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").exists()
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
