"""Reward functions and plugins in the memory of a Python session: training with them, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import alignkit
from alignkit import Judge, Loss, Reward, TokenLogps
from alignkit.api.settings import reward_name
from alignkit.cli import main
from alignkit.evaluation import comparison
from alignkit.registry import Registry, blame, in_memory
from alignkit.registry.plugin import registered
from alignkit.testing import DEMONSTRATIONS, PROMPTS

TRAIN = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "use_cpu": True}
PPO = {"batch_size": 4, "minibatches": 1, "response_length": 6, "iterations": 1, "policy": "base", "value": "head"}
ROWS = [{**row, "target": 2 + number % 3} for number, row in enumerate(PROMPTS)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")  # keep the settings of libraries, which are global
    kept = dict(registered)
    registered.clear()
    yield tmp_path
    registered.clear()
    registered.update(kept)


@pytest.fixture
def tiny(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama"))


def ppo(tiny: str, **settings: Any) -> alignkit.FinishedRun:
    given = {"data": {"path": ROWS, "eval_size": 4}, "train": TRAIN, "ppo": PPO}
    return alignkit.train("ppo", model=tiny, **{**given, **settings})


def define(source: str, name: str) -> Any:
    """A function of a notebook cell. Like IPython, it keeps the source for tracebacks."""
    import linecache

    file = f"<cell {hash(source)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, file, "exec"), scope)
    return scope[name]


TARGET = """def closeness(prompts, answers, fields):
    return [{scale} * -abs(len(a) - f["target"]) for a, f in zip(answers, fields)]
"""


def test_a_function_is_a_reward_and_the_run_records_it(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    closeness = define(TARGET.format(scale=1), "closeness")
    run = ppo(tiny, reward=closeness)

    targets = {row["prompt"]: {"target": row["target"]} for row in ROWS}
    evaluation = run.answers()[-1]
    fields = [targets[prompt] for prompt in evaluation.prompts]
    assert evaluation.columns["score"] == closeness(evaluation.prompts, evaluation.answers, fields)
    recorded = run.manifest["in_memory"]["closeness"]
    assert recorded["source"] == TARGET.format(scale=1)
    name = f"closeness@in-memory-{recorded['fingerprint']}"
    assert run.manifest["config"]["plugins"] == [name, "ppo"]
    assert run.manifest["config"]["stages"]["ppo"]["reward"]["name"] == "closeness"

    card = (run.folder / "README.md").read_text()
    assert "No command reproduces this run" in card
    assert "alignkit train -c config.yaml" not in card
    assert TARGET.format(scale=1) in card
    capsys.readouterr()
    assert main(["show", str(run.folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "again in Python, alignkit.train(config='runs/ppo/config.yaml', output='again', plugins=[closeness])" in shown
    )
    again = alignkit.train(config="runs/ppo/config.yaml", output="again", plugins=[closeness])  # as it says
    assert again.metrics == run.metrics


def test_a_changed_function_is_another_reward(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = ppo(tiny, reward=define(TARGET.format(scale=1), "closeness"))
    again = define("\n# the cell runs again\n" + TARGET.format(scale=1), "closeness")
    assert ppo(tiny, reward=again).manifest["finished"] == run.manifest["finished"]
    assert "nothing to train" in capsys.readouterr().out

    changed = define(TARGET.format(scale=2), "closeness")
    with pytest.raises(alignkit.ConfigError, match="is a finished run"):
        ppo(tiny, reward=changed)
    longer = {**PPO, "iterations": 2}
    registered.clear()  # as in a new session, which defines the changed function only
    with pytest.raises(alignkit.ConfigError, match="--resume must keep the settings of the run.*plugins was"):
        ppo(tiny, reward=changed, ppo=longer, resume=True)
    assert ppo(tiny, reward=again, ppo=longer, resume=True).manifest["steps"] > run.manifest["steps"]
    doubled = ppo(tiny, reward=changed, overwrite=True).metrics["first_eval_score"]
    assert doubled == pytest.approx(2 * run.metrics["first_eval_score"])


def test_without_the_session_a_command_says_that_it_cannot_continue_the_run(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ppo(tiny, reward=define(TARGET.format(scale=1), "closeness"))
    registered.clear()  # as in a new process
    message = "plugin closeness was in the memory of a Python session"
    for command in (
        ["train", "--plugin", "ppo", "--output", "runs", "--resume", "ppo.iterations=2"],
        ["train", "-c", "runs/ppo/config.yaml", "--output", "again"],
    ):
        capsys.readouterr()
        assert main(command) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    capsys.readouterr()
    assert main(["show", "runs/ppo"]) == 0
    assert "stage  ppo: PPO against a reward" in capsys.readouterr().out
    _, held_out = comparison.rows_of(alignkit.load("runs/ppo").manifest)  # as `compare` looks for prompts
    assert len(held_out) == 4
    loaded = alignkit.load("runs/ppo")
    assert loaded.model().model is not None  # the reward is not needed to use the policy


FAILS = """calls = []
def fails(prompts, answers):
    calls.append(1)
    assert len(calls) < 3, "no"
    return [float(len(answer)) for answer in answers]
"""


def test_an_unfinished_run_is_listed_with_the_call_that_continues_it(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = define(FAILS, "fails")
    with pytest.raises(alignkit.DataError, match=r"plugin fails \(in memory\): its reward 'fails'.*AssertionError: no"):
        ppo(tiny, reward=fails, ppo={**PPO, "iterations": 3, "save_every": 1, "eval_every": 9})
    capsys.readouterr()
    assert main(["runs"]) == 0

    shown = " ".join(capsys.readouterr().out.split())
    assert "Continue it: in Python, alignkit.train('ppo', output='runs', resume=True, plugins=[fails])" in shown


def test_rewards_of_every_kind_of_callable(tiny: str) -> None:
    class Constant:
        def __call__(self, prompts: list[str], answers: list[str]) -> list[float]:
            return [0.5] * len(answers)

    component = Reward(name="Half", summary="a test", build=lambda config, run: None)
    for reward in (lambda prompts, answers: [0.5] * len(answers), Constant(), component):
        planned = alignkit.check("ppo", model=tiny, data=ROWS, reward=reward, ppo=PPO)
        name = planned.to_train[0].config.reward.component.name
        assert name in ("lambda", "Constant", "Half")


# --- plugins ---------------------------------------------------------------------------------------------------------

LOSS = """
from alignkit import Loss, LossOutput, TokenLogps, hookimpl

def build(config):
    def scaled(batch):
        return LossOutput(-{scale} * (batch.logps * batch.mask).sum() / batch.num_tokens)
    return scaled

@hookimpl
def alignkit_loss():
    return [Loss(name="scaled", summary="a test", batch=TokenLogps, build=build)]
"""


def loss(scale: float) -> Loss:
    return Loss(name="scaled", summary="a test", batch=TokenLogps, build=define(LOSS.format(scale=scale), "build"))


def sft(tiny: str, **settings: Any) -> alignkit.FinishedRun:
    data = {"path": DEMONSTRATIONS, "eval_size": 4}
    return alignkit.train("sft", model=tiny, data=data, train={**TRAIN, "max_steps": 1}, **settings)


def test_a_component_is_a_plugin_and_a_cell_can_run_again(tiny: str) -> None:
    first = sft(tiny, plugins=[loss(2.0)])
    with pytest.raises(alignkit.ConfigError, match="is a finished run"):
        sft(tiny, plugins=[loss(3.0)])
    second = sft(tiny, plugins=[loss(3.0)], overwrite=True)

    assert first.manifest["loss"] == second.manifest["loss"] == "scaled"
    assert second.metrics["train_loss"] / first.metrics["train_loss"] == pytest.approx(3 / 2, rel=1e-4)


def test_a_module_with_hooks_is_a_plugin(tiny: str) -> None:
    module = ModuleType("my_loss")
    exec(LOSS.format(scale=2.0), vars(module))
    planned = alignkit.check("sft", model=tiny, data=DEMONSTRATIONS, plugins=[module], loss={"name": "scaled"})

    assert "plugin  my_loss (in memory): loss scaled" in repr(planned)
    assert "loss  scaled: a test (in memory)" in repr(planned)


def test_the_module_of_an_installed_plugin_is_that_plugin(install: Callable[..., None], tiny: str) -> None:
    install("scaled", LOSS.format(scale=2.0))
    import alignkit_scaled_plugin  # type: ignore[import-not-found]

    (plan,) = alignkit.check("sft", model=tiny, data=DEMONSTRATIONS, plugins=[alignkit_scaled_plugin]).to_train
    assert plan.config.plugins == ["scaled@alignkit-scaled", "sft"]
    with pytest.raises(alignkit.PluginError, match=r"plugin scaled \(alignkit-scaled 0.1\) is installed. Give"):
        alignkit.check("sft", model=tiny, data=DEMONSTRATIONS, plugins=[loss(2.0)])


def test_a_component_and_a_hook_need_no_list(tiny: str) -> None:
    @alignkit.hookimpl
    def alignkit_run_start(run: Any) -> None:
        pass

    for plugin, told in ((loss(2.0), "loss scaled"), (alignkit_run_start, "alignkit_run_start")):
        planned = alignkit.check("sft", model=tiny, data=DEMONSTRATIONS, plugins=plugin)
        assert told in repr(planned)


def test_the_error_of_a_hook_in_memory_names_no_option_of_the_command() -> None:
    class Unmarked:
        def alignkit_loss(self) -> list[Loss]:
            return [loss(2.0)]

    with pytest.raises(alignkit.PluginError, match=r"hookimpl missing\? Change it and pass it again, or leave it out$"):
        alignkit.check("sft", plugins=[Unmarked()])


@pytest.mark.parametrize(("plugin", "name"), [(3, "int"), (ModuleType("empty"), "empty")])
def test_what_is_not_a_plugin_is_an_error(plugin: object, name: str) -> None:
    with pytest.raises(alignkit.PluginError, match=f"{name} is not a plugin: it implements no hook"):
        alignkit.check("sft", plugins=[plugin])


def test_a_parent_that_a_changed_plugin_trained_is_not_used(tiny: str) -> None:
    sft(tiny, plugins=[loss(2.0)])
    settings = {"model": tiny, "data": ROWS, "reward": lambda p, a: [1.0] * len(a)}
    used = alignkit.check(
        "ppo", plugins=[loss(2.0)], ppo={"value": "head"}, sft={"loss": {"name": "scaled"}}, **settings
    )
    assert [run.stage for run in used.finished] == ["sft"]

    with pytest.raises(alignkit.ConfigError, match="plugin scaled has changed"):
        alignkit.check("ppo", plugins=[loss(3.0)], ppo={"value": "head"}, sft={"loss": {"name": "scaled"}}, **settings)


def test_two_objects_of_a_class_are_two_plugins(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Log:
        def __init__(self, text: str) -> None:
            self.text = text

        @alignkit.hookimpl
        def alignkit_run_end(self, run: Any, result: Any) -> None:
            print("log", self.text)

    run = sft(tiny, plugins=[Log("one"), Log("two")])

    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("log")] == ["log one", "log two"]
    names = {f"Log@in-memory-{each['fingerprint']}" for each in run.manifest["in_memory"].values()}
    assert set(run.manifest["config"]["plugins"]) == names | {"sft"}
    settings = {"model": tiny, "data": ROWS, "reward": lambda p, a: [1.0] * len(a), "ppo": {"value": "head"}}
    with pytest.raises(alignkit.ConfigError, match="plugin Log has changed"):
        alignkit.check("ppo", plugins=[Log("three"), Log("two")], **settings)


def test_a_function_may_have_the_name_of_a_stage() -> None:
    reward_name(define("def ppo(prompts, answers): return [1.0] * len(answers)", "ppo"))
    registry = Registry()
    registry.activate("ppo", "sft")

    assert [plugin.distribution for plugin in registry.matches("ppo")] == ["alignkit"]


def test_a_function_with_the_name_of_a_tuner_does_not_select_the_tuner(tiny: str) -> None:
    full = define("def full(prompts, answers): return [1.0] * len(answers)", "full")
    (planned,) = alignkit.check("ppo", model=tiny, data=ROWS, reward=full, ppo=PPO).to_train

    assert (planned.config.reward.component.name, planned.config.tuner.component.name) == ("full", "lora")


def test_verdicts_of_a_judge_in_memory_are_not_stored() -> None:
    """Its code is in no file, so a changed judge could not be told from the judge that gave them."""
    from alignkit.judging import choosing

    judge = Judge(name="shortest", summary="a test", build=lambda config, run: None)
    chosen = choosing.named("by", "shortest", [in_memory.register(judge)])

    assert chosen.identity is None


def test_a_reward_in_memory_takes_the_place_of_a_built_in_one_of_its_name() -> None:
    mine = Reward(name="exact-answer", summary="mine", build=lambda config, run: None)
    name = in_memory.register(mine)
    registry = Registry()
    registry.activate(name)

    assert registry.get("reward", "exact-answer") is mine
    assert Registry().get("reward", "exact-answer") is not mine


def test_a_notebook_shows_the_error_of_a_function_that_fails() -> None:
    assert issubclass(alignkit.DataError, alignkit.AlignkitError)
    with pytest.raises(alignkit.DataError, match=r"its reward 'broken'.* failed on the answer 'b': ZeroDivisionError"):
        alignkit.rank([{"prompt": "a", "responses": ["b", "c"]}], define("def broken(p, a): return [1 / 0]", "broken"))


def test_errors_of_alignkit_are_not_blamed_on_a_component_in_memory() -> None:
    """The module of its class is alignkit's."""
    in_memory.register(Reward(name="longest", summary="length", build=lambda run: None))
    with pytest.raises(AttributeError) as error:
        blame.culprit(None)  # type: ignore[arg-type]

    assert error.traceback[-1].path.name == "blame.py"
    assert blame.culprit(error.value) is None
