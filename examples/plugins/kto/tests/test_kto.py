"""The formula by hand, the rows, and the stage under every built-in tuner."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from alignkit_kto import JudgedLogps, KtoLossConfig, judgement, judgements, kto
from safetensors.torch import load_file

from alignkit import DataError, Ranking

USER = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(("weights", "expected"), [((1, 1), 0.5), ((1, 3), (0.462570 + 3 * 0.537430) / 2)])
def test_the_loss_by_hand(weights: tuple[float, float], expected: float) -> None:
    """1 - sigmoid(0.1 * (2 - 0.5)) = 0.462570 where good, 1 - sigmoid(-0.15) = 0.537430 where bad."""
    config = KtoLossConfig(beta=0.1, good_weight=weights[0], bad_weight=weights[1])
    batch = JudgedLogps(
        logps=torch.tensor([-3.0, -3.0]),
        ref_logps=torch.tensor([-5.0, -5.0]),
        good=torch.tensor([True, False]),
        kl=torch.tensor(0.5),
    )

    assert kto(config)(batch).loss.item() == pytest.approx(expected, abs=1e-5)


def test_both_layouts_are_read() -> None:
    turns = [USER, {"role": "assistant", "content": "So."}, USER, {"role": "assistant", "content": "No."}]
    flat = judgement({"prompt": "Why?", "completion": "Because.", "label": True})
    chat = judgement({"messages": turns, "label": False})

    assert (flat.prompt, flat.answer, flat.good) == ([USER], "Because.", True)
    assert (chat.prompt, chat.answer, chat.good) == (turns[:-1], "No.", False)
    with pytest.raises(DataError, match="'label' must be true or false"):
        judgement({"prompt": "Why?", "completion": "Because.", "label": "yes"})
    call = [{"function": {"name": "f", "arguments": {}}}]
    with pytest.raises(DataError, match="only answers in text can be judged"):
        judgement({"messages": [turns[0], {**turns[1], "tool_calls": call}], "label": True})


def test_a_ranking_is_split_at_its_mean_rank() -> None:
    found = judgements(Ranking([USER], ["a", "b", "c", "d"], [0, 1, 1, 2]))

    assert [(one.answer, one.good) for one in found] == [("a", True), ("d", False)]


OTHER_NAMES = pytest.param("ia3", marks=pytest.mark.skipif(not find_spec("alignkit_ia3"), reason="needs alignkit-ia3"))


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora", OTHER_NAMES])
def test_it_starts_at_the_sft_model_and_leaves_it(run_stage: Callable[..., Path], tuner: str) -> None:
    """With the reference equal to the policy every answer's loss is 1 - sigmoid(0); against the bare base it is not.

    TRL copies an adapter by LoRA's names; IA3's are others.
    """
    large = ["train.learning_rate=0.01", "train.warmup_steps=0", "train.bf16=false", "kto.loss.beta=2"]
    run = run_stage("kto", "--plugin", tuner, *large)
    metrics = json.loads((run / "alignkit.json").read_text())["metrics"]

    assert metrics["first_eval_loss"] == pytest.approx(0.5, abs=1e-3 if tuner == "qlora" else 1e-6)
    assert abs(metrics["eval_loss"] - 0.5) > 1e-3
    assert not (run / "ref").exists()


def test_a_run_that_was_cut_off_goes_on_exactly(
    run_stage: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.learning_rate=0.01", "train.warmup_steps=0", "train.bf16=false"]
    run = run_stage("kto", *settings)
    whole = load_file(run / "adapter_model.safetensors")
    cut = run.rename(run.with_name("kto.unfinished"))
    (cut / "alignkit.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "checkpoint-2")
    run_stage("kto", *settings, "--resume")
    resumed = load_file(run / "adapter_model.safetensors")

    assert "resuming from step 1" in capsys.readouterr().out
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_batch_of_one_is_refused(run_stage: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError, match="per_device_train_batch_size must be 2 or more"):
        run_stage("kto", "train.per_device_train_batch_size=1")


def test_alignkit_finds_nothing_wrong_with_it(check_plugin: Callable[[str], None]) -> None:
    check_plugin("kto")
