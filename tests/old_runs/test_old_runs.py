"""Run folders of earlier versions open, resume and start the next stage; ``make.py`` made them."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from make import COMMANDS, FOLDER, TRAINED_ON, command, relocate
from run_folders import record, weights

from alignkit.cli import main
from alignkit.runs import answers

# Defaults that have changed since: what a command has to set to mean what it meant then. A resume keeps them.
DEFAULTS_THEN = {"lora/ppo": ["rollout.name=generate"], "lora/grpo": ["rollout.cuda_graphs=False"]}
# Final metrics of answers that DPO's evaluation samples: from the same distribution, but with other random numbers.
SAMPLED = {"lora/dpo": {"eval_kl", "eval_kl_error", "eval_length", "eval_eos_rate"}}
# Errors that are recorded since.
NEWER = {f"eval_{name}_error" for name in ("kl", "perplexity", *(f"accuracy_distance_{n}" for n in (1, 2, "3plus")))}
HERE = Path(__file__).parent
FIRST = ("full/sft", "lora/sft", "lora/rm", "lora/ppo", "lora/dpo")
RUNS = {"a30788b": FIRST, "472d5fe": FIRST, "61ce16d": ("lora/grpo", "lora/kto", "lora/rahf")}  # that are tested


def each_run(*names: str) -> pytest.MarkDecorator:
    """Test these runs of each version that wrote them."""
    runs = [(version, name) for version, wrote in RUNS.items() for name in wrote if name in (names or COMMANDS)]
    return pytest.mark.parametrize(("unpacked", "name"), runs, indirect=["unpacked"], scope="module")


each_version = pytest.mark.parametrize("unpacked", ["a30788b", "472d5fe"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def unpacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with tarfile.open(HERE / f"{request.param}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    relocate(folder, FOLDER, str(folder))
    return folder


@pytest.fixture(autouse=True)
def folder(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of every test here."""
    monkeypatch.chdir(unpacked)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    return unpacked


@each_run()
def test_an_interrupted_run_resumes_to_the_numbers_of_the_uninterrupted_one(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(name, "cut"), "--resume"]) == 0
    printed = capsys.readouterr().out
    for setting in DEFAULTS_THEN.get(name, []):
        assert f"kept  {name.split('/')[1]}.{setting}: settings of the run that is resumed" in printed

    resumed, uninterrupted = Path("cut", name), Path("finished", name)
    metrics, expected_metrics = record(resumed)["metrics"], record(uninterrupted)["metrics"]
    assert metrics.keys() - expected_metrics.keys() <= NEWER
    assert metrics.keys() >= expected_metrics.keys()
    same = expected_metrics.keys() - SAMPLED.get(name, set())
    assert {key: metrics[key] for key in same} == pytest.approx(
        {key: expected_metrics[key] for key in same}, rel=1e-3, abs=1e-5
    )
    expected = weights(uninterrupted)
    assert weights(resumed).keys() == expected.keys()
    for parameter, tensor in weights(resumed).items():
        torch.testing.assert_close(tensor, expected[parameter], rtol=1e-3, atol=1e-5)
    if name in ("lora/ppo", "lora/dpo"):  # the answers of every evaluation; then, those before training and the last
        first, *_, last = answers.read(resumed)
        expected_first, expected_last = answers.read(uninterrupted)
        assert (first.step, last.step) == (expected_first.step, expected_last.step) == (0, 4)
        assert first.answers == expected_first.answers


@each_run()
def test_a_finished_run_is_recognized_by_its_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(name, "finished"), *DEFAULTS_THEN.get(name, [])]) == 0
    assert "nothing to train" in capsys.readouterr().out


@each_version
def test_a_default_that_has_changed_since_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The run goes on as it began, unless the user sets another value, which is refused."""
    longer = [*command("lora/ppo", "finished"), "--resume", "ppo.iterations=3"]
    assert main([*longer, "ppo.rollout.name=decode"]) == 2
    assert "ppo.rollout.name was 'generate', is 'decode'" in capsys.readouterr().err


@each_version
def test_a_setting_that_is_newer_than_the_run_may_not_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(TRAINED_ON, "finished"), "--resume", "train.max_steps=6", "data.special_tokens=tokens"]) == 2
    assert "sft.data.special_tokens was 'text', is 'tokens'" in capsys.readouterr().err


@each_version
def test_a_finished_run_can_be_trained_on() -> None:
    shutil.copytree(f"finished/{TRAINED_ON}", f"longer/{TRAINED_ON}")

    assert main([*command(TRAINED_ON, "longer"), "--resume", "train.max_steps=6"]) == 0
    assert record(Path("longer", TRAINED_ON))["steps"] == 6


@each_run("full/sft", "lora/dpo", "lora/grpo", "lora/kto", "lora/rahf")
def test_a_policy_answers(name: str) -> None:
    prompts = ["prompts.jsonl", "-o", "answers.jsonl", "-k", "1", "--max-new-tokens", "4"]

    assert main(["sample", f"finished/{name}", *prompts]) == 0
    assert len(Path("answers.jsonl").read_text().splitlines()) == 12
    Path("answers.jsonl").unlink()


@each_version
def test_a_reward_model_scores_as_it_was_normalized(fp32: None) -> None:
    """The mean score of the demonstrations is 0 and their standard deviation 1."""
    assert main(["score", "finished/lora/rm", "demonstrations.jsonl", "-o", "scores.jsonl"]) == 0

    scores = torch.tensor([json.loads(line)["score"] for line in Path("scores.jsonl").read_text().splitlines()])
    assert scores.mean().item() == pytest.approx(0, abs=1e-3)
    assert scores.std().item() == pytest.approx(1, abs=1e-3)


@each_version
def test_policies_are_compared_by_a_reward_model() -> None:
    runs = [f"finished/lora/{stage}" for stage in ("sft", "ppo", "dpo")]
    given = ["--reward", "finished/lora/rm", "--data", "prompts.jsonl", "--limit", "2", "--max-new-tokens", "4"]

    assert main(["compare", *runs, *given, "-o", "table.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("table.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == runs


@each_run("lora/rm", "lora/ppo", "lora/dpo")
def test_the_next_stage_starts_from_a_finished_run(name: str) -> None:
    shorter = "ppo.iterations=1" if name == "lora/ppo" else "train.max_steps=1"

    assert main([*command(name, "next"), shorter]) == 0
    parent = record(Path("next", name))["parents"]["policy"]["folder"]
    assert Path(parent) == Path("finished/lora/sft").absolute()
