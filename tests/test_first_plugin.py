"""docs/first-plugin.md, line by line: its files are written, its commands run, and what it shows is what they print."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from conftest import Venv

PAGE = Path(__file__).parents[1] / "docs" / "first-plugin.md"
SMALL = ["train.max_steps=1", "data.eval_size=2", "train.per_device_train_batch_size=1", "train.use_cpu=true"]


def shown(line: str) -> re.Pattern[str]:
    """What a line of the page stands for: itself, where "..." is anything."""
    return re.compile(re.escape(line.strip()).replace(re.escape("..."), ".*"))


def test_the_page_is_true_line_by_line(venv: Venv, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    before, ran = venv.files(), []
    for said, language, block in re.findall(r"(.*?)^```(\w+)\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        if language in ("python", "toml"):
            file = re.findall(r"`([\w.]+\.(?:py|toml))`", said)[-1]
            (tmp_path / file).write_text(block)
            if file.startswith("test_"):
                tested = venv.run("pytest", "-q", "-p", "no:cacheprovider", file, cwd=tmp_path)
                assert tested.returncode == 0, tested.stdout
            continue
        for command, printed in re.findall(r"^\$ alignkit ([^\n]*)\n((?:(?!\$ ).*\n)*)", block, re.M):
            if command == "plugins check focal":  # the page has just put this line there
                module = tmp_path / "alignkit_focal.py"
                module.write_text("import torch\n" + module.read_text())
            more = ["--model", str(tiny_model()), *SMALL] if command.startswith("train") else []
            done = venv.run("alignkit", *shlex.split(command), *more, cwd=tmp_path)
            lines = iter((done.stdout + done.stderr).splitlines())
            for line in printed.splitlines():
                assert any(shown(line).match(real.strip()) for real in lines), (command, line, done.stdout, done.stderr)
            is_wrong = "error:" in printed or "check focal" in command
            assert (done.returncode != 0) == is_wrong, done.stderr
            ran.append(command.split()[0])

    assert ran == ["install", "plugins", "train", "plugins", "check", "train", "plugins", "uninstall"]
    assert venv.files() == before


def test_it_is_as_short_as_it_says() -> None:
    code, toml = (re.search(rf"```{name}\n(.*?)```", PAGE.read_text(), re.S) for name in ("python", "toml"))
    assert code is not None
    assert toml is not None

    assert sum(bool(line) for line in code[1].splitlines()) <= 10
    assert sum(bool(line) for line in toml[1].splitlines()) <= 6
