"""Runs of the reward model: what is trained, saved and scored, and what starts from an SFT run."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from run_folders import record

from alignkit.cli import main
from alignkit_rm.normalize import constant_direction

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma"]


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_every_tuner_learns_a_ranking_on_every_architecture(
    train_rm: Callable[..., Path], tuner: str, model: str
) -> None:
    rows = [{"prompt": f"Say {n}", "responses": ["good one", "bad", "so so"], "ranks": [0, 2, 1]} for n in range(16)]
    folder = train_rm("--plugin", tuner, "train.max_steps=60", "train.learning_rate=0.001", model=model, rows=rows)
    manifest = record(folder)

    assert manifest["role"] == "reward"
    assert manifest["metrics"]["eval_accuracy"] > 0.7
    assert manifest["verdict"] in (folder / "README.md").read_text()


def plain_scores(folder: Path, rows: list[tuple[str, str]], batched: bool) -> list[float]:
    """Scores by plain Transformers, as the model card says."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    manifest = record(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=manifest["pad_token_id"], dtype=torch.float32
    ).eval()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], tokenize=False
        ).rstrip("\n")
        for prompt, answer in rows
    ]
    with torch.no_grad():
        if batched:
            inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            inputs.pop("token_type_ids", None)
            return [float(score) for score in model(**inputs).logits[:, 0]]
        return [
            float(model(tokenizer(t, return_tensors="pt", add_special_tokens=False)["input_ids"]).logits) for t in texts
        ]


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_plain_transformers_and_alignkit_score_give_the_same_numbers(
    train_rm: Callable[..., Path], tuner: str, tmp_path: Path
) -> None:
    from alignkit.models import device_and_dtype

    folder = train_rm("--plugin", tuner, "train.max_steps=6", "train.learning_rate=0.01", "train.bf16=false")
    rows = [(f"What is {n} and one?", f"It is {n + 1}. " + "Count on! " * n) for n in range(5)]
    file, scored = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "response": a}) + "\n" for p, a in rows))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_and_dtype, "run_dtype", lambda train: torch.float32)
        assert main(["score", str(folder), str(file), "-o", str(scored), "--batch", "2"]) == 0
    ours = [json.loads(line)["score"] for line in scored.read_text().splitlines()]

    assert len(set(ours)) > 1
    assert ours == pytest.approx(plain_scores(folder, rows, batched=False), abs=1e-4)


def test_where_the_tokenizer_has_a_pad_token_plain_batches_are_scored_right_too(
    train_rm: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "with-pad"
    shutil.copytree(tiny_model(), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})
    tokenizer.save_pretrained(model)
    folder = train_rm("--plugin", "lora", "--model", str(model), "train.max_steps=3", "train.learning_rate=0.01")
    rows = [(f"What is {n} and one?", f"It is {n + 1}. " + "Count on! " * n) for n in range(5)]

    assert record(folder)["pad_token_id"] == tokenizer.convert_tokens_to_ids("<pad>")
    assert plain_scores(folder, rows, batched=True) == pytest.approx(plain_scores(folder, rows, False), abs=1e-4)


def test_normalizing_the_scores_does_not_change_the_held_out_loss(
    train_rm: Callable[..., Path],
) -> None:
    """Centering depends on the mean of the scores, and normalization changes it."""
    folder = train_rm("loss.centering=0.1", "train.max_steps=8", "train.learning_rate=3e-3", "train.bf16=false")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, after = [line["eval_loss"] for line in lines if "eval_loss" in line][-2:]

    assert abs(record(folder)["normalisation"]["mean"]) > 0.1
    assert after == pytest.approx(before, abs=0.02)


def test_pairs_json_has_the_pairs_of_the_saved_model(train_rm: Callable[..., Path], tmp_path: Path) -> None:
    """By the scores of plain Transformers; predicted probabilities are on the scale of the loss."""
    rows = [{"prompt": f"p{n}", "responses": ["b", "c c", "e"], "ranks": [n % 2, 1, 3]} for n in range(4)]
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = train_rm(
        *("--plugin", "full", f"data.eval_path={held_out}", "data.eval_size=0", "train.max_steps=3"),
        *("train.learning_rate=0.01", "train.bf16=false"),
    )
    scale = record(folder)["normalisation"]["deviation"]
    given = [(row["prompt"], answer) for row in rows for answer in row["responses"]]
    scores = np.reshape(plain_scores(folder, given, batched=False), (4, 3))
    right, confidence = dict[int, list[bool]](), list[float]()
    for row, of_row in zip(rows, scores, strict=True):
        order = sorted(set(row["ranks"]))
        for better, worse in itertools.permutations(range(3), 2):
            distance = order.index(row["ranks"][worse]) - order.index(row["ranks"][better])
            if distance > 0:
                right.setdefault(distance, []).append(of_row[better] > of_row[worse])
                confidence.append(1 / (1 + math.exp(-abs(of_row[better] - of_row[worse]) * scale)))
    table = json.loads((folder / "pairs.json").read_text())

    assert table["step"] == 3
    assert [(row["distance"], row["pairs"], row["accuracy"]) for row in table["by_distance"]] == [
        (distance, len(right[distance]), pytest.approx(np.mean(right[distance]))) for distance in (1, 2)
    ]
    assert sum(row["pairs"] for row in table["calibration"]) == len(confidence) == 10
    predicted = sum(row["predicted"] * row["pairs"] for row in table["calibration"])
    assert predicted == pytest.approx(sum(confidence), rel=1e-3)


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
def test_the_head_is_trained_saved_and_there_after_resume(train_rm: Callable[..., Path], tuner: str) -> None:
    from safetensors.torch import load_file

    def head(folder: Path) -> torch.Tensor:
        tensors = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items() if "score" in n}
        assert len(tensors) == 1, tensors.keys()
        return next(iter(tensors.values()))

    settings = ["--plugin", tuner, "train.save_steps=2", "train.learning_rate=0.01", "train.save_total_limit=9"]
    whole = train_rm(*settings, "train.max_steps=6", output="whole")
    cut = train_rm(*settings, "train.max_steps=6", output="cut")
    starts = [head(cut / "checkpoints" / f"checkpoint-{step}") for step in (2, 6)]
    assert not torch.equal(*starts)
    for name in ("alignkit.json", "README.md"):  # as if it had been killed after step 4
        (cut / name).unlink()
    shutil.rmtree(cut / "checkpoints" / "checkpoint-6")
    cut.rename(cut.with_name("rm.unfinished"))
    resumed = train_rm(*settings, "train.max_steps=6", "--resume", output="cut")

    assert head(resumed).dtype is torch.float32
    assert torch.equal(head(whole), head(resumed))
    assert record(whole)["metrics"]["eval_accuracy"] == record(resumed)["metrics"]["eval_accuracy"]


@pytest.mark.parametrize("tuner", ["lora", "full"])
@pytest.mark.parametrize("shared", ["true", "false"])
def test_splitting_a_batch_over_forwards_changes_nothing(
    train_rm: Callable[..., Path], sgd: None, shared: str, tuner: str
) -> None:
    from safetensors.torch import load_file

    settings = [
        "--plugin",
        tuner,
        "--plugin",
        "sgd",
        "train.max_steps=2",
        "train.learning_rate=0.1",
        "train.bf16=false",
    ]
    settings += [f"rm.shared_prompt={shared}", "train.per_device_train_batch_size=4"]
    one = train_rm(*settings, output="one")
    split = train_rm(*settings, "rm.forward_tokens=40", output="split")
    (file,) = (f.name for f in one.glob("*.safetensors"))
    a, b = load_file(one / file), load_file(split / file)

    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_accumulated_microbatches_weigh_every_group_the_same(train_rm: Callable[..., Path], sgd: None) -> None:
    """12 groups in one batch, and in microbatches of 5, 5 and 2, are the same step."""
    from safetensors.torch import load_file

    settings = [
        "--plugin",
        "full",
        "--plugin",
        "sgd",
        "train.max_steps=1",
        "train.bf16=false",
        "train.learning_rate=0.1",
    ]
    one = train_rm(*settings, "train.per_device_train_batch_size=12", output="one")
    many = train_rm(
        *settings, "train.per_device_train_batch_size=5", "train.gradient_accumulation_steps=3", output="many"
    )
    losses_of = [
        next(json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines() if '"loss"' in line)
        for f in (one, many)
    ]
    a, b = (load_file(next(f.glob("*.safetensors"))) for f in (one, many))

    assert losses_of[0] == pytest.approx(losses_of[1], abs=1e-4)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_scores_of_demonstrations_average_zero(train_rm: Callable[..., Path], train: Callable[..., Path]) -> None:
    from conftest import DEMONSTRATIONS

    sft = train("--plugin", "full", "train.max_steps=1", output="sft")
    folder = train_rm(
        *("--plugin", "full", f"rm.policy={sft}", "train.max_steps=4", "train.learning_rate=0.01", "train.bf16=false")
    )
    manifest = record(folder)
    scores = plain_scores(folder, [(r["prompt"], r["response"]) for r in DEMONSTRATIONS], batched=False)

    assert manifest["normalisation"]["over"] == "the demonstrations"
    assert manifest["normalisation"]["answers"] == 16
    assert np.mean(scores) == pytest.approx(0, abs=1e-3)
    assert np.std(scores, ddof=1) == pytest.approx(1, abs=0.05)


def test_a_direction_in_which_every_answer_is_one_is_found() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 16) * 0.1 + torch.randn(16)
    direction = constant_direction(hidden)

    assert (hidden.double() @ direction).mean().item() == pytest.approx(1, abs=0.05)
    assert (hidden.double() @ direction).std().item() < 0.05


# --- from an SFT run -------------------------------------------------------------------------------------------------


def test_an_adapter_is_continued_on_the_same_base(train_rm: Callable[..., Path], train: Callable[..., Path]) -> None:
    from safetensors.torch import load_file

    sft = train("--plugin", "lora", "train.max_steps=4", "train.learning_rate=0.01", output="sft")
    rm = train_rm(f"rm.policy={sft}", "train.max_steps=1", "train.learning_rate=1e-9")
    was, now = (load_file(folder / "adapter_model.safetensors") for folder in (sft, rm))

    assert set(now) - set(was) == {"base_model.model.score.weight"}
    assert all(torch.allclose(now[name], was[name], atol=1e-6) for name in was)
    bases = [json.loads((f / "adapter_config.json").read_text())["base_model_name_or_path"] for f in (sft, rm)]
    assert bases[0] == bases[1]
    assert record(rm)["parents"]["policy"]["folder"] == str(sft)


@pytest.mark.parametrize(("below", "above"), [("full", "lora"), ("lora", "full"), ("qlora", "lora"), ("full", "qlora")])
def test_a_reward_model_of_one_tuner_goes_on_from_a_policy_of_another(
    train_rm: Callable[..., Path], train: Callable[..., Path], below: str, above: str
) -> None:
    sft = train("--plugin", below, "train.max_steps=1", output="sft")
    rm = train_rm("--plugin", above, f"rm.policy={sft}", "train.max_steps=1")

    assert record(rm)["tuner"] == above
    assert record(rm)["weights"] == ("model" if above == "full" else "adapter")
    assert record(rm)["base"]["located"] == (str(sft) if below == "full" else record(sft)["base"]["located"])


def test_merging_an_adapter_into_a_model_trained_whole_keeps_what_it_learnt(
    train_rm: Callable[..., Path], train: Callable[..., Path]
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForSequenceClassification

    sft = train("--plugin", "lora", "train.max_steps=4", "train.learning_rate=0.01", output="sft")
    rm = train_rm("--plugin", "full", f"rm.policy={sft}", "train.max_steps=1", "train.learning_rate=1e-9")
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted = AutoPeftModelForCausalLM.from_pretrained(sft, dtype=torch.float32).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(rm, dtype=torch.float32).eval()

    expected = adapted.get_base_model().model(ids).last_hidden_state
    torch.testing.assert_close(merged.model(ids).last_hidden_state, expected, rtol=1e-2, atol=2e-2)
