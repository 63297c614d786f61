"""Rewards in PPO: reward models, functions, classifiers, and rewards that fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ppo_runs import GOLD, LEARN, SMALL, iterations, logs, ppo, roles_of
from safetensors.torch import load_file

from alignkit.cli import main
from alignkit.models import Sequences


def test_a_function_is_a_reward_and_is_learnt(folder: Path) -> None:
    """The letter e is in one token twice: eight such tokens score 4, the most there is; it starts at about 0.3."""
    scores = [line["score"] for line in iterations(ppo(*LEARN, "ppo.iterations=45", "ppo.kl_coef=0"))]

    assert scores[0] < 0.6
    assert scores[-1] > 3.6


def test_an_answer_that_did_not_end_is_penalized(folder: Path) -> None:
    """With all answers cut off, the penalty shifts every return, at whose mean the value starts."""
    plain = ppo(*GOLD, "ppo.iterations=1", "ppo.missing_eos_penalty=0", "ppo.response_length=2", "--output", "plain")
    other = ppo(*GOLD, "ppo.iterations=1", "ppo.missing_eos_penalty=5", "ppo.response_length=2", "--output", "other")

    assert iterations(plain)[0]["score"] == iterations(other)[0]["score"]
    biases = [
        load_file(next(run.glob("checkpoints/*/trained.safetensors")))["heads.value.bias"] for run in (plain, other)
    ]
    assert float(biases[0] - biases[1]) == pytest.approx(5, abs=0.1)


def test_scores_are_clipped_where_they_are_learned_from_and_not_where_they_are_logged(folder: Path) -> None:
    """No score of this reward is below 0, so all are 0.001 or 0 after clipping. The value starts at their mean."""
    command = (*GOLD, "ppo.iterations=1", "ppo.missing_eos_penalty=0")
    plain = ppo(*command, "--output", "plain")
    other = ppo(*command, "ppo.score_clip=0.001", "--output", "other")

    assert iterations(plain)[0]["score"] == iterations(other)[0]["score"] > 0.01
    first = [next(line["eval_score"] for line in logs(run) if "eval_score" in line) for run in (plain, other)]
    assert first[0] == first[1] > 0.01
    tensors = load_file(next(other.glob("checkpoints/*/trained.safetensors")))
    assert float(tensors["heads.value.bias"]) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("gold:broken", "reward 'function' failed on the answer"),
        ("gold:few", "reward 'function' returned 1 scores for 4 answers, the first is"),
        ("gold:nan", "reward 'function' returned nan for the answer"),
        ("gold:none", "gold has no function none"),
    ],
)
def test_a_bad_reward_stops_the_run_with_its_name(
    folder: Path, call: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ppo.policy=base", "reward.name=function", f"reward.call={call}", "ppo.iterations=1"]

    assert main(["train", "--plugin", "ppo", *SMALL, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_rewards_are_added_with_weights(below: Callable[[str], list[str]]) -> None:
    named = below("lora")
    rm = ppo(*named, "ppo.iterations=1", "--output", "rm")
    gold = ppo(*named[:3], "reward.name=function", "reward.call=gold:letters", "ppo.iterations=1", "--output", "gold")
    parts = "[{name: reward-model, weight: 2}, {name: function, call: 'gold:letters', weight: -3}]"
    both = ppo(*named, "reward.name=sum", f"reward.parts={parts}", "ppo.iterations=1", "--output", "both")
    a, b, c = (iterations(run)[0]["score"] for run in (rm, gold, both))

    assert c == pytest.approx(2 * a - 3 * b, abs=1e-4)


def test_any_classifier_is_a_reward_in_its_own_tokens(folder: Path, tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model("gpt2"), num_labels=3)
    classifier.config.pad_token_id = 5
    classifier.save_pretrained("classifier")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("gpt2"))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.save_pretrained("classifier")
    settings = ["ppo.policy=base", "reward.name=classifier", "reward.model=classifier", "ppo.iterations=1"]
    two, one = (ppo(*settings, f"reward.label={label}", "--output", str(label)) for label in (2, 1))

    assert iterations(two)[0]["score"] != iterations(one)[0]["score"]


def test_a_classifier_without_a_pad_token_scores_batches(folder: Path, tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(tiny_model("llama"), num_labels=1).save_pretrained("classifier")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer.pad_token = None
    tokenizer.save_pretrained("classifier")

    settings = ["ppo.policy=base", "reward.name=classifier", "reward.model=classifier", "ppo.iterations=1"]
    both, alone = (ppo(*settings, f"reward.batch={n}", "--output", f"batch-{n}") for n in (4, 1))
    assert iterations(both)[0]["score"] == pytest.approx(iterations(alone)[0]["score"], abs=1e-3)


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
def test_the_reward_in_ppo_is_the_number_of_alignkit_score(
    below: Callable[[str], list[str]], tuner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkit.generation.scoring import RewardModel
    from alignkit.models import device_and_dtype
    from alignkit.runs import manifest

    run, roles = roles_of(below(tuner))
    monkeypatch.setattr(device_and_dtype, "run_dtype", lambda train: torch.float32)
    folder = Path(f"below-{tuner}/rm")
    scorer = RewardModel(folder, manifest.read(folder))
    encoded = [scorer.encode([{"role": "user", "content": f"p{n}"}], "e " * n + "b") for n in range(4)]
    answers = Sequences.of(
        [e.prompt for e in encoded], [e.answers[0] for e in encoded], run.tokenizer.pad_token_id, "cpu"
    )

    with torch.no_grad():
        scores = roles(answers, ("reward",))["reward"].tolist()
    assert scores == pytest.approx(scorer.scores(encoded, 2), abs=1e-4)
