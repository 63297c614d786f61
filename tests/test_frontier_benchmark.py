"""benchmarks/frontier.py: points, interpolation, the KL of any adapter, and TRL's reward interface."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def frontier(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("vaderSentiment")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("frontier")


@pytest.fixture
def runs(frontier: Any) -> Any:
    return importlib.import_module("frontier_runs")


def test_a_score_is_interpolated_over_the_root_of_the_kl_where_the_curve_first_reaches_it(frontier: Any) -> None:
    curve = [frontier.Point(kl, score, 0, 0) for kl, score in [(0, 0.0), (1, 0.2), (9, 0.8), (4, 0.1), (16, 0.9)]]

    assert frontier.score_at(4, curve) == pytest.approx(0.5)  # sqrt: 1, 2, 3
    assert frontier.score_at(1, curve) == pytest.approx(0.2)
    assert frontier.score_at(16, curve) is None  # the curve ends there


def test_a_table_says_how_many_seeds_reach_a_kl_and_how_far_they_are_from_trl(frontier: Any) -> None:
    def run(*points: tuple[float, float]) -> list[Any]:
        return [frontier.Point(kl, score, 0.1, 0.01) for kl, score in points]

    ppo = [run((0, 0), (1, 0.5), (4, 0.7)), run((0, 0), (1, 0.3), (4, 0.5)), run((0, 0), (1, 0.4), (1, 0.4))]
    trl = [run((0, 0), (4, 0.4), (9, 0.5)), run((0, 0), (4, 0.2), (9, 0.5))]
    table = frontier.tables({"ppo": ppo, "trl": trl})

    at_two = 2**0.5 - 1  # between KL 1 and 4
    scores, others = [0.5 + 0.2 * at_two, 0.3 + 0.2 * at_two], [0.2 * 2**0.5, 0.1 * 2**0.5]
    mean = sum(scores) / 2
    assert f"| ppo | {mean:.3f} ± 0.100 (2 seeds) | not reached | not reached |" in table
    error = (0.1**2 + (others[0] - others[1]) ** 2 / 4) ** 0.5
    assert f"| ppo - trl | {mean - sum(others) / 2:+.3f} ± {error:.3f} |  |  |" in table
    assert "| ppo | 3 | 1 | 1.00 ± 0.00 | 0.400 ± 0.058 |" in table


def test_errors_of_a_point_are_over_openings(frontier: Any, tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "score": score, "kl": 1.0} for prompt, score in [("a", 0), ("a", 0), ("b", 1), ("b", 1)]]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert frontier.point(tmp_path / "answers.jsonl") == pytest.approx((1, 0.5, 0, 0.5))  # 0.25 if over answers


def test_the_kl_is_the_log_ratio_of_plain_transformers(
    runs: Any, tiny_model: Callable[[str], Path], tmp_path: Path, fp32: None
) -> None:
    import peft

    options = argparse.Namespace(folder=tmp_path, model=str(tiny_model("llama")), response_length=5, samples=2)
    (tmp_path / "held-out.jsonl").write_text('{"prompt": "The film was"}\n{"prompt": "I saw"}\n')
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    runs.save_start(options.model, tmp_path / "start")
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **runs.LORA)
    policy = peft.get_peft_model(base, config)
    policy.save_pretrained(str(tmp_path / "adapter"))
    runs.evaluate(options, tmp_path / "adapter", 0, tmp_path / "answers.jsonl")
    runs.evaluate(options, None, 0, tmp_path / "start.jsonl")

    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["The film was"] * 2 + ["I saw"] * 2
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        with torch.no_grad(), policy.disable_adapter():
            reference = policy(ids).logits.log_softmax(-1)
        with torch.no_grad():
            own = policy(ids).logits.log_softmax(-1)
        places = torch.arange(len(row["prompt_ids"]), ids.shape[1])
        ratio = (own - reference)[0, places - 1, ids[0, places]].sum()
        assert abs(row["kl"]) > 0.1
        assert row["kl"] == pytest.approx(float(ratio), abs=1e-3)
    assert all(json.loads(line)["kl"] == 0 for line in (tmp_path / "start.jsonl").read_text().splitlines())


def test_trl_gets_the_score_of_the_answer_alone(runs: Any, tiny_model: Callable[[str], Path]) -> None:
    """Padded as TRL pads: prompts on the left, answers on the right, padded positions masked."""
    from alignkit.data import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model("llama")), None)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in ("an awful start, and", "so")]
    answers = [tokenizer(answer)["input_ids"] for answer in (" it was wonderful", " it was awful and long")]
    width = max(map(len, prompts)), max(map(len, answers))
    rows = [
        [0] * (width[0] - len(p)) + p + a + [0] * (width[1] - len(a)) for p, a in zip(prompts, answers, strict=True)
    ]
    mask = [
        [False] * (width[0] - len(p)) + [True] * len(p + a) + [False] * (width[1] - len(a))
        for p, a in zip(prompts, answers, strict=True)
    ]
    model = runs.RewardText(tokenizer, prompts)
    hidden = getattr(model, model.base_model_prefix)(torch.tensor(rows), torch.tensor(mask)).hidden_states[-1]
    scores = model.score(hidden)

    assert scores.shape == (2, sum(width), 1)
    assert scores[:, -1, 0].tolist() == pytest.approx(runs.score([], [" it was wonderful", " it was awful and long"]))
    assert scores[0, 0, 0] > 0 > scores[1, 0, 0]


def test_every_method_trains_from_the_start_and_leaves_policies_that_moved(
    frontier: Any, runs: Any, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PPO runs in ``test_docs.py``; TRL 1.12 is not installed."""
    (tmp_path / "sentiment.py").write_text("def score(prompts, answers):\n    return [len(a) / 9 for a in answers]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sentiment", raising=False)
    small = {"iterations": 1, "batch-size": 8, "response-length": 4, "points": 2, "samples": 1}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["frontier.py", str(tmp_path), *words])
    options = frontier.options_of_command_line()
    for name in ("prompts", "held-out"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "The film was"}\n{"prompt": "I saw"}\n')
    rankings = [{"prompt": f"I saw {n}", "responses": [" it", " that"], "ranks": [0, 1]} for n in range(32)]
    (tmp_path / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rankings))
    runs.save_start(str(tiny_model("llama")), tmp_path / "start")

    for name, method in frontier.METHODS.items():
        if name in ("ppo", "trl"):
            continue
        (plan,) = runs.plans(method, options, tmp_path / f"{name}-0", seed=0)
        assert plan.config.stage.component.name == method.stage
        assert plan.config.parents["policy"] == "base"
        frontier.run(options, name, 0)

        assert frontier.is_finished(options, name, 0)
        assert runs.plans(method, options, tmp_path / f"{name}-0", seed=0) == []  # a finished run is not trained again
        for number in (1, 2):
            weights = load_file(tmp_path / f"{name}-0" / f"policy-{number}" / "adapter_model.safetensors")
            assert any(tensor.any() for key, tensor in weights.items() if "lora_B" in key), (name, number)
