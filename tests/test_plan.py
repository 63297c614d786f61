"""`train` resolves like make: what is found, what is trained first, what does not fit, and that no torch is needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMONSTRATIONS

from alignkit.cli import main

RANKINGS = [
    {"prompt": f"What is {n} and one?", "responses": [f"It is {n + 1}.", "No idea.", "Ask."], "ranks": [0, 1, 2]}
    for n in range(16)
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> Path:
    """A working folder with a config of both stages, demonstrations and rankings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")
    for name, rows in (("demos.jsonl", DEMONSTRATIONS), ("rankings.jsonl", RANKINGS)):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny_model(), "base")
    Path("run.yaml").write_text(
        """
model: base
output: runs
train: {max_steps: 1, per_device_train_batch_size: 2, use_cpu: true}
stages:
  sft: {data: {path: demos.jsonl, eval_size: 4}}
  rm: {data: {path: rankings.jsonl, eval_size: 4}}
"""
    )
    return tmp_path


def run(*arguments: str) -> int:
    return main(["--debug", "train", "-c", "run.yaml", "--plugin", "rm", *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it refuses."""
    capsys.readouterr()
    assert main(["train", "-c", "run.yaml", "--plugin", "rm", *arguments]) == 2
    return capsys.readouterr().err


def finished(stage: str) -> str:
    return str(json.loads((Path("runs") / stage / "alignkit.json").read_text())["finished"])


def test_a_missing_stage_is_trained_first_and_nothing_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--plan") == 0
    plan = capsys.readouterr().out
    assert plan.index("stage  sft") < plan.index("stage  rm")
    assert "policy from  runs/sft (trained first)" in plan
    assert not (folder / "runs").exists()

    assert run() == 0
    first = finished("sft"), finished("rm")
    assert run() == 0
    assert "nothing to train" in capsys.readouterr().out
    assert (finished("sft"), finished("rm")) == first

    shutil.rmtree("runs/rm")
    assert run() == 0
    assert "finished  runs/sft (lora, 1 steps" in capsys.readouterr().out
    assert finished("sft") == first[0]


def test_a_found_run_must_be_what_the_config_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    shutil.rmtree("runs/rm")
    said = refused(capsys, "sft.train.max_steps=2")
    assert "runs/sft was trained with other settings: sft.train.max_steps was 1, is 2" in said
    assert "rm.policy=runs/sft" in said
    assert "extend it with alignkit train --plugin sft --resume" in said
    assert "--resume" not in refused(capsys, "sft.train.max_steps=2", "sft.train.learning_rate=1e-3")

    assert run("sft.train.max_steps=2", "rm.policy=runs/sft") == 0


def test_what_is_said_for_this_command_alone_leaves_a_found_run_be(folder: Path) -> None:
    assert run() == 0
    first = finished("sft")

    assert run("train.max_steps=2", "--overwrite") == 0
    assert finished("sft") == first
    assert json.loads(Path("runs/rm/alignkit.json").read_text())["steps"] == 2


def test_changed_data_make_a_run_out_of_date(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    shutil.rmtree("runs/rm")
    with Path("demos.jsonl").open("a") as file:
        file.write(json.dumps(DEMONSTRATIONS[0]) + "\n")

    assert "demos.jsonl has changed" in refused(capsys)


def test_a_run_whose_policy_was_trained_again_is_out_of_date(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert main(["train", "-c", "run.yaml", "--plugin", "sft", "train.seed=7", "--overwrite"]) == 0

    Path("prompts.jsonl").write_text("".join(f'{{"prompt": "What is {n}?"}}\n' for n in range(16)))
    capsys.readouterr()
    assert main(["check", "-c", "run.yaml", "--plugin", "ppo", "--data", "prompts.jsonl"]) == 2
    assert "its policy runs/sft was trained again" in capsys.readouterr().err


def test_a_run_that_is_there_with_other_settings_is_not_replaced(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0

    assert "is a finished run" in refused(capsys, "rm.train.max_steps=3")


def test_the_model_and_the_tuner_come_from_the_run_that_is_gone_on_from(folder: Path) -> None:
    assert main(["train", "-c", "run.yaml", "--plugin", "sft", "--plugin", "qlora", "tuner.r=4"]) == 0
    common = ["train.max_steps=1", "train.use_cpu=true", "data.eval_size=4"]
    assert main(["train", "--plugin", "rm", "--data", "rankings.jsonl", "rm.policy=runs/sft", *common]) == 0

    manifest = json.loads(Path("runs/rm/alignkit.json").read_text())
    assert manifest["tuner"] == "qlora"
    assert manifest["config"]["model"] == "base"
    assert json.loads(Path("runs/rm/adapter_config.json").read_text())["r"] == 4


def test_what_a_stage_takes_from_the_one_before_it_is_the_same_before_that_is_trained(folder: Path) -> None:
    text = Path("run.yaml").read_text().replace("sft: {data", "sft: {tuner: {name: qlora, r: 4}, data")
    Path("run.yaml").write_text(text)

    assert run() == 0
    manifest = json.loads(Path("runs/rm/alignkit.json").read_text())
    assert (manifest["tuner"], manifest["config"]["tuner"]["r"]) == ("qlora", 4)
    first = finished("rm")
    assert run() == 0
    assert finished("rm") == first


def test_an_adapter_that_cannot_be_continued_is_an_error_before_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("run.yaml").read_text().replace("sft: {data", "sft: {tuner: {r: 4}, data")
    Path("run.yaml").write_text(text)

    assert "tuner.r=4, not 8" in refused(capsys, "rm.tuner.r=8")
    assert not Path("runs").exists()


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_another_chat_template_of_a_stage_that_is_trained_first_is_an_error(
    folder: Path, tuner: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        Path(f"{name}.jinja").write_text(f"{{% for m in messages %}}{name}{{{{ m.content }}}}{{% endfor %}}")
    text = Path("run.yaml").read_text().replace("sft: {data", "sft: {chat_template: a.jinja, data")
    Path("run.yaml").write_text(text.replace("rm: {data", "rm: {chat_template: b.jinja, data"))

    assert "its chat template is not b.jinja" in refused(capsys, "--plugin", tuner)
    assert not Path("runs").exists()


def test_the_tuner_of_a_stage_that_makes_no_adapter_need_not_be_alike(folder: Path) -> None:
    text = Path("run.yaml").read_text().replace("sft: {data", "sft: {tuner: {name: full}, data")
    Path("run.yaml").write_text(text.replace("rm: {data", "rm: {tuner: {name: lora, r: 4}, data"))

    assert run("--plan") == 0


def test_a_bare_base_and_a_reward_must_write_in_the_same_tokens(
    folder: Path, tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("rm.policy=base") == 0
    prompts = ["--data", "bundled:prompts", "ppo.policy=base", "reward.path=runs/rm"]
    assert main(["check", "--plugin", "ppo", "--model", "base", *prompts]) == 0
    other = Path(shutil.copytree("base", "other"))
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "a"}))
    capsys.readouterr()

    assert main(["check", "--plugin", "ppo", "--model", "other", *prompts]) == 2
    assert "other and runs/rm cannot be combined: they differ in pad_token" in capsys.readouterr().err


def test_a_base_that_cannot_be_a_reward_model_is_an_error_before_sft(
    folder: Path, tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Transformers has no granite for sequence classification" in refused(
        capsys, "--model", str(tiny_model("granite"))
    )
    assert not Path("runs").exists()


def test_a_run_of_another_stage_in_the_run_folder_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    shutil.rmtree("runs/sft")
    Path("runs/rm").rename("runs/sft")

    assert "runs/sft is a run of another stage" in refused(capsys)


def test_the_config_of_a_run_names_what_it_came_from_and_reproduces_it(folder: Path) -> None:
    assert run() == 0
    assert main(["train", "-c", "runs/rm/config.yaml", "--output", "again"]) == 0

    one, two = (Path(f"{output}/rm/adapter_model.safetensors").read_bytes() for output in ("runs", "again"))
    assert one == two
    assert not Path("again/sft").exists()


def edit(file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(Path(file).read_text())
    change(content)
    Path(file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: edit("base/tokenizer.json", lambda t: t["model"]["merges"].pop()), "tokenizer"),
        (lambda: edit("base/tokenizer_config.json", lambda t: t.update(pad_token="!")), "pad_token (None, '!')"),
        (lambda: Path("base/chat_template.jinja").write_text("{{ messages }}"), "chat template"),
        (lambda: shutil.copy("other/model.safetensors", "base/model.safetensors"), "weights"),
    ],
    ids=["tokenizer", "special-tokens", "chat-template", "weights"],
)
def test_what_changed_in_the_base_since_stops_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str], change: Callable[[], None], said: str, tiny_model: Any
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained("base")
    torch.nn.init.ones_(other.model.norm.weight.data.zero_())
    other.save_pretrained("other")
    other.model.embed_tokens.weight.data.add_(1)
    other.save_pretrained("other")
    assert run("rm.policy=null") == 0
    shutil.rmtree("runs/rm")
    change()

    err = refused(capsys, "rm.policy=runs/sft")
    assert "this run cannot start from runs/sft: base has changed since it was trained (" in err
    assert said in err


def test_what_changed_in_the_run_itself_stops_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    Path("runs/sft/chat_template.jinja").write_text("{{ messages }}")

    err = refused(capsys, "rm.policy=runs/sft", "--overwrite")
    assert "its folder has changed since it was trained (chat template)" in err


def test_another_base_template_or_rank_stops_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str], tiny_model: Callable[..., Path]
) -> None:
    assert main(["train", "-c", "run.yaml", "--plugin", "sft"]) == 0
    named = "rm.policy=runs/sft"

    assert "its base model is base, not " in refused(capsys, named, "--model", str(tiny_model("gpt2")))
    Path("t.jinja").write_text("{{ messages }}")
    assert "its chat template is not t.jinja" in refused(capsys, named, "chat_template=t.jinja")
    assert "tuner.r=16, not 8" in refused(capsys, named, "tuner.r=8")
    assert "runs/stf is not a finished run. Did you mean 'sft'?" in refused(capsys, "rm.policy=runs/stf")
    assert "is not a finished run. Runs in it: runs/sft" in refused(capsys, "rm.policy=runs")
    assert run(named) == 0
    assert "runs/rm is a reward (stage rm), not a policy" in refused(capsys, "rm.policy=runs/rm")


def test_runs_that_do_not_fit_are_an_error_without_importing_torch(folder: Path) -> None:
    assert main(["train", "-c", "run.yaml", "--plugin", "sft"]) == 0
    Path("base/chat_template.jinja").write_text("{{ messages }}")
    code = (
        "import sys; from alignkit.cli import main\n"
        "assert main(['train', '-c', 'run.yaml', '--plugin', 'rm', 'rm.policy=runs/sft']) == 2\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules), 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "chat template" in done.stderr


def test_resume_goes_on_with_the_stage_that_was_cut_off(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sft.train.max_steps=4", "sft.train.save_steps=2") == 0
    Path("runs/sft/alignkit.json").unlink()
    shutil.rmtree("runs/sft/checkpoints/checkpoint-4")
    Path("runs/sft").rename("runs/sft.unfinished")
    shutil.rmtree("runs/rm")

    said = refused(capsys, "sft.train.max_steps=4", "sft.train.save_steps=2")
    assert "runs/sft has an unfinished run. Add --resume" in said
    assert "runs/sft has an unfinished run" in refused(capsys, "sft.train.max_steps=4", "--overwrite")
    assert run("sft.train.max_steps=4", "sft.train.save_steps=2", "--resume") == 0
    assert "resuming from step 2" in capsys.readouterr().out
    assert Path("runs/rm/alignkit.json").exists()


def test_a_loss_goes_to_the_stage_that_it_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--plugin", "plackett-luce") == 0
    assert json.loads(Path("runs/rm/alignkit.json").read_text())["loss"] == "plackett-luce"
    assert json.loads(Path("runs/sft/alignkit.json").read_text())["loss"] == "nll"
    capsys.readouterr()

    assert main(["check", "-c", "run.yaml", "--plugin", "sft", "--plugin", "plackett-luce"]) == 2
    assert "takes RankedScores, but stage 'sft' provides TokenLogps" in capsys.readouterr().err


def test_a_split_of_one_file_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "rm.data.split=test")
    assert "data: rankings.jsonl is a single file and has no split 'test'" in said
    said = refused(capsys, "rm.data.eval_path=rankings.jsonl", "rm.data.eval_split=test")
    assert "data: rankings.jsonl is a single file and has no split 'test'" in said


def test_a_folder_of_splits_is_trained_on_one_and_evaluated_on_another(folder: Path, capsys: Any) -> None:
    Path("set").mkdir()
    for split, rows in (("train", RANKINGS), ("test", RANKINGS[:3])):
        Path(f"set/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    over = ["rm.data.path=set", "rm.data.eval_path=set", "rm.data.eval_split=test"]
    assert run("--plan", *over) == 0
    plan = capsys.readouterr().out
    assert "data  16 rows from set (format ranking); not read: test.jsonl" in plan
    assert "held out  3 rows from set (format ranking); not read: train.jsonl" in plan


def test_a_model_that_is_not_on_this_disk_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    """Its tokenizer cannot check the rows yet, and its name may be wrong."""
    assert main(["check", "--plugin", "sft", "--model", "someone/no-such-model"]) == 0
    assert "someone/no-such-model (not on this disk: training downloads it, and then checks the rows)" in (
        capsys.readouterr().out
    )
