"""Third-party plugins in real runs: several at once, names that clash, errors that name them; and their types."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit import yaml
from alignkit.cli import main

Install = Callable[..., None]
RunStage = Callable[..., Path]

WATCH = """
    from alignkit import hookimpl

    @hookimpl
    def alignkit_run_start(run):
        print("start {name}")

    @hookimpl
    def alignkit_load_model(run, role):
        print("load {name}")

    @hookimpl
    def alignkit_model_ready(role, model):
        print("ready {name}")

    @hookimpl
    def alignkit_callbacks():
        from transformers import TrainerCallback

        class Says(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                print("train {name}")

        return [Says()]

    @hookimpl
    def alignkit_run_end(result):
        print("end {name}")
"""
SGD = """
    from alignkit import Optimizer, hookimpl

    def build(config, args):
        import torch
        return torch.optim.SGD, {"lr": args.learning_rate}

    @hookimpl
    def alignkit_optimizer():
        return [Optimizer(name="adamw", summary="not what it is called", build=build)]
"""


def test_run_hooks_of_several_plugins_are_called_in_the_order_of_naming(
    run_stage: RunStage, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("alpha", WATCH.format(name="alpha"))
    install("beta", WATCH.format(name="beta"))
    run_stage("sft", "--plugin", "beta", "--plugin", "alpha")

    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith((" alpha", " beta"))]
    assert told == [
        *("start beta", "start alpha", "load alpha", "load beta", "ready beta", "ready alpha"),
        *("train beta", "train alpha", "end beta", "end alpha"),
    ]


def test_a_component_of_another_distribution_is_picked_and_its_run_is_reproduced(
    run_stage: RunStage, install: Install, tmp_path: Path
) -> None:
    install("mine", SGD)
    folder = run_stage("sft", "--plugin", "adamw@alignkit-mine")
    manifest = json.loads((folder / "alignkit.json").read_text())

    assert yaml.load(folder / "config.yaml")["plugins"] == ["adamw@alignkit-mine", "sft"]
    assert manifest["versions"]["alignkit-mine"] == "0.1"
    assert main(["train", "-c", str(folder / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "sft" / "alignkit.json").read_text())
    assert again["metrics"] == manifest["metrics"]
    with pytest.raises(AssertionError, match="both provide optimizer 'adamw'. Use --plugin adamw@alignkit or --pl"):
        run_stage("sft", "--plugin", "mine")


LOSS = """
from alignkit import Loss, Stage, Text, TokenLogps, Tuner, hookimpl

def loss(batch):
    return batch.nothing

def wrap(config, model, role):
    raise RuntimeError("no such layer")

@hookimpl
def alignkit_loss():
    return [Loss(name="odd-loss", summary="for a test", batch=TokenLogps, build=lambda config: loss)]

@hookimpl
def alignkit_model():
    return [Tuner(name="odd-tuner", summary="for a test", load=lambda config, dtype: {}, wrap=wrap)]

@hookimpl
def alignkit_stage():
    return [Stage(name="odd-stage", summary="for a test", rows=(Text,), batch=TokenLogps, loss="nll",
                  build=lambda run: run.nothing)]
"""
HOOK = "from alignkit import hookimpl\n@hookimpl\ndef {hook}():\n    return {gives}\n"


@pytest.mark.parametrize(
    ("stage", "setting", "told"),
    [
        ("sft", "loss.name=odd-loss", "line 5: AttributeError: 'TokenLogps' object has no attribute 'nothing'"),
        ("sft", "tuner.name=odd-tuner", "line 8: RuntimeError: no such layer"),
        ("odd-stage", "train.seed=1", "line 21: AttributeError: 'Run' object has no attribute 'nothing'"),
    ],
)
def test_a_component_that_raises_is_reported_with_its_plugin_and_line(
    run_stage: RunStage, install: Install, stage: str, setting: str, told: str
) -> None:
    install("odd", LOSS)

    with pytest.raises(
        AssertionError, match=rf"^alignkit: error: plugin odd \(alignkit-odd 0.1\) failed in .*py {told}"
    ):
        run_stage(stage, "--plugin", "odd", setting)


@pytest.mark.parametrize(
    ("hook", "gives", "told"),
    [
        ("alignkit_run_start", "1 / 0", "ZeroDivisionError: division by zero"),
        ("alignkit_model_ready", "1 / 0", "ZeroDivisionError: division by zero"),
        ("alignkit_run_end", "1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_run_hook_that_raises_is_reported_with_its_plugin(
    run_stage: RunStage, install: Install, tiny_model: Callable[..., Path], hook: str, gives: str, told: str
) -> None:
    install("odd", HOOK.format(hook=hook, gives=gives))
    told = told.format(model=tiny_model())

    with pytest.raises(
        AssertionError, match=rf"^alignkit: error: plugin odd \(alignkit-odd 0.1\) failed in {hook}: {told}"
    ):
        run_stage("sft", "--plugin", "odd", "train.max_steps=1")


CALLBACKS = "a list of TrainerCallback"


@pytest.mark.parametrize(
    ("hook", "gives", "told"),
    [
        ("alignkit_load_model", "3", "returned 3, expected a model or None, for a policy from {model}"),
        ("alignkit_callbacks", "None", f"returned None, expected {CALLBACKS}. Is a `return` missing?"),
        ("alignkit_callbacks", "[print]", f"returned [<built-in function print>], expected {CALLBACKS}"),
    ],
)
def test_a_run_hook_that_returns_the_wrong_type_is_reported_with_its_plugin(
    run_stage: RunStage, install: Install, tiny_model: Callable[..., Path], hook: str, gives: str, told: str
) -> None:
    install("odd", HOOK.format(hook=hook, gives=gives))
    told = told.format(model=tiny_model())

    with pytest.raises(AssertionError) as error:
        run_stage("sft", "--plugin", "odd", "train.max_steps=1")
    assert str(error.value).splitlines()[0] == f"alignkit: error: plugin odd (alignkit-odd 0.1): {hook} {told}"


PACK = """
    from alignkit import Reward, Tuner, hookimpl

    @hookimpl
    def alignkit_reward():
        return [Reward(name="http", summary="for a test", build=print)]

    @hookimpl
    def alignkit_model():
        return [Tuner(name="dora2", summary="for a test", load=print, wrap=print)]
"""


def test_a_plugin_of_which_nothing_is_used_is_an_error_on_the_command_line_alone(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("pack", PACK)
    install("watch", WATCH.format(name="watch"))
    file = tmp_path / "run.yaml"
    file.write_text("plugins: [pack]")
    check = ["check", "--plugin", "sft", "--output", str(tmp_path)]

    assert main([*check, "--plugin", "pack"]) == 2
    assert capsys.readouterr().err == (
        "alignkit: error: plugin pack (alignkit-pack 0.1) is not used. It provides tuner dora2, reward http. "
        "Select one, such as tuner.name=dora2\n"
    )
    for used in (["--plugin", "pack", "--plugin", "dora2"], ["--plugin", "watch"], ["-c", str(file)]):
        assert main([*check, *used]) == 0, capsys.readouterr().err
        assert ("plugin  pack (alignkit-pack 0.1): tuner dora2, reward http\n" in capsys.readouterr().out) != (
            "watch" in used
        )


TYPED = """
from collections.abc import Sequence
from typing import Any
from alignkit import Loss, Optimizer, TokenLogps, hookimpl
from alignkit.training.run import Run
from transformers import TrainerCallback

def nothing(*arguments: Any) -> Any: ...
"""
RIGHT = """
@hookimpl
def alignkit_loss() -> list[Loss]:
    return [Loss(name="focal", summary="", batch=TokenLogps, build=nothing)]

@hookimpl
def alignkit_callbacks(run: Run) -> Sequence[TrainerCallback]:
    return []

@hookimpl
def alignkit_run_start(run: Run) -> None: ...
"""
WRONG = {
    "texts": ("@hookimpl\ndef alignkit_loss() -> list[str]:\n    return []", "type-var"),
    "alone": ("@hookimpl\ndef alignkit_loss() -> Loss: ...", "type-var"),
    "number": ("@hookimpl\ndef alignkit_run_start(run: Run) -> int: ...", "type-var"),
    "other": (
        "@hookimpl\ndef alignkit_loss() -> list[Loss]:\n    return [Optimizer(name='', summary='', build=nothing)]",
        "list-item",
    ),
    "no_batch": ("Loss(name='', summary='', build=nothing)", "call-arg"),
}


def test_mypy_catches_a_hook_that_gives_the_wrong_type(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(TYPED + RIGHT)
    for name, (code, _) in WRONG.items():
        (tmp_path / f"{name}.py").write_text(f"{TYPED}\n{code}\n")
    skipped = "\n".join(
        f"[mypy-{library}.*]\nfollow_imports = skip\nignore_missing_imports = True"
        for library in ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
    )
    (tmp_path / "mypy.ini").write_text(f"[mypy]\ndisable_error_code = empty-body\n{skipped}\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", sys.executable, "."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    told = {
        line.split(".py:")[0]: line.rsplit("[", 1)[1].rstrip("]")
        for line in done.stdout.splitlines()
        if ": error:" in line
    }
    assert told == {name: code for name, (_, code) in WRONG.items()}, done.stdout + done.stderr


def test_every_package_ships_its_types() -> None:
    root = Path(__file__).parents[1]
    packages = [root / "alignkit", *(file.parent for file in (root / "plugins").glob("*/__init__.py"))]

    assert len(packages) > 8
    assert [package.name for package in packages if not (package / "py.typed").exists()] == []


def test_a_run_whose_tuner_is_not_installed_names_the_distribution_that_brought_it(
    train: Callable[..., Path], install: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(
        "small-lora",
        """
        import dataclasses
        import alignkit_lora
        from alignkit import hookimpl

        @hookimpl
        def alignkit_model():
            (lora,) = [tuner for tuner in alignkit_lora.alignkit_model() if tuner.name == "lora"]
            return [dataclasses.replace(lora, name="small-lora")]
        """,
        distribution="alignkit-small",
    )
    folder = train("--plugin", "small-lora", "train.max_steps=1")
    for file in (tmp_path / "site").glob("*.dist-info/*"):
        file.unlink()
    for info in (tmp_path / "site").glob("*.dist-info"):
        info.rmdir()
    capsys.readouterr()

    for command in (
        ["chat", str(folder), "--prompt", "Hi"],
        ["sample", str(folder), "prompts.jsonl", "-o", "out.jsonl"],
    ):
        assert main(command) == 2
        said = "tuner 'small-lora' is not installed. The run was trained with alignkit-small 0.1: pip install alignkit-"
        assert said in capsys.readouterr().err, command
