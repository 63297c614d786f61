"""DPO: its losses by hand and beside TRL's, pairs, references, the shared prompt, exact resume, held-out figures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkit import PreferenceLogps
from alignkit.cli import main
from alignkit.data.encoding import Branches, Ranked
from alignkit.models import fused_head
from alignkit_dpo import alignkit_loss, losses
from alignkit_dpo.config import BetaConfig, RobustConfig, SimpoConfig
from alignkit_dpo.pairs import Collator, pairs_of

RANKINGS = [
    {
        "prompt": f"What is {n} and one?",
        "responses": ["Count on!", f"It is {n + 1}. Count on!", f"{n + 1}", "No idea. " * (n % 3 + 1)][: n % 3 + 2],
        "ranks": [2, 0, 1, 2][: n % 3 + 2],
    }
    for n in range(16)
]
LN_2 = pytest.approx(math.log(2), abs=1e-6)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# --- losses by hand --------------------------------------------------------------------------------------------------

# log-ratios 1 and -0.5, 2 and 5 tokens
PAIR = PreferenceLogps(*(torch.tensor([x]) for x in (-1.0, -3.0, -2.0, -2.5)), torch.tensor([2]), torch.tensor([5]))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.sigmoid(BetaConfig(0.1)), softplus(-0.15)),
        (losses.ipo(BetaConfig(0.1)), (0.5 + 0.1 - 5) ** 2),
        (losses.hinge(BetaConfig(0.1)), 0.85),
        (losses.hinge(BetaConfig(1.0)), 0),
        (losses.robust(RobustConfig(0.1, 0.2)), (0.8 * softplus(-0.15) - 0.2 * softplus(0.15)) / 0.6),
        (losses.simpo(SimpoConfig(2.0, 1.0)), softplus(-(2 * (-0.5 + 0.6) - 1))),
    ],
)
def test_losses_by_hand(loss: losses.Function, expected: float) -> None:
    assert loss(PAIR).loss.item() == pytest.approx(expected, abs=1e-6)


def test_simpo_is_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    torch.manual_seed(0)
    chosen, rejected = -10 * torch.rand(2, 32)
    lengths = torch.randint(1, 9, (2, 32))
    trainer = SimpleNamespace(alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=1.5, label_smoothing=0.0)
    trainer.accelerator = SimpleNamespace(device="cpu")
    theirs, _, _ = CPOTrainer.cpo_loss(trainer, chosen / lengths[0], rejected / lengths[1])
    ours = losses.simpo(SimpoConfig(1.5, 0.7))(PreferenceLogps(chosen, rejected, None, None, *lengths)).loss

    assert abs(ours - theirs.mean()) < 1e-6


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_a_ranking_is_all_its_pairs_but_ties() -> None:
    ranked = Ranked([], Branches([1, 2], [[3], [4, 5], [6]]), [1.0, 0.0, 1.0])

    assert [(p["chosen_ids"], p["rejected_ids"], p["number"]) for p in pairs_of([ranked])] == [
        ([4, 5], [3], 0),
        ([4, 5], [6], 0),
    ]


def test_a_batch_holds_each_answer_once() -> None:
    pairs = pairs_of([Ranked([], Branches([1, 2], [[3], [4, 5], [6]]), [0.0, 1.0, 2.0])])
    batch = Collator(pad=9)(pairs)

    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [1, 2, 4, 5], [1, 2, 6, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100], [-100, -100, 4, 5], [-100, -100, 6, -100]]
    assert batch["pairs"].tolist() == [[0, 1], [0, 2], [1, 2]]
    assert batch["lengths"].tolist() == [1, 2, 1]
    tree = Collator(pad=9, tree=torch.float32)(pairs)
    assert tree["input_ids"].tolist() == [[1, 2, 3, 2, 4, 5, 2, 6]]  # each branch begins with the prompt's last token
    assert tree["position_ids"].tolist() == [[0, 1, 2, 1, 2, 3, 1, 2]]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """``arguments("train.max_steps=1")``: the words of a small DPO run of a tiny model."""

    def words(*more: str, model: str = "llama", output: str = "out", rows: Any = RANKINGS) -> list[str]:
        data = tmp_path / "rankings.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["--plugin", "dpo", "--model", str(tiny_model(model)), "--output", str(tmp_path / output)]
        given += ["--data", str(data), "train.per_device_train_batch_size=2", "train.use_cpu=true"]
        given += ["data.eval_size=4", "dpo.response_length=4"]
        base = [] if any("dpo.policy" in argument for argument in more) else ["dpo.policy=base"]
        return [*given, *base, *more]

    return words


@pytest.fixture
def train_dpo(arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``train_dpo("--plugin", "lora")``: a DPO run in this process -> its folder."""
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")

    def run(*more: str, output: str = "out", **others: Any) -> Path:
        assert main(["--debug", "train", *arguments(*more, output=output, **others)]) == 0
        return tmp_path / output / "dpo"

    return run


@pytest.fixture
def build(arguments: Callable[..., list[str]]) -> Callable[..., Any]:
    """``build("--plugin", "lora")``: the trainer of a DPO run, not yet trained."""
    from alignkit.cli.common import read_arguments
    from alignkit.runs.plan import pipeline
    from alignkit.training.run import Run

    def make(*more: str, **others: Any) -> Any:
        words, flags, overrides, plugins = arguments(*more, **others), dict[str, str](), list[str](), list[str]()
        while words:
            word = words.pop(0)
            if word == "--plugin":
                plugins.append(words.pop(0))
            elif word.startswith("--"):
                flags[word] = words.pop(0)
            else:
                overrides.append(word)
        asked = read_arguments(plugins, None, flags["--model"], flags["--data"], flags["--output"], overrides)
        run = Run(pipeline(*asked).to_train[-1], print)
        run.folder.mkdir(parents=True, exist_ok=True)
        return run.config.stage.component.build(run)

    return make


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


def logged(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(next(folder.glob("*.safetensors"))))


# --- beside TRL ------------------------------------------------------------------------------------------------------


def moved(trainer: Any) -> Any:
    """The trainer, its policy no longer its reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return trainer


def trls_loss(trainer: Any, pairs: list[dict[str, Any]]) -> torch.Tensor:
    """What TRL's own method gives, with its own collator, forward and reference."""
    import trl
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    inputs = trainer._prepare_inputs(DataCollatorForPreference(trainer.data_collator.pad)(pairs))
    loss: torch.Tensor = trl.DPOTrainer._compute_loss(trainer, trainer.model.train(), inputs, False)
    return loss


def our_loss(trainer: Any, pairs: list[dict[str, Any]]) -> torch.Tensor:
    loss: torch.Tensor = trainer.compute_loss(
        trainer.model.train(), trainer.data_collator(pairs), num_items_in_batch=len(pairs)
    )
    return loss


@pytest.mark.parametrize(("tuner", "shared"), [("lora", "true"), ("full", "false")])
def test_every_loss_is_trls_on_the_same_batch(build: Callable[..., Any], tuner: str, shared: str) -> None:
    trainer = moved(build("--plugin", tuner, "train.bf16=false", f"dpo.shared_prompt={shared}"))
    pairs = list(trainer.train_dataset)[:7]
    named = {loss.name: loss for loss in alignkit_loss() if loss.name != "simpo"}

    assert len(named) == 15
    assert trainer.data_collator.tree is (torch.float32 if shared == "true" else None)
    for name, component in named.items():
        config = component.config()
        settings = dataclasses.asdict(config)
        trainer.loss, trainer.loss_types = component.build(config), [name]
        trainer.beta = settings.get("beta", 0.1)
        trainer.label_smoothing = settings.get("label_smoothing", 0.0)
        trainer.args.discopop_tau = settings.get("discopop_tau", 0.05)
        ours, theirs = our_loss(trainer, pairs), trls_loss(trainer, pairs)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5, rel=1e-5), name
        assert ours.item() != pytest.approx(math.log(2), abs=1e-4), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma"])
def test_gradients_are_trls_with_a_shared_prompt_and_without(build: Callable[..., Any], architecture: str) -> None:
    for shared in ("true", "false"):
        settings = ["--plugin", "lora", "train.bf16=false", f"dpo.shared_prompt={shared}"]
        trainer = moved(build(*settings, model=architecture, output=shared))
        pairs = list(trainer.train_dataset)[:4]
        found = []
        for loss in (our_loss, trls_loss):
            trainer.model.zero_grad()
            loss(trainer, pairs).backward()
            found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


# --- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("below", "above", "kind"),
    [
        ("full", "full", "model"),
        ("lora", "lora", "adapter"),
        ("qlora", "qlora", "adapter"),
        ("full", "lora", "base"),
        ("lora", "full", "model"),
    ],
)
def test_the_reference_is_the_sft_run_whatever_it_is_made_of(
    train_dpo: Callable[..., Path], train: Callable[..., Path], below: str, above: str, kind: str
) -> None:
    sft = train("--plugin", below, "train.max_steps=4", "train.learning_rate=0.01", output="sft")
    settings = ["--plugin", above, f"dpo.policy={sft}", "train.max_steps=3", "train.learning_rate=0.001"]
    dpo = train_dpo(*settings, "train.logging_steps=1", "train.gradient_checkpointing=true")
    metrics = record(dpo)["metrics"]

    assert metrics["first_eval_loss"] == LN_2
    assert metrics["first_eval_kl"] == 0
    assert logged(dpo, "loss")[0] == LN_2
    assert logged(dpo, "loss")[1] != LN_2
    assert metrics["eval_loss"] != LN_2
    assert metrics["eval_kl"] != 0
    assert record(dpo)["parents"]["policy"]["folder"] == str(sft)
    assert not (dpo / "ref").exists()


def test_the_reference_takes_the_path_of_the_policy_under_autocast(build: Callable[..., Any]) -> None:
    """accelerate wraps the frozen copy's forward in autocast: its fused head, measured in bf16, seemed to be wrong."""
    trainer = build("--plugin", "full", "train.bf16=true")

    assert fused_head.agrees(trainer.model)
    assert fused_head.agrees(trainer.ref_model)


def test_adapters_of_embeddings_are_in_the_reference(build: Callable[..., Any], train: Callable[..., Path]) -> None:
    """TRL's own copy leaves them out, and starts elsewhere than at ln 2."""
    modules = "tuner.target_modules=[q_proj,embed_tokens]"
    sft = train("--plugin", "lora", modules, "train.max_steps=4", "train.learning_rate=0.01", output="sft")
    trainer = build("--plugin", "lora", f"dpo.policy={sft}", modules, "train.bf16=false")
    pairs = list(trainer.train_dataset)[:4]

    assert our_loss(trainer, pairs).item() == LN_2


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("loss", ["simpo", "sft"])
def test_where_the_loss_needs_no_reference_none_is_in_memory(
    build: Callable[..., Any], train: Callable[..., Path], tuner: str, loss: str
) -> None:
    sft = train("--plugin", tuner, "train.max_steps=1", output="sft")
    settings = ["--plugin", tuner, f"dpo.policy={sft}"]
    without = build(*settings, f"loss.name={loss}", output="without")
    with_reference = build(*settings, output="with")

    def in_memory(trainer: Any) -> int:
        models = [trainer.model, *([trainer.ref_model] if trainer.ref_model else [])]
        return sum(p.numel() for model in models for p in model.parameters())

    trained = sum(p.numel() for p in without.model.parameters() if p.requires_grad)
    assert in_memory(with_reference) - in_memory(without) == trained
    assert without.ref_model is None
    assert math.isfinite(our_loss(without, list(without.train_dataset)[:2]).item())


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
def test_a_reference_that_spoke_before_training_says_the_same(
    train_dpo: Callable[..., Path], train: Callable[..., Path], sgd: None, tuner: str
) -> None:
    sft = train("--plugin", tuner, "train.max_steps=1", output="sft")
    settings = ["--plugin", tuner, "--plugin", "sgd", f"dpo.policy={sft}", "train.max_steps=3", "train.bf16=false"]
    live = train_dpo(*settings, "train.learning_rate=0.1", output="live")
    before = train_dpo(*settings, "train.learning_rate=0.1", "dpo.precompute_ref_log_probs=true", output="before")

    assert record(before)["metrics"]["first_eval_loss"] == LN_2
    assert record(before)["metrics"]["eval_loss"] == pytest.approx(record(live)["metrics"]["eval_loss"], abs=1e-6)
    for name, tensor in weights(live).items():
        torch.testing.assert_close(weights(before)[name], tensor)


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


def test_dpo_learns_the_order_and_says_so(train_dpo: Callable[..., Path]) -> None:
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
    assert [set(row) for row in table] == [{"prompt", "before", "after", "kl"}] * 4
    assert any(row["before"] != row["after"] for row in table)
    assert sum(row["kl"] for row in table) / 4 == pytest.approx(metrics["eval_kl"], abs=1e-3)


# --- data and losses by name -----------------------------------------------------------------------------------------


def test_an_answer_too_long_is_an_error_or_left_out_as_told(
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
    assert "1 of 18 rankings are all ties: left out" in said


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
    arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--plugin", "sft", *arguments()]) == 0
    assert "loss  sigmoid" in capsys.readouterr().out
    assert main(["check", *arguments("loss.name=sft")]) == 0
    assert "loss  sft" in capsys.readouterr().out


def test_several_processes_do_not_precompute(
    arguments: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert main(["train", *arguments("dpo.precompute_ref_log_probs=true")]) == 2
    assert "in a file of one process alone" in capsys.readouterr().err


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
        (["--plugin", "full", "--plugin", "simpo"], "policy alone, the loss needs no reference"),
        (["--plugin", "full", "dpo.precompute_ref_log_probs=true"], "policy alone, the reference speaks once before"),
    ],
)
def test_the_plan_says_what_the_reference_costs(
    arguments: Callable[..., list[str]], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *arguments(*words)]) == 0
    assert f"in memory  {said}" in capsys.readouterr().out


def test_sft_is_trained_first_where_there_is_none(arguments: Callable[..., list[str]], capsys: Any) -> None:
    words = [word for word in arguments("dpo.policy=null") if word != "dpo.policy=null"]

    assert main(["train", *words, "--plan"]) == 0
    said = capsys.readouterr().out
    assert said.index("stage  sft") < said.index("stage  dpo")
    assert "(trained first)" in said
