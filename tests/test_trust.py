"""What ``docs/security.md`` says about trusted files."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from alignkit import yaml
from alignkit.cli import COMMANDS, app, main
from alignkit.components import KINDS
from alignkit.config import trust
from alignkit.config.resolve import TopLevel
from alignkit.errors import ConfigError
from alignkit.generation import scorers
from alignkit.registry import Registry
from alignkit.runs import lineage

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
LEAVES_A_TRACE = "import pathlib; pathlib.Path('owned').touch()"


FUNCTION = {"name": "function", "call": "evil:score"}
OPENAI = {"name": "openai", "model": "m"}
NEEDING_TRUST = {
    "a reward": ({"reward": FUNCTION}, "reward 'function': call=evil:score runs this code"),
    "a part": ({"reward": {"name": "sum", "parts": [FUNCTION]}}, "reward 'function': call=evil:score runs this code"),
    "a judge": ({"reward": {"name": "judge", "judge": FUNCTION}}, "judge 'function': call=evil:score runs this code"),
    "a server": (
        {"reward": {"name": "judge", "judge": {**OPENAI, "base_url": "http://evil/v1"}}},
        "judge 'openai': base_url=http://evil/v1 sends prompts and answers to this server",
    ),
    "a key": (
        {"reward": {"name": "judge", "judge": {**OPENAI, "api_key_env": "AWS_SECRET_ACCESS_KEY"}}},
        "judge 'openai': api_key_env=AWS_SECRET_ACCESS_KEY sends the content of this environment variable",
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a module that leaves a trace if it is imported, and with prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    code = f"{LEAVES_A_TRACE}\n\ndef score(prompts, answers):\n    return [0.0] * len(answers)\n"
    Path("evil.py").write_text(code)
    Path("prompts.jsonl").write_text("".join(f'{{"prompt": "What is {n}?"}}\n' for n in range(20)))
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("evil", None)


@pytest.fixture
def ppo(folder: Path, tiny_model: Callable[..., Path]) -> list[str]:
    """The words of a PPO command, after its first one."""
    return ["--plugin", "ppo", "--model", str(tiny_model()), "--data", "prompts.jsonl", "ppo.policy=base"]


@pytest.mark.parametrize("of", NEEDING_TRUST)
def test_a_config_file_may_not_name_code_or_a_server(
    of: str, ppo: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    table, reason = NEEDING_TRUST[of]
    Path("run.yaml").write_text(yaml.dumps(table))

    for command in ("train", "plan", "check"):
        assert main([command, "-c", "run.yaml", *ppo]) == 2
    *_, error = capsys.readouterr().err.splitlines(keepends=True)
    assert error.startswith(f"alignkit: error: {reason}")
    assert error.endswith("If you trust the file, add --trust, or write the setting on the command line\n")
    assert not Path("owned").exists()
    if of == "a reward":
        assert error.replace("evil:score", "alignkit.bundled.guide:score") in PAGE.read_text()


def test_trust_is_given_by_the_option_or_by_the_command_line(
    ppo: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(yaml.dumps({"reward": FUNCTION}))

    assert main(["check", "-c", "run.yaml", *ppo, "--trust"]) == 0
    assert Path("owned").exists()
    assert main(["check", *ppo, "reward.name=function", "reward.call=evil:score"]) == 0
    assert main(["sweep", "-c", "run.yaml", *ppo, "ppo.kl_coef=0.1,0.2", "--output", "swept", "--plan"]) == 2
    assert main(["sweep", "-c", "run.yaml", *ppo, "ppo.kl_coef=0.1,0.2", "--output", "swept", "--plan", "--trust"]) == 0


def test_the_record_of_a_run_is_not_trusted_when_it_is_resumed(
    ppo: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*ppo, "reward.name=function", "reward.call=evil:score"]
    assert main(["config", *words]) == 0
    Path("runs/ppo.unfinished").mkdir(parents=True)
    Path("runs/ppo.unfinished/config.yaml").write_text(capsys.readouterr().out)

    assert main(["train", *ppo, "--resume", "--plan"]) == 2
    assert "call=evil:score runs this code, and it is set in a file" in capsys.readouterr().err
    assert not Path("owned").exists()
    assert main(["train", *words, "--resume", "--plan"]) == 0
    assert main(["train", *ppo, "--resume", "--plan", "--trust"]) == 0


def test_the_reward_that_a_run_was_trained_on_needs_trust_to_score_again(folder: Path) -> None:
    config = {"plugins": [], "stages": {"ppo": {"reward": FUNCTION}}}
    run = lineage.Parent("ppo", folder, {"stage": "ppo", "parents": {}, "config": config})

    with pytest.raises(ConfigError, match="reward 'function': call=evil:score runs this code"):
        scorers.of_training(run, trusted=False)
    assert not Path("owned").exists()
    scorer = scorers.of_training(run, trusted=True)
    assert scorer is not None
    assert scorer.name == "evil:score"


def test_every_built_in_setting_that_imports_or_sends_needs_trust() -> None:
    registry = Registry()
    components = [component for kind in KINDS for component in registry.all(kind)]
    fields = {f"{c.kind}.{f.name}": f for c in components for f in c.config.__dataclass_fields__.values()}
    marked = {name for name, field in fields.items() if field.metadata.get("needs_trust")}

    sends = ("call", "base_url", "api_key_env", "urls")
    assert marked == {name for name in fields if name.rpartition(".")[2] in sends}
    table = PAGE.read_text().partition("## Trusted files")[2].partition("\n\nOn the command line")[0]
    assert marked == set(re.findall(r"`(\w+\.\w+)`", table))


def test_the_commands_that_take_trust_are_those_of_the_page() -> None:
    """``--trust`` is no setting either, so that no run records it."""
    group: Any = typer.main.get_command(app)
    options = {name: [o for param in group.get_command(None, name).params for o in param.opts] for name in COMMANDS}

    named, takes, _ = PAGE.read_text().partition("take `--trust`")
    assert takes
    of_page = re.findall(r"`([a-z]+)[ `]", named.rpartition("\n\n")[2])
    assert sorted(of_page) == sorted(name for name, given in options.items() if "--trust" in given)
    assert "trust" not in {field.name for field in dataclasses.fields(TopLevel)}


def test_a_setting_of_a_plugin_can_need_trust(install: Callable[..., None], ppo: list[str]) -> None:
    install(
        "shell",
        """
        from dataclasses import dataclass
        from alignkit import Reward, hookimpl, option

        @dataclass(frozen=True)
        class Config:
            command: str = option("true", "a command that scores", needs_trust="runs this command")

        @hookimpl
        def alignkit_reward():
            return [Reward(name="shell", summary="", config=Config, build=lambda config, run: len)]
        """,
    )
    registry = Registry()
    registry.activate("shell")
    reward = registry.get("reward", "shell")
    selected = trust.Selected(reward, reward.config(command="rm"))

    with pytest.raises(ConfigError, match="reward 'shell': command=rm runs this command"):
        trust.check([selected])
    trust.check([selected], ["rm"])
    trust.check([trust.Selected(reward, reward.config())])
