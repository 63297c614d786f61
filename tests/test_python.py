"""Training from Python: the same runs, errors and folders as the command's."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import alignkit
from alignkit import Demonstration, Prompt, Ranking, Rated, Text
from alignkit.api import row_files
from alignkit.cli import main
from alignkit.config import DataConfig
from alignkit.data import load as load_rows
from alignkit.registry import Registry
from alignkit.testing import DEMONSTRATIONS, PROMPTS

TRAIN = {"max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "use_cpu": True}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")  # keep the settings of libraries, which are global
    Path("demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    return tmp_path


@pytest.fixture
def tiny(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama"))


def sft(tiny: str, **settings: Any) -> alignkit.FinishedRun:
    given = {"data": {"path": "demos.jsonl", "eval_size": 4}, "train": TRAIN}
    return alignkit.train("sft", model=tiny, **{**given, **settings})


def words(tiny: str, *more: str) -> list[str]:
    """The arguments of ``sft`` on the command line."""
    train = [f"train.{key}={str(value).lower()}" for key, value in TRAIN.items()]
    return ["--plugin", "sft", "--model", tiny, "--data", "demos.jsonl", "data.eval_size=4", *train, *more]


def weights(run: Any) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "adapter_model.safetensors")


def assert_equal_weights(one: Any, other: Any) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_functions_import_no_torch_until_a_model_is_needed(tiny: str) -> None:
    code = f"""
import sys, alignkit
run = alignkit.check("sft", model={tiny!r}, data=[{{"prompt": f"{{n}}", "response": "yes"}} for n in range(8)])
assert "8 rows" in repr(run) or "7 rows" in repr(run), repr(run)
for name in alignkit.__all__:
    getattr(alignkit, name)
print([name for name in ("torch", "transformers", "trl", "peft", "datasets", "accelerate") if name in sys.modules])
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_run_is_that_of_the_command_and_each_finds_the_other_s(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = sft(tiny, plugins=["lora"], tuner={"r": 4}, output="python")
    assert main(["train", *words(tiny, "--plugin", "lora", "tuner.r=4", "--output", "command")]) == 0

    assert_equal_weights(run, "command/sft")
    command = alignkit.load("command/sft")
    configs = [{**each.manifest["config"], "output": ""} for each in (run, command)]
    assert configs[0] == configs[1]
    assert run.metrics == command.metrics
    assert "in_memory" not in {name for name, value in run.manifest.items() if value}
    assert run.answers() == []
    capsys.readouterr()
    assert main(["train", *words(tiny, "tuner.r=4", "--output", "python")]) == 0
    assert "nothing to train" in capsys.readouterr().out
    assert sft(tiny, tuner={"r": 4}, output="command").folder == Path("command/sft")
    assert "nothing to train" in capsys.readouterr().out

    model, tokenizer = run.model()
    ids = tokenizer("What is one and one?", return_tensors="pt")["input_ids"].to(model.device)
    from peft import AutoPeftModelForCausalLM

    plain = AutoPeftModelForCausalLM.from_pretrained(run.folder, dtype=model.dtype).eval().to(model.device)
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(
    ("settings", "arguments", "error"),
    [
        ({"sft": {"packingg": True}}, ["sft.packingg=true"], alignkit.ConfigError),
        ({"tables": {"a": 1}}, ["tables.a=1"], alignkit.ConfigError),
        ({"train": {"max_steps": "many"}}, ["train.max_steps=many"], alignkit.ConfigError),
        ({"plugins": ["loraa"]}, ["--plugin", "loraa"], alignkit.PluginError),
        ({"data": "demoss.jsonl"}, ["--data", "demoss.jsonl"], alignkit.DataError),
        ({"model": "./nowhere"}, ["--model", "./nowhere"], alignkit.ConfigError),
        ({"reward": "exact-answer"}, ["reward.name=exact-answer"], alignkit.ConfigError),
    ],
)
def test_an_error_is_an_exception_with_the_text_of_the_command(
    settings: dict[str, Any],
    arguments: list[str],
    error: type[Exception],
    tiny: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(error) as raised:
        alignkit.check("sft", **{"model": tiny, "data": "demos.jsonl", **settings})
    assert capsys.readouterr() == ("", "")

    command = ["check", "--plugin", "sft", "--model", tiny, *([] if "data" in settings else ["-d", "demos.jsonl"])]
    assert main([*command, *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"alignkit: error: {raised.value}"


def test_a_folder_that_is_in_use_is_an_error_and_overwrite_replaces_it(tiny: str) -> None:
    run = sft(tiny)
    with pytest.raises(alignkit.ConfigError, match="is a finished run"):
        sft(tiny, tuner={"r": 4})
    assert weights(sft(tiny, tuner={"r": 4}, overwrite=True)).keys() == weights(run).keys()
    assert alignkit.load(run).manifest["config"]["tuner"]["r"] == 4
    with pytest.raises(alignkit.ConfigError, match="load: runs is not a finished run. Runs in it: runs/sft"):
        alignkit.load("runs")


# --- rows ------------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize(
    "rows",
    [
        [
            Demonstration(
                [{"role": "user", "content": f"é {n}"}, {"role": "assistant", "content": "ü\u2028", "weight": 1}]
            )
            for n in range(2)
        ],
        [Demonstration([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], TOOLS)],
        [Ranking([{"role": "user", "content": "a"}], ["b", "", "d"], [0.0, 1.0, 1.0], [3.0, 1.5, 1.0])],
        [Rated([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "b", False)],
        [Prompt([{"role": "user", "content": "a"}], None, {"answer": "4", "level": 2})],
        [Text("a\nb")],
    ],
    ids=lambda rows: type(rows[0]).__name__,
)
def test_rows_of_alignkit_are_read_back_as_they_were(rows: list[Any]) -> None:
    path = row_files.path_of(rows, Path("new/folder"))
    read = load_rows(Registry(), DataConfig(), path, (type(rows[0]),)).rows

    assert [row for _, row in read] == rows
    assert row_files.path_of(rows, Path("new/folder")) == path
    assert len(list(Path("new/folder").iterdir())) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"prompt": "a", "response": {1, 2}}], "row 1 cannot be written as JSON: TypeError"),
        ([{"prompt": "a", "response": "b"}, 3], "row 2 is a int"),
        ([{"prompt": "a", "response": "b"}, "demos.jsonl"], "both rows and paths"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "c", "response": 5}] * 9, r"rows-\w+.jsonl line 2: 'response'"),
        ([], "data.path is an empty list"),
        (pandas.DataFrame({"prompt": ["a"], "response": ["b"]}), "data is a DataFrame. Pass a list of its rows"),
        ({"path": {"train": DEMONSTRATIONS}}, "data is a dict with the keys train. Pass a list of rows"),
    ],
)
def test_a_bad_row_is_an_error_with_its_number(data: Any, message: str, tiny: str) -> None:
    with pytest.raises(alignkit.AlignkitError, match=message):
        alignkit.check("sft", model=tiny, data=data)


def test_a_run_on_rows_equals_one_on_their_file_and_goes_on_from_the_command_line(tiny: str) -> None:
    run = sft(tiny, data={"path": DEMONSTRATIONS, "eval_size": 4}, output="rows")
    assert_equal_weights(run, sft(tiny))

    (file,) = Path("rows").glob("rows-*.jsonl")
    assert run.manifest["data"]["source"] == str(file)
    assert [json.loads(line) for line in file.read_text().splitlines()] == DEMONSTRATIONS
    assert main(["train", "--plugin", "sft", "--output", "rows", "--resume", "train.max_steps=3"]) == 0
    assert alignkit.load("rows/sft").manifest["steps"] == 3


def test_lists_of_paths_and_tables_are_sources(tiny: str) -> None:
    Path("more.jsonl").write_text(json.dumps({"prompt": "another", "response": "one"}) + "\n")
    sources = [Path("demos.jsonl"), {"path": "more.jsonl", "weight": 2}]

    (plan,) = alignkit.check("sft", model=Path(tiny), data=sources).to_train
    assert plan.config.data.path == ["demos.jsonl", {"path": "more.jsonl", "weight": 2.0}]


def test_rows_of_earlier_stages_are_in_their_tables(tiny: str) -> None:
    settings = {"sft": {"data": DEMONSTRATIONS}, "ppo": {"value": "head"}}
    planned = alignkit.check("ppo", model=tiny, data=PROMPTS, reward=lambda p, a: [0.0] * len(a), **settings)

    assert planned.to_train[0].config.stage.component.name == "sft"
    assert len(planned.to_train[0].source.rows) == len(DEMONSTRATIONS)


# --- interrupts and memory -------------------------------------------------------------------------------------------


class StopsAt:
    """A plugin that interrupts the process at a step, as Ctrl-C and a notebook's stop button do."""

    def __init__(self, step: int) -> None:
        self.step = step

    @alignkit.hookimpl
    def alignkit_callbacks(self, run: Any) -> list[Any]:
        import transformers

        step = self.step

        class Stop(transformers.TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == step:
                    os.kill(os.getpid(), signal.SIGINT)

        return [Stop()]


def test_an_interrupt_leaves_a_run_that_resume_continues_bit_for_bit(tiny: str) -> None:
    four = {**TRAIN, "max_steps": 4}
    whole = sft(tiny, train=four, output="whole")
    handler = signal.getsignal(signal.SIGINT)
    stops = StopsAt(1)
    with pytest.raises(alignkit.AlignkitError, match="stopped at step 2. To continue, add --resume"):
        sft(tiny, train=four, plugins=[stops])
    assert signal.getsignal(signal.SIGINT) is handler
    assert not Path("runs/sft").exists()

    stops.step = 99
    with pytest.raises(alignkit.ConfigError, match="these differ: plugins was"):  # its attribute is part of it
        sft(tiny, train=four, plugins=[stops], resume=True)
    stops.step = 1  # the step is done, so it does not stop again
    assert_equal_weights(sft(tiny, train=four, plugins=[stops], resume=True), whole)


def modules() -> int:
    gc.collect()
    return sum(issubclass(type(each), nn.Module) for each in gc.get_objects())


def test_models_are_freed_after_training_and_after_an_error(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNKIT_DEBUG")

    class Fails:
        @alignkit.hookimpl
        def alignkit_callbacks(self, run: Any) -> list[Any]:
            import transformers

            class Stop(transformers.TrainerCallback):
                def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                    models.append(weakref.ref(kwargs["model"]))
                    if len(models) > 1:
                        raise alignkit.DataError("no more")

            return [Stop()]

    models: list[Any] = []
    before = modules()
    sft(tiny, plugins=[Fails()], train={**TRAIN, "max_steps": 1})
    assert models[0]() is None
    assert modules() == before
    kept = None
    with contextlib.suppress(ValueError):
        try:
            sft(tiny, plugins=[Fails()], output="again")
        except alignkit.DataError as error:
            kept = error  # as a notebook keeps its last error
    assert str(kept) == "no more"
    assert len(models) == 2
    assert models[1]() is None


def test_in_a_notebook_progress_is_plain_lines_without_ipywidgets(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr("builtins.get_ipython", lambda: shell(), raising=False)
    monkeypatch.delenv("ALIGNKIT_DEBUG")
    sft(tiny)

    text = capsys.readouterr()
    assert "held-out loss" in text.out
    assert text.err == ""
    assert not {"\x1b", "\r"} & set(text.out)


# --- documentation ---------------------------------------------------------------------------------------------------


def test_the_calls_on_the_page_are_accepted(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order. Training is checked only; other tests train."""
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    functions = {name for name in alignkit.__all__ if type(getattr(alignkit, name)) is FunctionType}
    functions = {name for name in functions if getattr(alignkit, name).__module__.startswith("alignkit.api.")}
    assert set(re.findall(r"^\| `alignkit\.(\w+)\(", page, re.M)) == functions
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    sft(tiny)

    def train(stage: str, **settings: Any) -> Any:
        planned = alignkit.check(stage, **{**settings, "model": tiny, "output": "checked"})
        assert planned.to_train or planned.finished
        return SimpleNamespace(metrics={"eval_score": 0.0})

    monkeypatch.setattr(alignkit, "train", train)
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {"__name__": "__main__"})


def test_the_plan_of_memory_is_that_of_the_command(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words(tiny), "--json"]) == 0
    command = json.loads(capsys.readouterr().out)
    memory = alignkit.plan("sft", model=tiny, data={"path": "demos.jsonl", "eval_size": 4}, train=TRAIN)

    assert {name: dict(parts) for name, parts in memory.phases.items()} == command["phases"]
    assert memory.peak == command["peak"]
    with pytest.raises(alignkit.ConfigError, match="device must be 'cuda' or 'cpu'"):
        alignkit.plan("sft", model=tiny, data="demos.jsonl", device="gpu")  # type: ignore[arg-type]
