"""The plugins of examples/plugins as a stranger has them: installed by pip, run as their READMEs say."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
from conftest import Venv

PLUGINS = Path(__file__).parents[1] / "examples" / "plugins"
NAMES = sorted(folder.name for folder in PLUGINS.iterdir() if (folder / "pyproject.toml").exists())
SCORES = [{"prompt": f"{n} and 1?", "response": f"{n + n % 2}.", "score": n % 2} for n in range(16)]
DOLLY = [{"instruction": f"{n} and 1?", "context": "Add." * (n % 2), "response": f"{n + 1}."} for n in range(16)]
SMALL = [
    *("--model", "base", "train.max_steps=2", "train.per_device_train_batch_size=2", "train.use_cpu=true"),
    *("train.bf16=false", "train.learning_rate=0.01", "data.eval_size=4"),
]
SMALL_OF = {
    "sft": [],
    "group-advantage": [
        *("sft.data.path=demonstrations.jsonl", "rm.data.path=rankings.jsonl", "group-advantage.batch_size=16"),
        *("group-advantage.minibatches=2", "group-advantage.response_length=8"),
    ],
    "reward-weighted": ["sft.data.path=demonstrations.jsonl"],
    "ppo": [
        *("sft.data.path=demonstrations.jsonl", "rm.data.path=rankings.jsonl", "ppo.data.path=prompts.jsonl"),
        *("ppo.batch_size=16", "ppo.minibatches=2", "ppo.response_length=8"),
    ],
}


def blocks(name: str, language: str) -> Iterator[str]:
    """The code blocks of a plugin's README."""
    yield from re.findall(rf"^```{language}\n(.*?)^```", (PLUGINS / name / "README.md").read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugins, away from this repository."""
    folder = tmp_path_factory.mktemp("strangers")
    shutil.copytree(PLUGINS, folder / "examples" / "plugins", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def environment(strangers: Path) -> Iterator[Venv]:
    """A fresh environment in which pip has installed the plugins; in the end nothing is left of them."""
    venv = Venv(strangers / "venv")
    before = venv.files()
    done = venv.run("pip", "install", "-q", "--no-deps", *(f"./examples/plugins/{n}" for n in NAMES), cwd=strangers)
    assert done.returncode == 0, done.stderr
    yield venv
    assert venv.run("alignkit", "uninstall", *NAMES).returncode == 0
    assert venv.files() == before


@pytest.fixture
def alignkit(
    environment: Venv,
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    tiny_data: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``alignkit("plugins")``: the command with the packages of that environment, in a folder with a model and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_model())
    for kind in ("demonstrations", "rankings", "prompts"):
        shutil.copy(tiny_data(kind), tmp_path)
    for name, rows in (("scores", SCORES), ("dolly", DOLLY)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = {**os.environ, "PYTHONPATH": str(environment.site), "PYTHONWARNINGS": "", "ALIGNKIT_DEBUG": ""}
    return functools.partial(processes.run, env=env)


GIVES = {
    "dolly": ["format dolly"],
    "group-advantage": ["stage group-advantage", "loss group-clip"],
    "ia3": ["tuner ia3"],
    "length-controlled": ["reward length-controlled"],
    "muon": ["optimizer muon"],
    "reward-weighted": ["stage reward-weighted", "loss reward-weighted", "format scored"],
}


def test_they_are_listed_and_say_what_they_give(alignkit: Callable[..., Any]) -> None:
    listed = {plugin["name"]: plugin for plugin in json.loads(alignkit("plugins", "--json").stdout)}
    told = alignkit("plugins", *NAMES).stdout.splitlines()

    assert {listed[name]["distribution"] for name in NAMES} == {f"alignkit-{name}" for name in NAMES}
    assert all(listed[name]["summary"] for name in NAMES)
    assert set(GIVES) == set(NAMES)
    assert all(any(line.startswith(f"{given}:") for line in told) for gives in GIVES.values() for given in gives)


SHOWN = {
    "dolly": lambda manifest: manifest["data"]["format"] == "dolly",
    "group-advantage": lambda manifest: set(manifest["parents"]) == {"policy", "reward"},
    "ia3": lambda manifest: manifest["tuner"] == "ia3" and set(manifest["parents"]) == {"policy", "reward"},
    "length-controlled": lambda manifest: manifest["config"]["stages"]["ppo"]["reward"]["name"] == "length-controlled",
    "muon": lambda manifest: manifest["config"]["optimizer"]["name"] == "muon",
    "reward-weighted": lambda manifest: (
        manifest["data"]["format"] == "scored" and set(manifest["parents"]) == {"policy"}
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_its_readme_run(name: str, alignkit: Callable[..., Any], tmp_path: Path) -> None:
    """As written, but small. Its settings come back in the manifest, with the version of the plugin that made it."""
    (block,) = blocks(name, "console")
    install, command = block.splitlines()
    assert install == f"$ pip install ./examples/plugins/{name}"  # `environment` did it
    _, *arguments = shlex.split(command.removeprefix("$ "))
    stage = arguments[arguments.index("--plugin") + 1]
    done = alignkit(*arguments, *SMALL, *SMALL_OF[stage])
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "runs" / stage / "alignkit.json").read_text())

    assert SHOWN[name](manifest)
    assert manifest["versions"][f"alignkit-{name}"] == "0.1.0"


def test_configs_of_the_readmes_are_right(alignkit: Callable[..., Any], tmp_path: Path) -> None:
    configs = [text for name in NAMES for text in blocks(name, "yaml")]
    assert configs
    for text in configs:
        (tmp_path / "run.yaml").write_text(text)
        done = alignkit("check", "-c", "run.yaml", "--model", "base", "--trust")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("plugins", "wrong", "told"),
    [
        (["reward-weighted"], "reward-weighted.max_lenght=9", "reward-weighted.max_lenght. Did you mean 'max_length'?"),
        (["reward-weighted"], "reward-weighted.loss.beta=-1", "loss.beta: Input should be greater than 0"),
        (["sft", "muon"], "optimizer.momentum=2", "optimizer.momentum: Input should be less than 1"),
        (["ppo", "length-controlled"], "reward.scale=cubic", "reward.scale: Input should be 'linear' or 'log'"),
        (["reward-weighted"], "reward-weighted.loss.name=nll", "stage 'reward-weighted' provides ScoredLogps"),
    ],
)
def test_wrong_settings_of_a_plugin_are_caught_in_the_first_second(
    plugins: list[str], wrong: str, told: str, alignkit: Callable[..., Any]
) -> None:
    named = [word for plugin in plugins for word in ("--plugin", plugin)]
    done = alignkit("check", *named, "--model", "base", wrong)

    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_their_own_tests_pass(environment: Venv, strangers: Path) -> None:
    tests = [str(strangers / "examples" / "plugins" / name / "tests") for name in NAMES]
    done = environment.run("pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=strangers)

    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
