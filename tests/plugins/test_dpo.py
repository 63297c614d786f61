"""DPO runs: steps and resume, held-out metrics, data, losses by name, and the plan."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import logged, record, weights
from stage_runs import RANKINGS

from alignkit.cli import main

# --- runs ------------------------------------------------------------------------------------------------------------


# --- steps and resume ------------------------------------------------------------------------------------------------


def test_accumulated_microbatches_weigh_every_pair_the_same(train_dpo: Callable[..., Path], sgd: None) -> None:
    """12 pairs in one batch, and in microbatches of 5, 5 and 2, are the same step."""
    rows = [{"prompt": f"Say {n}", "chosen": "good " * (n % 3 + 1), "rejected": "bad"} for n in range(12)]
    settings = ["--plugin", "full", "--plugin", "sgd", "train.max_steps=1", "train.bf16=false", "data.eval_size=0"]
    settings += ["train.learning_rate=0.1", "loss.name=ipo"]
    one = train_dpo(*settings, "train.per_device_train_batch_size=12", rows=rows, output="one")
    micro = ["train.per_device_train_batch_size=5", "train.gradient_accumulation_steps=3"]
    many = train_dpo(*settings, *micro, rows=rows, output="many")

    assert logged(one, "loss")[0] == pytest.approx(logged(many, "loss")[0], abs=1e-4)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(many)[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
def test_a_resumed_run_ends_in_the_same_weights(
    train_dpo: Callable[..., Path], train: Callable[..., Path], tuner: str
) -> None:
    sft = train("--plugin", tuner, "train.max_steps=2", "train.learning_rate=0.01", output="sft")
    settings = ["--plugin", tuner, f"dpo.policy={sft}", "train.max_steps=6", "train.learning_rate=0.001"]
    settings += ["train.save_steps=2", "train.eval_steps=2", "train.save_total_limit=9"]
    whole, cut = train_dpo(*settings, output="whole"), train_dpo(*settings, output="cut")
    for name in ("alignkit.json", "README.md"):  # as if it had been killed after step 4
        (cut / name).unlink()
    shutil.rmtree(cut / "checkpoints" / "checkpoint-6")
    cut.rename(cut.with_name("dpo.unfinished"))
    resumed = train_dpo(*settings, "--resume", output="cut")

    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    assert record(whole)["metrics"]["eval_kl"] == record(resumed)["metrics"]["eval_kl"]
    assert (whole / "answers.jsonl").read_text() == (resumed / "answers.jsonl").read_text()


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_dpo_learns_the_order_and_reports_its_metrics(train_dpo: Callable[..., Path]) -> None:
    rows = [{"prompt": f"Say {n}", "responses": ["good one", "bad", "so so"], "ranks": [0, 2, 1]} for n in range(16)]
    folder = train_dpo("--plugin", "lora", "train.max_steps=20", "train.learning_rate=0.003", rows=rows)
    metrics = record(folder)["metrics"]

    assert metrics["first_eval_accuracy"] == 0.5
    assert metrics["eval_accuracy"] > 0.9
    assert metrics["eval_pairs"] == 12
    assert metrics["eval_margin"] > 0.1
    assert metrics["eval_margin"] == pytest.approx(
        metrics["eval_rewards_chosen"] - metrics["eval_rewards_rejected"], abs=1e-5
    )
    moved = metrics["eval_logps_chosen"] - metrics["first_eval_logps_chosen"]
    assert metrics["eval_rewards_chosen"] == pytest.approx(0.1 * moved, abs=1e-3)
    assert metrics["eval_loss"] < 0.65
    table = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in table] == [0] * 4 + [10] * 4 + [20] * 4
    assert {*map(frozenset, table)} == {frozenset(["step", "prompt", "answer", "kl", "length", "ended"])}
    assert [row["prompt"] for row in table[:4]] == [row["prompt"] for row in table[8:]]
    assert any(first["answer"] != last["answer"] for first, last in zip(table[:4], table[8:], strict=True))
    assert sum(row["kl"] for row in table[8:]) / 4 == pytest.approx(metrics["eval_kl"], rel=1e-4)
    assert sum(row["length"] for row in table[8:]) / 4 == metrics["eval_length"]


# --- data and losses by name -----------------------------------------------------------------------------------------


def test_an_answer_that_is_too_long_is_an_error_or_skipped(
    train_dpo: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*RANKINGS, {"prompt": "Long?", "responses": ["a", "b", "long " * 90], "ranks": [0, 1, 2]}]
    rows += [{"prompt": "Tie?", "responses": ["a", "b"], "ranks": [1, 1]}]
    with pytest.raises(AssertionError):
        train_dpo("dpo.max_length=80", "train.max_steps=1", "data.eval_size=0", rows=rows)
    assert re.search(r"error: 1 of \d+ answers are over 80 tokens.*set dpo.too_long=skip", capsys.readouterr().err)
    settings = ["dpo.max_length=80", "dpo.too_long=skip", "train.max_steps=1", "data.eval_size=0"]
    train_dpo(*settings, "--overwrite", rows=rows)
    said = capsys.readouterr().out
    assert "over 80 tokens" in said
    assert "skipped 1 of 18 rankings: all answers are tied" in said


def test_a_loss_of_a_plugin_trains(train_dpo: Callable[..., Path], install: Callable[..., None]) -> None:
    install(
        "longer",
        """
        from alignkit import Loss, LossOutput, PreferenceLogps, hookimpl

        def build(config):
            def loss(batch):
                assert batch.ref_chosen is None and batch.ref_rejected is None
                return LossOutput((batch.rejected - batch.chosen).mean(), {"gap": 3.0})
            return loss

        @hookimpl
        def alignkit_loss():
            return [Loss(name="longer", summary="", batch=PreferenceLogps, build=build, needs_reference=False)]
        """,
    )
    folder = train_dpo("--plugin", "longer", "train.max_steps=2")

    assert record(folder)["loss"] == "longer"
    assert record(folder)["metrics"]["eval_gap"] == 3
    assert logged(folder, "gap") == [3, 3]


def test_naming_the_sft_stage_does_not_pick_trls_sft_loss(
    dpo_command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--plugin", "sft", *dpo_command()]) == 0
    assert "loss  sigmoid" in capsys.readouterr().out
    assert main(["check", *dpo_command("loss.name=sft")]) == 0
    assert "loss  sft" in capsys.readouterr().out


def test_several_processes_do_not_precompute(
    dpo_command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert main(["train", *dpo_command("dpo.precompute_ref_log_probs=true")]) == 2
    assert "precompute_ref_log_probs needs a single process" in capsys.readouterr().err


def test_a_config_file_of_ppo_does_for_dpo(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RANKINGS))
    text = "train: {max_steps: 1}\nreward: {name: function, call: mine:f}\nplugins: [ppo]\n"
    stages = "stages: {ppo: {kl_coef: 0.1}, rm: {data: {path: mine.jsonl, eval_size: 1}}}\n"
    Path("run.yaml").write_text(f"model: {tiny_model()}\n{text}{stages}")

    assert main(["check", "-c", "run.yaml", "--plugin", "dpo"]) == 0
    said = capsys.readouterr().out
    assert "loss  sigmoid" in said
    assert "rows from mine.jsonl" in said
    assert "held out  1 rows" in said
    assert main(["check", "-c", "run.yaml", "--plugin", "dpo", "dpo.data.path=bundled:rankings"]) == 0
    said = capsys.readouterr().out
    assert "rows from bundled:rankings" in said
    assert "held out  1 rows" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plugin", "lora"], "policy, reference on one base"),
        (["--plugin", "full"], "policy, reference: a model each"),
        (["--plugin", "full", "--plugin", "simpo"], "policy only; the loss needs no reference"),
        (
            ["--plugin", "full", "dpo.precompute_ref_log_probs=true"],
            "policy only; the reference log-probabilities are computed",
        ),
    ],
)
def test_the_plan_says_what_the_reference_costs(
    dpo_command: Callable[..., list[str]], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *dpo_command(*words)]) == 0
    assert f"in memory  {said}" in capsys.readouterr().out


def test_sft_is_trained_first_where_there_is_none(dpo_command: Callable[..., list[str]], capsys: Any) -> None:
    words = [word for word in dpo_command("dpo.policy=null") if word != "dpo.policy=null"]

    assert main(["train", *words, "--plan"]) == 0
    said = capsys.readouterr().out
    assert said.index("stage  sft") < said.index("stage  dpo")
    assert "(trained first)" in said
