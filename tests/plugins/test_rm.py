"""The reward model: its losses by hand, groups, the shared prompt, the head's way to the disk and back, the verdict."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignkit import NoConfig, RankedScores, Ranking
from alignkit.cli import main
from alignkit.data.encoding import Branches, Ranked
from alignkit.models import branches
from alignkit_rm import losses, metrics
from alignkit_rm.config import BradleyTerryConfig
from alignkit_rm.groups import merge_pairs
from alignkit_rm.normalise import constant_direction
from alignkit_rm.trainer import collate, ranked

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma"]
RANKINGS = [
    {
        "prompt": f"What is {n} and one?",
        "responses": ["Count on!", f"It is {n + 1}. Count on!", f"{n + 1}", "No idea. " * (n % 3 + 1)][: n % 3 + 2],
        "ranks": [2, 0, 1, 2][: n % 3 + 2],
    }
    for n in range(16)
]


def batch(scores: list[float], rank: list[float], group: list[int] | None = None, margin: Any = None) -> RankedScores:
    return RankedScores(
        torch.tensor(scores, requires_grad=True),
        torch.tensor(group or [0] * len(scores)),
        torch.tensor(rank),
        None if margin is None else torch.tensor(margin),
    )


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# --- losses ----------------------------------------------------------------------------------------------------------


def test_bradley_terry_is_the_mean_over_pairs_then_over_groups() -> None:
    # group 0: 2 > 1 > 0 (three pairs); group 1: 3 > 0.5 (one pair)
    both = batch([1.0, 2.0, 0.0, 3.0, 0.5], [1, 0, 2, 0, 1], [0, 0, 0, 1, 1])
    first = (softplus(-1) + softplus(-1) + softplus(-2)) / 3
    second = softplus(-2.5)

    assert losses.bradley_terry(BradleyTerryConfig())(both).loss.item() == pytest.approx((first + second) / 2)


def test_ties_make_no_pair() -> None:
    loss = losses.bradley_terry(BradleyTerryConfig())(batch([1.0, 5.0, 0.0], [0, 0, 1])).loss

    assert loss.item() == pytest.approx((softplus(-1) + softplus(-5)) / 2)


def test_a_margin_is_what_a_pair_must_differ_by() -> None:
    scores = batch([1.0, 0.0], [0, 1], margin=[3.0, 0.5])

    assert losses.bradley_terry(BradleyTerryConfig())(scores).loss.item() == pytest.approx(softplus(-(1 - 2.5)))
    assert losses.bradley_terry(BradleyTerryConfig(margin=False))(scores).loss.item() == pytest.approx(softplus(-1))


def test_centering_adds_the_square_of_the_sum() -> None:
    loss = losses.bradley_terry(BradleyTerryConfig(centering=0.1))(batch([2.0, 1.0], [0, 1])).loss

    assert loss.item() == pytest.approx(softplus(-1) + 0.1 * 9)


def test_at_k_2_the_loss_is_trls() -> None:
    """TRL's: -logsigmoid(chosen - rejected).mean(), with its margin and its centering, on the same scores."""
    torch.manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 64).double()
    trl = -torch.nn.functional.logsigmoid(chosen - rejected - margin).mean() + 0.01 * ((chosen + rejected) ** 2).mean()
    ours = RankedScores(
        scores=torch.stack([chosen, rejected], 1).flatten(),
        group=torch.arange(64).repeat_interleave(2),
        rank=torch.tensor([0, 1]).repeat(64),
        margin=torch.stack([margin, torch.zeros(64)], 1).flatten(),
    )
    loss = losses.bradley_terry(BradleyTerryConfig(centering=0.01))(ours).loss

    assert abs(loss.item() - trl.item()) < 1e-6


def test_plackett_luce_draws_the_best_of_the_rest() -> None:
    # 2 first of {2, 1, 0}, then 1 of {1, 0}
    first = math.log(math.exp(2) + math.exp(1) + math.exp(0)) - 2
    second = math.log(math.exp(1) + math.exp(0)) - 1
    loss = losses.plackett_luce(NoConfig())(batch([1.0, 2.0, 0.0], [1, 0, 2])).loss

    assert loss.item() == pytest.approx((first + second) / 2)


def test_plackett_luce_of_pairs_is_bradley_terry() -> None:
    pairs = batch([1.0, 0.3, -2.0, 0.7], [0, 1, 1, 0], [0, 0, 1, 1])

    assert losses.plackett_luce(NoConfig())(pairs).loss.item() == pytest.approx(
        losses.bradley_terry(BradleyTerryConfig())(pairs).loss.item()
    )


# --- groups ----------------------------------------------------------------------------------------------------------


def pair(better: str, worse: str, prompt: str = "p") -> Ranking:
    return Ranking([{"role": "user", "content": prompt}], [better, worse], [0.0, 1.0])


def told(rankings: list[Ranking]) -> list[dict[str, float]]:
    return [dict(zip(r.answers, r.ranks, strict=True)) for r in rankings]


def test_pairs_of_one_prompt_become_one_ranking() -> None:
    assert told(merge_pairs([pair("a", "b"), pair("b", "c"), pair("x", "y", "q"), pair("a", "c")])) == [
        {"a": 0, "b": 1, "c": 2},
        {"x": 0, "y": 1},
    ]
    assert told(merge_pairs([pair("a", "b"), pair("a", "c")])) == [{"a": 0, "b": 1, "c": 1}]


@pytest.mark.parametrize("k", [4, 9])
def test_all_pairs_of_a_ranking_become_that_ranking_in_any_order(k: int) -> None:
    answers = [f"answer {rank}" for rank in range(k)]
    pairs = [pair(*two) for two in itertools.combinations(answers, 2)]

    for seed in range(5):
        assert told(merge_pairs(random.Random(seed).sample(pairs, len(pairs)))) == [
            {answer: rank for rank, answer in enumerate(answers)}
        ]


def test_pairs_that_no_ranking_says_stay_apart() -> None:
    assert told(merge_pairs([pair("a", "b"), pair("c", "d")])) == [{"a": 0, "b": 1}, {"c": 0, "d": 1}]
    assert told(merge_pairs([pair("a", "b"), pair("b", "a")])) == [{"a": 0, "b": 1}, {"b": 0, "a": 1}]


def test_pairs_with_margins_stay_as_they_are() -> None:
    rows = [Ranking(pair("a", "b").prompt, ["a", w], [0.0, 1.0], [m, 0.0]) for w, m in (("b", 1.0), ("c", 2.0))]

    assert merge_pairs(rows) == rows


def test_a_batch_may_hold_groups_of_different_k_and_some_margins() -> None:
    groups = [
        Ranked([], Branches([1], [[2], [3, 3], [4]]), [5.0, 1.0, 5.0]),
        Ranked([], Branches([1], [[2], [3]]), [0.0, 1.0], [2.0, 0.0]),
    ]
    scores = ranked(groups, torch.arange(5.0))

    assert scores.group.tolist() == [0, 0, 0, 1, 1]
    assert scores.rank.tolist() == [5, 1, 5, 0, 1]
    assert scores.margin is not None
    assert scores.margin.tolist() == [0, 0, 0, 2, 0]
    assert collate(groups)["labels"].tolist() == [
        [[1, 1], [0, 2], [1, 1]],
        [[0, 1], [1, 1], [-1, -1]],
    ]


# --- the shared prompt -----------------------------------------------------------------------------------------------

GROUPS = [
    Branches([5, 6, 7, 8], [[9, 10], [11, 12, 13, 14, 0], [15, 0]]),
    Branches([20, 21], [[9, 10, 0]]),
    Branches([30], [[1, 2, 3, 4, 5, 6, 0], [7, 0]]),
]


def reward_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
    return branches.with_scores(model.eval())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shared_prompt_gives_the_scores_of_separate_forwards(
    tiny_model: Callable[..., Path], architecture: str
) -> None:
    model = reward_model(tiny_model(architecture))
    one_by_one = torch.cat(
        [branches.scores(model, branches.separate([Branches(g.prompt, [a])], 0)) for g in GROUPS for a in g.answers]
    )

    assert branches.supports_tree(model.config, 16)
    torch.testing.assert_close(branches.scores(model, branches.separate(GROUPS, 0)), one_by_one)
    torch.testing.assert_close(branches.scores(model, branches.tree(GROUPS, 0, torch.float32)), one_by_one)


def test_a_shared_prompt_gives_the_gradients_of_separate_forwards(tiny_model: Callable[..., Path]) -> None:
    def gradient(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        model = reward_model(tiny_model())
        (branches.scores(model, inputs) * torch.arange(6.0)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(
        gradient(branches.tree(GROUPS, 0, torch.float32)), gradient(branches.separate(GROUPS, 0)), rtol=1e-4, atol=1e-5
    )


def test_short_groups_share_a_row() -> None:
    groups = [Branches([1] * n, [[2], [3]]) for n in (1, 8, 2, 3)]  # 3, 10, 4 and 5 tokens

    assert branches.pack(groups) == [(2, 0), (0, 0), (1, 5), (1, 0)]
    assert branches.tree(groups, 0, torch.float32)["input_ids"].shape == (3, 10)


def test_windows_alibi_and_other_attentions_do_without_a_shared_prompt() -> None:
    from types import SimpleNamespace as Config

    assert branches.supports_tree(Config(_attn_implementation="sdpa"), 100)
    assert not branches.supports_tree(Config(_attn_implementation="flash_attention_2"), 100)
    assert not branches.supports_tree(Config(_attn_implementation="sdpa", alibi=True), 100)
    window = {"_attn_implementation": "sdpa", "sliding_window": 64}
    assert not branches.supports_tree(Config(**window), 100)
    assert branches.supports_tree(Config(**window), 64)
    assert branches.supports_tree(Config(**window, layer_types=["full_attention"]), 100)
    assert not branches.supports_tree(Config(_attn_implementation="sdpa", layer_types=["linear_attention"]), 10)


def test_the_saving_is_that_of_tokens_for_long_prompts() -> None:
    from types import SimpleNamespace as Config

    config = Config(hidden_size=4096, num_hidden_layers=32, intermediate_size=11008)
    group = Branches([0] * 100, [[0] * 20] * 9)

    assert branches.saving([group], config) == pytest.approx(9 * 120 / 280, rel=0.02)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def train_rm(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``train_rm("--plugin", "lora")``: a reward run of a tiny model in this process -> its folder."""
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")

    def run(*arguments: str, model: str = "llama", output: str = "out", rows: Any = RANKINGS) -> Path:
        data = tmp_path / "rankings.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["--plugin", "rm", "--model", str(tiny_model(model)), "--output", str(tmp_path / output)]
        if not any("rm.policy" in argument or "--config" in argument for argument in arguments):
            given.append("rm.policy=base")
        small = ["train.per_device_train_batch_size=2", "data.eval_size=4", "train.use_cpu=true"]
        assert main(["--debug", "train", *given, "--data", str(data), *small, *arguments]) == 0
        return tmp_path / output / "rm"

    return run


@pytest.fixture
def sgd(install: Callable[..., None]) -> None:
    """An optimizer whose step is the gradient, so that equal steps mean equal gradients."""
    install(
        "sgd",
        """
        from alignkit import Optimizer, hookimpl

        def build(config, args):
            import torch
            return torch.optim.SGD, {"lr": args.learning_rate}

        @hookimpl
        def alignkit_optimizer():
            return [Optimizer(name="sgd", summary="plain gradient descent", build=build)]
        """,
    )


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "alignkit.json").read_text()))


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
    folder = train_rm("--plugin", tuner, "train.max_steps=6", "train.learning_rate=0.01", "train.bf16=false")
    rows = [(f"What is {n} and one?", f"It is {n + 1}. " + "Count on! " * n) for n in range(5)]
    file, scored = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "response": a}) + "\n" for p, a in rows))

    from alignkit.models import device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "run_dtype", lambda train: torch.float32)
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


# --- data ------------------------------------------------------------------------------------------------------------


def test_rankings_that_are_all_ties_are_left_out_and_counted(
    train_rm: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tied = {"prompt": "Tie?", "responses": ["a", "b"], "ranks": [1, 1]}
    train_rm("train.max_steps=1", rows=[*RANKINGS, tied, tied])

    assert "rankings are all ties: left out" in capsys.readouterr().out


def test_an_answer_too_long_is_an_error_or_left_out_as_told(
    train_rm: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*RANKINGS, {"prompt": "Long?", "responses": ["a", "b", "long " * 90], "ranks": [0, 1, 2]}]
    with pytest.raises(AssertionError):
        train_rm("rm.max_length=80", "train.max_steps=1", "data.eval_size=0", rows=rows)
    assert re.search(r"error: 1 of \d+ answers are over 80 tokens", capsys.readouterr().err)
    train_rm("rm.max_length=80", "rm.too_long=skip", "train.max_steps=1", "data.eval_size=0", "--overwrite", rows=rows)


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": f"p{n}", "chosen": "good answer", "rejected": "bad"} for n in range(8)],
        [{"prompt": f"p{n}", "chosen": "good answer", "rejected": "bad", "margin": n} for n in range(8)],
        [
            {"chosen": f"\n\nHuman: p{n}\n\nAssistant: a", "rejected": f"\n\nHuman: p{n}\n\nAssistant: b"}
            for n in range(8)
        ],
        [
            {
                "conversations": [{"from": "human", "value": f"p{n}"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            }
            for n in range(8)
        ],
        [{"prompt": f"p{n}", "responses": list("abcdefghi"), "ranks": [*range(8), None]} for n in range(8)],
    ],
    ids=["preference", "margins", "hh-rlhf", "sharegpt", "ranking"],
)
def test_every_format_of_preferences_trains(train_rm: Callable[..., Path], rows: Any) -> None:
    assert record(train_rm("train.max_steps=1", "data.eval_size=2", rows=rows))["steps"] == 1


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_bloom_which_takes_no_mask_of_ours_is_trained_without(
    train_rm: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Say {n}. " * 9, "responses": [f"good {n}", f"bad {n}"], "ranks": [0, 1]} for n in range(16)]
    train_rm("--plugin", "full", "train.max_steps=1", model="bloom", rows=rows)

    assert "shared prompt" not in capsys.readouterr().out


def test_one_held_out_prompt_tells_nothing_and_is_written_as_json(train_rm: Callable[..., Path]) -> None:
    folder = train_rm("--plugin", "lora", "train.max_steps=1", "data.eval_size=1")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for text in [(folder / "alignkit.json").read_text(), *(folder / "metrics.jsonl").read_text().splitlines()]:
        json.loads(text, parse_constant=refuse)
    assert record(folder)["verdict"].startswith("usability for PPO is unknown")


def test_rows_of_one_prompt_are_one_prompt_in_the_error() -> None:
    scores, ranks, lengths = np.array([[1.0, 0.0], [0.0, 1.0]] * 2), np.array([[0, 1]] * 4), np.ones((4, 2))

    assert metrics.evaluate(scores, ranks, lengths)["accuracy_error"] == pytest.approx(
        math.sqrt(4 * 0.5**2 * 4 / 3) / 4
    )
    together = metrics.evaluate(scores, ranks, lengths, prompts=[0, 1, 0, 1])
    assert together["accuracy_error"] == pytest.approx(math.sqrt(2 * 1**2 * 2 / 1) / 4)


def test_demonstrations_that_all_score_the_same_cannot_be_the_measure(
    train_rm: Callable[..., Path], train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = tmp_path / "same.jsonl"
    same.write_text(json.dumps({"prompt": "Hi", "response": "Hello"}) + "\n")
    sft = train("--plugin", "full", "--data", str(same), "data.eval_size=0", "train.max_steps=1", output="sft")

    with pytest.raises(AssertionError):
        train_rm("--plugin", "full", f"rm.policy={sft}", "train.max_steps=1")
    assert "cannot be normalised: it is the same for all 1 demonstrations" in capsys.readouterr().err


def test_metrics_by_hand() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [0.0, 1.0, 0.0]])
    ranks = np.array([[0, 1, 2], [0, 1, -1]])
    lengths = np.array([[9, 6, 3], [4, 4, -1]])
    found = metrics.evaluate(scores, ranks, lengths)

    assert found["pairs"] == 4
    assert found["accuracy"] == 3 / 4
    # deviations of the groups' sums from the mean: 3 - 3 * .75 = .75 and 0 - .75
    assert found["accuracy_error"] == pytest.approx(math.sqrt(2 * 0.75**2 * 2) / 4)
    assert found["accuracy_distance_1"] == pytest.approx(2 / 3)
    assert found["accuracy_distance_2"] == 1
    assert found["length_correlation"] == pytest.approx(1 - 0.1, abs=0.12)
    assert found["length_accuracy"] == pytest.approx(3.5 / 4)
    assert found["score_mean"] == pytest.approx(7 / 5)


def test_calibration_is_zero_where_confidence_is_right() -> None:
    difference = math.log(3)  # sigmoid gives 3/4: right three times in four
    scores = np.array([[difference, 0.0]] * 3 + [[0.0, difference]])
    found = metrics.evaluate(scores, np.array([[0, 1]] * 4), np.ones((4, 2)))

    assert found["ece"] == pytest.approx(0, abs=1e-9)
    assert metrics.evaluate(scores * 100, np.array([[0, 1]] * 4), np.ones((4, 2)))["ece"] == pytest.approx(0.25)
    assert metrics.evaluate(scores * 100, np.array([[0, 1]] * 4), np.ones((4, 2)), scale=0.01)["ece"] < 1e-9


def judged(**changed: float) -> str:
    good = {"accuracy": 0.8, "accuracy_error": 0.02, "pairs": 400, "ece": 0.05}
    good |= {"length_correlation": 0.2, "length_accuracy": 0.55}
    return metrics.verdict({f"eval_{name}": value for name, value in {**good, **changed}.items()})


def test_the_verdict_says_whether_and_why_not() -> None:
    assert judged() == "usable for PPO: 80.0% ± 2.0% of 400 held-out pairs are ordered rightly"
    assert "not usable for PPO" in judged(accuracy=0.53)
    assert "no better than chance" in judged(accuracy=0.8, accuracy_error=0.2)
    assert "with care" in judged(length_accuracy=0.9)
    assert "length alone orders 90.0%" in judged(length_accuracy=0.9)
    assert "follows length" in judged(length_correlation=-0.9)
    assert "calibration error 0.30" in judged(ece=0.3)
