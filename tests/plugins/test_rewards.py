"""Rewards: sums and ensembles of reward models, classifiers, and what is checked of them before anything is trained."""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit import Answers, ConfigError, PluginError
from alignkit.cli import main
from alignkit.cli.common import read_arguments
from alignkit.runs.plan import pipeline
from alignkit.testing import DEMONSTRATIONS
from alignkit_rewards import classify

PROMPTS = [f"p{n}" for n in range(8)]
TEXTS = ["e e e", "b", "e c", "b b b b e", "c", "e", "b c e", "c c"]


def write(file: str, rows: list[dict[str, Any]]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an SFT run and two reward runs of each of lora and full."""
    folder, here = tmp_path_factory.mktemp("rewards"), Path.cwd()
    os.chdir(folder)
    try:
        shutil.copytree(tiny_model(), "base")
        write("prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
        write("demos.jsonl", DEMONSTRATIONS)
        ranks = {"a": [0, 2, 1], "b": [2, 0, 1]}
        for which, of in ranks.items():
            rows = [{"prompt": f"p{n}", "responses": ["e e e", "b", "e c"], "ranks": of} for n in range(12)]
            write(f"{which}.jsonl", rows)
        for tuner in ("lora", "full"):
            common = ["--plugin", tuner, "--model", "base", "train.use_cpu=true", "train.max_steps=8"]
            common += ["train.learning_rate=0.003", "train.bf16=false", "data.eval_size=2"]
            assert main(["train", "--plugin", "sft", "--data", "demos.jsonl", "--output", tuner, *common]) == 0
            for which in ranks:
                output = ["--output", f"{tuner}-{which}"]
                given = ["--data", f"{which}.jsonl", f"rm.policy={tuner}/sft", *output]
                assert main(["train", "--plugin", "rm", *given, *common]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder of the test's own, beside links to what is trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    for each in trained.iterdir():
        Path(each.name).symlink_to(each)
    return tmp_path


def run_of(tuner: str, *settings: str) -> Any:
    """A PPO run that is ready to train, and its reward, which is given the run's roles."""
    from alignkit.models.trunk import assemble
    from alignkit.training.run import Run

    given = [f"ppo.policy={tuner}/sft", "train.bf16=false", "train.use_cpu=true", "data.eval_size=2", *settings]
    run = Run(
        pipeline(*read_arguments(["ppo", tuner], None, "base", "prompts.jsonl", "out", given)).to_train[-1], print
    )
    score = run.reward()
    roles = assemble(run, value="adapter", temperature=1.0).eval()
    return run, functools.partial(score, roles=roles)


def answers_of(run: Any) -> Answers:
    from alignkit.data.chat_template import encode_answer

    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    encoded = [encode_answer(run.tokenizer, *both, run.stop_ids) for both in zip(prompts, TEXTS, strict=True)]
    return Answers(prompts, TEXTS, [ids[:start] for ids, start in encoded], [ids[start:] for ids, start in encoded])


def plain_scores(folder: str, answers: Answers) -> list[float]:
    """The scores by plain Transformers and PEFT, an answer at a time."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    if Path(folder, "adapter_config.json").exists():
        base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=1)
        model = PeftModel.from_pretrained(base, folder).eval()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = [a + b for a, b in zip(answers.prompt_ids, answers.answer_ids, strict=True)]
        return [model(torch.tensor([row])).logits.item() for row in ids]


# --- sums and ensembles ----------------------------------------------------------------------------------------------

HALF = "[{name: reward-model, path: %s/rm, weight: 0.5}, {name: reward-model, path: %s/rm, weight: 0.25}]"


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_sum_of_two_reward_models_scores_by_both(folder: Path, tuner: str) -> None:
    run, score = run_of(tuner, "reward.name=sum", f"reward.parts={HALF % (f'{tuner}-a', f'{tuner}-b')}")
    answers = answers_of(run)
    a, b = (plain_scores(f"{tuner}-{which}/rm", answers) for which in "ab")

    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 0.5
    assert score(answers) == pytest.approx([0.5 * x + 0.25 * y for x, y in zip(a, b, strict=True)], abs=1e-4)
    assert run.config.reward.config.parts[1]["path"] == f"{tuner}-b/rm"
    assert {str(run.parents[role]) for role in ("reward", "reward_2")} == {f"{tuner}-a/rm", f"{tuner}-b/rm"}
    assert len([name for name in run.surroundings() if "reward" in name]) == 2  # --resume looks at both


def test_a_run_with_two_reward_models_is_recorded_and_known_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config that it recorded makes the same run."""
    parts = HALF % ("lora-a", "lora-b")
    given = [
        "--plugin",
        "lora",
        "--model",
        "base",
        "--data",
        "prompts.jsonl",
        "ppo.policy=lora/sft",
        "ppo.iterations=1",
    ]
    given += [
        "ppo.batch_size=4",
        "ppo.minibatches=1",
        "ppo.response_length=4",
        "data.eval_size=2",
        "train.use_cpu=true",
    ]
    given += ["reward.name=sum", f"reward.parts={parts}"]
    assert main(["train", "--plugin", "ppo", "--output", "out", *given]) == 0
    manifest = json.loads(Path("out/ppo/alignkit.json").read_text())

    assert {Path(manifest["parents"][role]["folder"]).parent.name for role in ("reward", "reward_2")} == {
        "lora-a",
        "lora-b",
    }
    for again in (["--output", "out", *given], ["--config", "out/ppo/config.yaml"]):
        capsys.readouterr()
        assert main(["train", "--plugin", "ppo", *again]) == 0
        assert "nothing to train: a finished run with these settings exists" in capsys.readouterr().out


def combined(by: str, scores: tuple[float, ...]) -> float:
    if by == "mean-std":
        return statistics.fmean(scores) - 0.5 * statistics.pstdev(scores)
    return min(scores) if by == "min" else statistics.fmean(scores)


@pytest.mark.parametrize("by", ["mean", "min", "mean-std"])
def test_an_ensemble_is_combined_as_asked(folder: Path, by: str) -> None:
    more = ["reward.std_coef=0.5"] if by == "mean-std" else []
    run, score = run_of("lora", "reward.name=ensemble", "reward.paths=[lora-a/rm, lora-b/rm]", f"reward.by={by}", *more)
    answers = answers_of(run)
    scores = zip(*(plain_scores(f"lora-{which}/rm", answers) for which in "ab"), strict=True)

    assert score(answers) == pytest.approx([combined(by, each) for each in scores], abs=1e-4)


def weights(model: Any) -> int:
    return sum({p.data_ptr(): p.numel() for n, p in model.named_parameters() if "lora_" not in n}.values())


@pytest.mark.parametrize(
    ("policy", "rewards", "planned", "models"),
    [
        ("lora", "lora", "policy, reference, value, reward, reward_2 on one base", 1),
        ("full", "lora", "policy, reference, value: a model each, reward, reward_2 on a base of their own", 4),
        ("lora", "full", "policy, reference, value on one base, reward by itself, reward_2 by itself", 3),
    ],
)
def test_reward_models_share_a_base_where_they_can(
    folder: Path, policy: str, rewards: str, planned: str, models: int
) -> None:
    from transformers import AutoModelForCausalLM

    paths = f"reward.paths=[{rewards}-a/rm, {rewards}-b/rm]"
    run, score = run_of(policy, "reward.name=ensemble", paths, "reward.by=mean")
    answers = answers_of(run)
    a, b = (plain_scores(f"{rewards}-{which}/rm", answers) for which in "ab")

    assert dict(run.plan.describe())["in memory"] == planned
    roles = score.keywords["roles"]
    assert len(roles.models) == models
    one = weights(AutoModelForCausalLM.from_pretrained("base"))
    assert weights(roles) < (models + 0.5) * one
    assert score(answers) == pytest.approx([statistics.fmean(both) for both in zip(a, b, strict=True)], abs=1e-4)


def test_a_reward_model_that_gets_no_roles_is_an_error(folder: Path) -> None:
    run, _ = run_of("lora", "reward.path=lora-a/rm")

    with pytest.raises(PluginError, match=r"the reward model in lora-a/rm was called without roles"):
        run.reward()(answers_of(run))


def test_a_part_without_a_path_takes_that_of_the_sum(folder: Path) -> None:
    parts = "[{name: reward-model}, {name: sum, parts: [{name: reward-model, weight: 2}], weight: 3}]"
    run, score = run_of("lora", "reward.name=sum", "reward.path=lora-b/rm", f"reward.parts={parts}")
    answers = answers_of(run)

    assert list(run.parents) == ["policy", "reward"]
    assert score(answers) == pytest.approx([7 * x for x in plain_scores("lora-b/rm", answers)], abs=1e-3)


def test_rewards_compute_on_the_device_of_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run says which it is; that there is CUDA says nothing of it."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=True: None)
    run, score = run_of("lora", "reward.path=lora-a/rm", "train.use_cpu=false")
    answers = answers_of(run)
    plain = plain_scores("lora-a/rm", answers)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    assert score(answers) == pytest.approx(plain, abs=1e-4)


def test_a_run_computes_on_whatever_accelerator_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignkit.models.device import run_device

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert run_device({}).type == "mps"
    assert run_device({"use_cpu": True}).type == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert run_device({}).type == "cpu"


def refused(capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    """What stops the plan, in which SFT and the reward model would be trained first."""
    capsys.readouterr()
    given = ["--model", "base", "--data", "prompts.jsonl", "--output", "new", *settings]
    assert main(["train", "--plugin", "ppo", "--plan", *given]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ("[{name: reward-modle}]", "Did you mean 'reward-model'"),
        ("[{weight: 2}]", "reward.parts[0] needs the name of a reward"),
        ("[{name: reward-model, pth: a}]", "unknown key reward.parts[0].pth. Did you mean 'path'"),
        ("[{name: reward-model}, {name: classifier}]", "reward 'classifier' needs reward.model"),
        ("[{name: function, call: 'os:nothing'}]", "os has no function nothing"),
        ("[{name: reward-model, weight: much}]", "reward.parts[0].weight must be a number, not 'much'"),
        ("[{name: reward-model, path: lora/sft}]", "reward.parts[0].path: lora/sft is a policy"),
        ("[{name: sum, parts: [{name: needy}]}]", "reward 'needy' needs nowhere_to_be_found, which is not installed"),
    ],
)
def test_the_parts_of_a_sum_are_checked_before_anything_is_trained(
    folder: Path, parts: str, said: str, capsys: pytest.CaptureFixture[str], install: Callable[..., None]
) -> None:
    install(
        "extra",
        """
        from alignkit import Reward, hookimpl

        @hookimpl
        def alignkit_reward():
            return [Reward(name="needy", summary="", requires=("nowhere_to_be_found",), build=lambda config, run: None)]
        """,
    )
    assert said in refused(capsys, "--plugin", "extra", "reward.name=sum", f"reward.parts={parts}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["reward.paths=[lora-a/rm]"], "needs reward.paths: two or more different run folders"),
        (["reward.paths=[lora-a/rm, lora-a/rm]"], "needs reward.paths: two or more different run folders"),
        (["reward.paths=[lora-a/rm, lora/sft]"], "reward.paths: lora/sft is a policy (stage sft), not a reward"),
        (["reward.paths=[lora-a/rm, lora-b/rm]", "reward.std_coef=2"], "has no effect without reward.by=mean-std"),
    ],
)
def test_an_ensemble_is_checked_before_anything_is_trained(
    folder: Path, settings: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "reward.name=ensemble", *settings)


# --- classifiers -----------------------------------------------------------------------------------------------------


def classifier_at(folder: str, base: Path, labels: list[str], **more: Any) -> Any:
    """A classifier of random weights with these labels, saved beside its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    names = dict(enumerate(labels))
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=names, num_labels=len(labels), **more)
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return model.eval()


def logits(model: Any, folder: str) -> torch.Tensor:
    """[B, labels] of plain Transformers, an answer at a time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [f"{prompt}\n{text}" for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


@pytest.mark.parametrize("label", ["POSITIVE", "1"])
def test_a_classifiers_score_is_the_logit_of_the_label_that_is_named(
    folder: Path, label: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = classifier_at("judge", folder / "base", ["NEGATIVE", "POSITIVE"])
    run, score = run_of("lora", "reward.name=classifier", "reward.model=judge", f"reward.label={label}")

    assert score(answers_of(run)) == pytest.approx(logits(model, "judge")[:, 1].tolist(), abs=1e-5)
    assert "score: logit of label 'POSITIVE' (1) of judge" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "label", "said"),
    [
        (
            "judge",
            None,
            "has 2 labels: set reward.label to the one whose logit counts: NEGATIVE (0), POSITIVE (1)",
        ),
        ("judge", "POSITVE", "judge has no label POSITVE. Did you mean 'POSITIVE'? Labels: NEGATIVE (0), POSITIVE (1)"),
        ("judge", "2", "judge has no label 2. Labels: NEGATIVE (0), POSITIVE (1)"),
        ("base", None, "base is a language model (LlamaForCausalLM) without a trained head for scores"),
        ("./nowhere", None, "reward.model: no folder ./nowhere"),
    ],
)
def test_a_classifier_is_checked_before_anything_is_trained(
    folder: Path, model: str, label: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier_at("judge", folder / "base", ["NEGATIVE", "POSITIVE"])
    named = [] if label is None else [f"reward.label={label}"]

    assert said in refused(capsys, "reward.name=classifier", f"reward.model={model}", *named)


def test_a_classifier_without_its_heads_weights_is_refused(folder: Path) -> None:
    """Transformers would make the head up, and PPO would train against noise."""
    from transformers import AutoModelForCausalLM

    shutil.copytree("base", "headless")
    AutoModelForCausalLM.from_pretrained("base").save_pretrained("headless")
    facts = json.loads(Path("headless/config.json").read_text())
    facts |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "id2label": {"0": "GOOD"}}
    Path("headless/config.json").write_text(json.dumps(facts))

    with pytest.raises(ConfigError, match=r"headless is no trained classifier, its files have no score\.weight"):
        run_of("lora", "reward.name=classifier", "reward.model=headless")


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_reward_run_as_a_classifier_scores_where_it_was_trained_to(folder: Path, tuner: str) -> None:
    """At the token that ends the answer, not at what the template writes after it."""
    run, score = run_of("lora", "reward.name=classifier", f"reward.model={tuner}-a/rm")
    answers = answers_of(run)

    assert score(answers) == pytest.approx(plain_scores(f"{tuner}-a/rm", answers), abs=1e-4)


def test_a_classifier_reads_an_end_of_sequence_that_is_its_pad_token_too(folder: Path) -> None:
    from transformers import AutoTokenizer

    model = classifier_at("judge", folder / "base", ["GOOD"])
    tokenizer = AutoTokenizer.from_pretrained("judge")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    tokenizer.save_pretrained("judge")
    run, score = run_of("lora", "reward.name=classifier", "reward.model=judge")
    texts = [f"{prompt}<eos>{text}<eos>" for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]

    assert score(answers_of(run)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_an_adapter_is_a_classifier_where_its_head_was_saved_with_it(folder: Path, task: str | None) -> None:
    """Without a task, PEFT saves the adapter alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    model = get_peft_model(base, LoraConfig(task_type=task, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained("adapter")
    settings = ["reward.name=classifier", "reward.model=adapter", "reward.label=2"]

    if task is None:
        with pytest.raises(ConfigError, match=r"adapter is no trained classifier, its files have no score\.weight"):
            run_of("lora", *settings)
        return
    run, score = run_of("lora", *settings)
    assert score(answers_of(run)) == pytest.approx(logits(model.eval(), "base")[:, 2].tolist(), abs=1e-5)


def test_the_head_of_a_bf16_classifier_computes_in_fp32(folder: Path) -> None:
    """In bf16 close scores would become the same."""
    model = classifier_at("half", folder / "base", ["GOOD"], dtype=torch.bfloat16)
    run, score = run_of("lora", "reward.name=classifier", "reward.model=half", "reward.batch=1")
    scores = score(answers_of(run))
    model.score.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))

    assert scores == pytest.approx(logits(model, "half")[:, 0].tolist(), abs=1e-6)
    assert any(torch.tensor(one).bfloat16().item() != one for one in scores)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_head_saved_in_fp32_is_not_rounded_beside_a_bf16_trunk(folder: Path, adapter: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    classifier_at("half", folder / "base", ["GOOD"], dtype=torch.bfloat16)
    model: Any = AutoModelForSequenceClassification.from_pretrained(Path("half").absolute(), dtype="auto")
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    head = next(p for name, p in model.named_parameters() if "score" in name and "original" not in name)
    head.data = torch.randn(head.shape)
    model.save_pretrained("judge" if adapter else "half")
    run: Any = SimpleNamespace(say=print, device="cpu")
    opened, _ = classify.load("judge" if adapter else "half", run)

    assert opened.get_input_embeddings().weight.dtype is torch.bfloat16
    assert any(torch.equal(p, head) for name, p in opened.named_parameters() if "score" in name)


def test_prompts_that_a_classifier_cannot_read_are_named_before_the_start(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    classifier_at("short", folder / "base", ["GOOD"])
    tokenizer = AutoTokenizer.from_pretrained("short")
    most = max(len(tokenizer(f"{prompt}\n")["input_ids"]) for prompt in PROMPTS)
    tokenizer.model_max_length = most + 5
    tokenizer.save_pretrained("short")
    settings = ["reward.name=classifier", "reward.model=short", "ppo.response_length"]
    run_of("lora", *settings[:2], "ppo.response_length=5")
    assert "warning" not in capsys.readouterr().out
    run_of("lora", *settings[:2], "ppo.response_length=6")
    said = f"reads {most + 5} tokens; the longest prompt has {most} and answers up to 6"
    assert said in capsys.readouterr().out
    tokenizer.model_max_length = most
    tokenizer.save_pretrained("short")
    with pytest.raises(ConfigError, match=f"reads {most} tokens, and the longest prompt alone has {most}"):
        run_of("lora", *settings[:2])


# --- answers that a reward refuses -----------------------------------------------------------------------------------

PICKY = """
def letters(prompts, answers):
    if any('e' in answer for answer in answers):
        raise ValueError('no e, please')
    return [float(len(answer)) for answer in answers]

def relative(prompts, answers):  # to the rest of the batch
    scores = letters(prompts, answers)
    return [score - sum(scores) / len(scores) for score in scores]

def other(prompts, answers):
    return [1000.0 if 'e' in answer else float(len(answer)) for answer in answers]

def none(prompts, answers):
    raise ValueError('never')
"""
PICKED = [
    *("--plugin", "lora", "--model", "base", "--data", "prompts.jsonl", "ppo.policy=lora/sft", "train.use_cpu=true"),
    *("train.bf16=false", "ppo.batch_size=8", "ppo.minibatches=2", "ppo.response_length=6", "data.eval_size=2"),
    *("train.per_device_train_batch_size=2", "train.learning_rate=1e-3", "reward.name=function"),
]


def picked(output: str, call: str, *settings: str) -> int:
    given = [*PICKED, "--output", output, f"reward.call=picky:{call}", *settings]
    return main(["train", "--plugin", "ppo", *given])


def test_refused_answers_are_found_one_by_one_and_the_rest_is_scored_together(folder: Path) -> None:
    Path("picky.py").write_text(PICKY)
    run, score = run_of("lora", "reward.name=function", "reward.call=picky:relative", "reward.on_error=skip")
    kept = [len(text) for text in TEXTS if "e" not in text]
    mean = statistics.fmean(kept)

    scores = score(answers_of(run))
    assert [s for s in scores if s == s] == pytest.approx([length - mean for length in kept])
    assert [s != s for s in scores] == ["e" in text for text in TEXTS]


def test_a_run_goes_on_after_an_answer_that_its_reward_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The setting may be added on --resume. A skipped answer has no part: whatever it would score, nothing changes."""
    Path("picky.py").write_text(PICKY)
    assert picked("cut", "letters", "ppo.iterations=1") == 2
    assert "failed on the answer" in capsys.readouterr().err
    assert picked("cut", "letters", "ppo.iterations=1", "reward.on_error=skip", "--resume") == 0
    assert "skipped an answer, and will skip others like it: reward 'function' failed on" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("cut/ppo/metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "reward_errors" in line]

    assert 0 < line["reward_errors"] < 8
    rows = [json.loads(row) for row in Path("cut/ppo/answers.jsonl").read_text().splitlines()]
    assert all((row["score"] is None) == ("e" in row["after"]) for row in rows)
    assert picked("none", "none", "ppo.iterations=1", "reward.on_error=skip") == 2


def test_a_skipped_answer_has_no_part_in_the_update(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the answers that are kept, worked out from their tokens alone."""
    from alignkit_ppo import trainer as ppo_trainer

    Path("picky.py").write_text(PICKY)
    seen: list[tuple[Any, float]] = []
    compute = ppo_trainer.PPOTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, model, inputs, *args, **kwargs)
        seen.append((inputs, float(kwargs["num_items_in_batch"])))
        return loss

    monkeypatch.setattr(ppo_trainer.PPOTrainer, "compute_loss", watched)
    assert picked("skip", "letters", "ppo.iterations=1", "reward.on_error=skip") == 0
    steps = [seen[:2], seen[2:]]  # of two microbatches each
    kept = [batch["mask"].any(1) for batch, _ in seen]

    assert 0 < sum(int(of.sum()) for of in kept) < 8
    for step in steps:
        assert {tokens for _, tokens in step} == {max(1, sum(int(batch["mask"].sum()) for batch, _ in step))}
    advantages = torch.cat([batch["advantages"][batch["mask"]] for batch, _ in seen])
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)  # whitened over the kept tokens alone
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-3)


# --- outside training ------------------------------------------------------------------------------------------------

ODD = """
from alignkit import Reward, hookimpl

@hookimpl
def alignkit_reward():
    return [
        Reward(name="brevity", summary="", build=lambda config, run: lambda answers: [-len(t) for t in answers.texts]),
        Reward(name="tokens", summary="", build=lambda config, run: lambda answers: [*map(len, answers.answer_ids)]),
        Reward(name="trainer", summary="", build=lambda config, run: run.tokenizer),
    ]
"""


def ranked(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[int] | str:
    """The ranks of the answers to the first prompt, or the error."""
    write("samples.jsonl", [{"prompt": PROMPTS[0], "responses": TEXTS}])
    capsys.readouterr()
    if main(["rank", "samples.jsonl", "-o", "ranked.jsonl", *arguments]):
        return capsys.readouterr().err
    ranks: list[int] = json.loads(Path("ranked.jsonl").read_text())["ranks"]
    return ranks


def test_rank_takes_reward_runs_and_rewards(
    folder: Path, capsys: pytest.CaptureFixture[str], install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkit.generation import rankings
    from alignkit.models import device

    install("odd", ODD)
    monkeypatch.setattr(device, "run_dtype", lambda train: torch.float32)
    run, _ = run_of("lora", "reward.path=lora-a/rm")
    answers = answers_of(run)
    one_prompt = Answers(answers.prompts[:1] * 8, TEXTS, answers.prompt_ids[:1] * 8, answers.answer_ids)
    by_a, by_b = (plain_scores(f"lora-{which}/rm", one_prompt) for which in "ab")

    assert ranked(capsys, "--by", "lora-a/rm") == rankings.ranks(by_a)
    worst = rankings.ranks([min(both) for both in zip(by_a, by_b, strict=True)])
    paths = "reward.paths=[lora-a/rm, lora-b/rm]"
    assert ranked(capsys, "--by", "ensemble", paths, "reward.by=min") == worst
    brevity = rankings.ranks([-len(text) for text in TEXTS])
    assert ranked(capsys, "--plugin", "odd", "--by", "brevity") == brevity
    parts = "reward.parts=[{name: brevity, weight: 2}]"
    assert ranked(capsys, "--plugin", "odd", "--by", "sum", parts) == brevity


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--by", "reward-modle"], "Did you mean 'reward-model'"),
        (["--by", "reward-model"], "reward 'reward-model' needs a run of stage rm: add reward.path=RUN"),
        (["--by", "classifier", "reward.model=base"], "base is a language model"),
        (["--by", "classifier", "train.seed=1"], "unknown key train: the settings of --by classifier are reward.KEY"),
        (
            ["--by", "lora-a/rm", "reward.path=a"],
            "reward.path=a is a setting of a reward, and --by lora-a/rm",
        ),
        (["--by", "trainer"], "reward 'trainer' works in training alone: it asks for run.tokenizer"),
        (["--by", "tokens"], "this reward reads answer_ids, tokens of a policy, and a file has texts alone"),
        (["--by", "brevity", "reward.on_error=skip"], "reward.on_error is for training"),
    ],
)
def test_what_cannot_score_outside_training_is_refused(
    folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], install: Callable[..., None]
) -> None:
    install("odd", ODD)

    assert said in ranked(capsys, "--plugin", "odd", *arguments)


def test_compare_takes_rewards_of_plugins(
    folder: Path, capsys: pytest.CaptureFixture[str], install: Callable[..., None]
) -> None:
    """A reward that reads tokens gets the policies'."""
    install("odd", ODD)
    given = ["compare", "lora/sft", "full/sft", "--data", "prompts.jsonl", "--max-new-tokens", "4", "-o", "table.jsonl"]

    assert main([*given, "--plugin", "odd", "--reward", "sum", "reward.parts=[{name: tokens, weight: 2}]"]) == 0
    rows = [json.loads(line) for line in Path("table.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == pytest.approx([2 * row["length"] for row in rows])
    assert main([*given, "--plugin", "odd"]) == 2
    assert "odd has no effect without --reward NAME" in capsys.readouterr().err
