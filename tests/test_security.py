"""The statements of ``docs/security.md``."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import pty
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignkit import yaml
from alignkit.cli import label, main, terminal
from alignkit.cli.terminal import Printable, printable
from alignkit.config import trust
from alignkit.data.rendering import ChatTemplate
from alignkit.errors import AlignkitError, ConfigError, DataError
from alignkit.generation import scorers
from alignkit.registry import Registry
from alignkit.runs import lineage, lock, manifest
from alignkit.runs import weights as run_weights

Train = Callable[..., Path]
PAGE = Path(__file__).parents[1] / "docs" / "security.md"
AUDITED = Path(__file__).with_name("audited.py")
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m"  # sets the title, clears the screen, and changes the color

# --- settings that need trust ----------------------------------------------------------------------------------------

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
    Path("evil.py").write_text(
        "import pathlib; pathlib.Path('owned').touch()\n\ndef score(prompts, answers):\n    return [0.0] * len(answers)\n"
    )
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

    assert main(["check", "-c", "run.yaml", *ppo]) == 2
    error = capsys.readouterr().err
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
    components = [component for kind in ("reward", "judge") for component in registry.all(kind)]
    fields = {f"{c.name}.{f.name}": f for c in components for f in c.config.__dataclass_fields__.values()}
    marked = {name for name, field in fields.items() if field.metadata.get("needs_trust")}

    assert marked == {name for name in fields if name.rpartition(".")[2] in ("call", "base_url", "api_key_env")}


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


# --- run folders of others -------------------------------------------------------------------------------------------


class Payload:
    """Writes the file ``owned`` when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("owned", "w")


def set_traps(run: Path) -> None:
    """Add to a run folder what could run code."""
    for name in ("training_args.bin", "adapter_model.bin", "pytorch_model.bin", "optimizer.pt", "scheduler.pt"):
        (run / name).write_bytes(pickle.dumps(Payload()))
    for name in ("sitecustomize", "configuration_evil", "tokenization_evil", "torch", "peft"):
        (run / f"{name}.py").write_text("import pathlib; pathlib.Path('owned').touch()\n")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        settings = json.loads((run / name).read_text()) if (run / name).exists() else {}
        auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoTokenizer": ["tokenization_evil.Evil", None]}
        (run / name).write_text(json.dumps({**settings, "auto_map": auto_map, "trust_remote_code": True}))
    info = run / "evil.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[alignkit]\nevil = configuration_evil\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """A folder with two SFT runs, an adapter and a full model, and a reward run, each full of traps."""
    output = tmp_path_factory.mktemp("trained")
    demonstrations, rankings = output / "demonstrations.jsonl", output / "rankings.jsonl"
    rows = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(12)]
    demonstrations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"What is {n}?", "responses": ["It.", "No, no."], "ranks": [0, 1]} for n in range(12)]
    rankings.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", str(tiny_model()), "train.max_steps=1", "data.eval_size=4", "train.use_cpu=true"]
    for name, words in {
        "lora": ["--plugin", "sft", "--data", str(demonstrations)],
        "full": ["--plugin", "sft", "--plugin", "full", "--data", str(demonstrations)],
        "rm": ["--plugin", "rm", "--data", str(rankings), "rm.policy=base"],
    }.items():
        assert main(["train", *words, *common, "--output", str(output / name)]) == 0
    for run in ("lora/sft", "full/sft", "rm/rm"):
        set_traps(output / run)
    return output


@pytest.fixture
def stranger(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder of traps, in which commands are run."""
    folder = tmp_path / "received"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder


def test_commands_on_run_folders_of_others_run_nothing_of_them_and_use_no_network(stranger: Path) -> None:
    """In one process, which records what Python audits: imports, pickles, sockets, processes, files to write."""
    commands = [
        ["check", "--plugin", "rm", "--data", "rankings.jsonl", "rm.policy=lora/sft", "--output", "new"],
        ["runs", "."],
        ["show", "lora/sft"],
        ["report", "."],
        ["chat", "lora/sft", "--prompt", "Hello?", "--max-new-tokens", "2"],
        ["chat", "full/sft", "--prompt", "Hello?", "--max-new-tokens", "2"],
        ["sample", "lora/sft", "rankings.jsonl", "--output", "samples.jsonl", "-k", "1", "--max-new-tokens", "2"],
        ["score", "rm/rm", "rankings.jsonl"],
        ["compare", "lora/sft", "full/sft", "--reward", "rm/rm", "--limit", "2", "--max-new-tokens", "2"],
        ["evaluate", "lora/sft", "--limit", "2"],
    ]
    audited = stranger / "audited.json"
    done = subprocess.run(
        [sys.executable, "-P", AUDITED, str(audited), json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=stranger / "lora" / "sft" / ".." / "..",
        env={**os.environ, "TMPDIR": str(stranger), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
        input="y\n" * 20,
    )
    assert done.returncode == 0, done.stderr
    recorded = json.loads(audited.read_text())

    assert [status for _, status in recorded["statuses"]] == [0] * len(commands), (recorded["statuses"], done.stderr)
    assert not (stranger / "owned").exists()
    assert not {"configuration_evil", "tokenization_evil", "sitecustomize"} & set(recorded["imported"])
    assert recorded["sockets"] == []
    assert recorded["processes"] == []
    assert recorded["unpickled"] == []
    assert {file for file in recorded["written"] if not Path(file).is_relative_to(stranger)} <= {os.devnull}


def test_a_model_that_needs_its_own_code_is_an_error_and_not_a_question(
    stranger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    file = stranger / "full/sft/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "evil"}))

    assert main(["chat", "full/sft", "--prompt", "Hello?"]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not Path("owned").exists()


def test_weights_that_are_pickles_are_not_opened(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stranger / "lora/sft/adapter_model.safetensors").unlink()
    (stranger / "full/sft/model.safetensors").unlink()

    for run in ("lora/sft", "full/sft"):
        assert main(["chat", run, "--prompt", "Hello?"]) == 2
        assert f"{run} has no weights in safetensors" in capsys.readouterr().err
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_config": {"x": 1}, "megatron_core": "evil"},
        {"tokenizer_kwargs": {"trust_remote_code": True}},
        {"nested": [{"auto_map": {"AutoModel": "evil.Model"}}]},
    ],
    ids=["megatron", "tokenizer", "nested"],
)
def test_an_adapter_may_not_name_code(settings: dict[str, Any], stranger: Path) -> None:
    config = stranger / "lora/sft/adapter_config.json"
    run_weights.check(config.parent)
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))

    with pytest.raises(AlignkitError, match=r"adapter_config.json sets \w+, with which libraries run code"):
        run_weights.check(config.parent)


def test_a_checkpoint_with_a_pickle_that_runs_code_is_not_resumed(
    stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Optimizer states are pickles, which PyTorch reads without running code."""
    checkpoint = stranger / "lora/sft/checkpoints/checkpoint-1"
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Payload()))
    words = ["--plugin", "sft", "--output", "lora", "--resume", "train.max_steps=2"]

    assert main(["train", *words]) == 2
    assert "Weights only load failed" in capsys.readouterr().err
    assert not Path("owned").exists()


def test_links_in_a_run_folder_are_not_followed_by_writes(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    for name in ("report.html", f".report.html.{os.getpid()}", ".sft.lock"):
        (tmp_path / name).symlink_to(target)

    manifest.write_atomically(tmp_path / "report.html", "page")
    assert (target.read_text(), (tmp_path / "report.html").read_text()) == ("mine", "page")
    with pytest.raises(ConfigError, match="is a link"), lock.held(tmp_path / "sft"):
        pass
    assert target.read_text() == "mine"


# --- config files and templates of others ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: !!python/object/apply:os.system [touch owned]", "could not determine a constructor"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ), "more than 100,000 values"),
        ("a: &a [*a]", "more than 100,000 values"),
        ("[" * 10_000, "RecursionError"),
        (f"a: {'1' * 5000}", "ValueError"),
    ],
    ids=["object", "aliases", "itself", "depth", "digits"],
)  # fmt: skip
def test_a_config_file_is_read_without_creating_objects_or_filling_the_memory(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        yaml.loads(text, "run.yaml")


def test_anchors_still_work() -> None:
    assert yaml.loads("a: &a {x: 1}\nb: {y: *a}", "run.yaml") == {"a": {"x": 1}, "b": {"y": {"x": 1}}}


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "messages[0]['content'].__class__",
        "messages[0]['content']|attr('__class__')",
        "cycler.__init__.__globals__",
        "raise_exception.__globals__",
        "('{0.__class__}').format(messages)",
        "('{0.__class__}'|attr('format'))(messages)",
        "strftime_now.__self__.__class__",
        "messages.append(1)",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(expression: str) -> None:
    template = ChatTemplate("{% set x = " + expression + " %}{{ x }}{{ x.y }}", {}, "2026-11-26")

    for _ in range(2):  # rendered, and traced
        try:
            assert template([{"role": "user", "content": "hi"}], True) == ""
        except DataError as error:
            assert re.search("unsafe|Security|not safely callable|undefined|has no attribute", str(error))  # noqa: PT017


# --- the network -----------------------------------------------------------------------------------------------------


def test_the_command_line_turns_telemetry_off_unless_the_user_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "")
    del os.environ["HF_HUB_DISABLE_TELEMETRY"]
    assert main(["--version"]) == 0
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    assert main(["--version"]) == 0
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"


def test_the_labeling_page_listens_on_this_machine_only() -> None:
    from alignkit.labeling.serve import listen

    host = inspect.signature(label.label).parameters["host"].default.default
    with listen(host, 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        assert listening.family == socket.AF_INET


# --- the terminal ----------------------------------------------------------------------------------------------------


def test_control_characters_are_shown_as_escapes() -> None:
    assert printable(f"a\tb\n{ESCAPES}\r\x00\x7f\u202e\u2066é漢") == (
        r"a" + "\tb\n" + r"\x1b]0;owned\x07\x1b[2J\x9b31m\r\x00\x7f\u202e\u2066" + "é漢"
    )


def test_rich_keeps_its_colors_and_progress_bars_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(file=Printable(sys.stdout), force_terminal=True).print(Text("red", style="red"))  # type: ignore[arg-type]
    assert capsys.readouterr().out == "\x1b[31mred\x1b[0m\n"
    Printable(sys.stdout, has_progress=True).write("\r\x1b[A 50%\x1b[2J")
    assert capsys.readouterr().out == "\r\x1b[A 50%\\x1b[2J"


def on_a_terminal(*arguments: str) -> str:
    """What a command writes to a terminal, on standard output and standard error."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "alignkit", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "300"},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the process has ended
            break
        if not part:
            break
        written += part
    process.wait()
    os.close(ours)
    return written.decode()


def test_names_in_run_folders_do_nothing_to_a_terminal(stranger: Path) -> None:
    run = stranger / f"named{ESCAPES}"
    (stranger / "lora/sft").rename(run)
    file = run / "alignkit.json"
    record = json.loads(file.read_text())
    record["model"]["name"] = record["tuner"] = f"[red]{ESCAPES}[/nothing]"
    file.write_text(json.dumps(record))

    for command in (["show", str(run)], ["runs", str(stranger)], ["check", "--plugin", f"none{ESCAPES}"]):
        written = on_a_terminal(*command)
        assert r"\x1b]0;owned\x07" in written
        assert "\x07" not in written
        assert "\x1b]" not in written
        assert "\x9b" not in written
        assert not re.findall(r"\x1b(?!\[[0-9;]*m)", written)  # Rich's own styles
        if command[0] != "check":
            assert "[red]" in written


def test_answers_do_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """``chat`` prints what the model writes, piece by piece."""
    stream = Printable(sys.stdout)
    for piece in ("Hello \x1b", "]52;c;b3duZWQ=\x07", "!\n"):
        print(piece, flush=True, end="", file=stream)  # type: ignore[call-overload]
    assert capsys.readouterr().out == "Hello \\x1b]52;c;b3duZWQ=\\x07!\n"
    assert not terminal.cell("[red]x[/]").spans
