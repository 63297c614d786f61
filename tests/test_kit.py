"""`alignkit new`, `install` and `uninstall`, for real: pip, a fresh environment, the generated plugin's own tests."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest
from conftest import Venv

from alignkit.cli import main
from alignkit.cli.new import KINDS, TEMPLATES


@pytest.mark.slow
def test_a_generated_plugin_of_each_kind_installs_is_sound_passes_its_own_tests_and_leaves_no_trace(
    venv: Venv, tmp_path: Path
) -> None:
    before = venv.files()
    names = [f"fine-{kind}" for kind in KINDS]
    for kind, name in zip(KINDS, names, strict=True):
        assert venv.run("alignkit", "new", name, "--kind", kind, cwd=tmp_path).returncode == 0
        folder = tmp_path / f"alignkit-{name}"
        module = f"alignkit_fine_{kind}.py"
        assert {p.name for p in folder.iterdir()} == {"pyproject.toml", "README.md", module, f"test_{module}"}
        assert not any(left in p.read_text() for p in folder.iterdir() for left in ("my_thing", "my-thing", "SUMMARY"))

    installed = venv.run("alignkit", "install", *(f"alignkit-{name}" for name in names), cwd=tmp_path)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    for wrong, told in (("fine-loss@nowhere", "no plugin 'fine-loss@nowhere' is installed"),):
        assert told in venv.run("alignkit", "uninstall", wrong).stderr
    listed = " ".join(venv.run("alignkit", "plugins").stdout.split())
    for kind, name in zip(KINDS, names, strict=True):
        told = f"alignkit-{name} 0.1  {KINDS[kind][0]}"
        assert f"{name}  {told}\n" in installed.stdout
        assert told.replace("  ", " ") in listed
    (tmp_path / "tests").mkdir()  # away from the modules: what is installed is tested
    tests = [shutil.copy(file, tmp_path / "tests") for file in tmp_path.glob("alignkit-*/test_*.py")]
    tested = venv.run("pytest", "-q", "-p", "no:cacheprovider", *map(str, tests), cwd=tmp_path)
    assert len(tests) == len(KINDS)
    assert tested.returncode == 0, tested.stdout + tested.stderr

    removed = venv.run("alignkit", "uninstall", *names[:-1], f"{names[-1]}@alignkit-{names[-1]}")
    assert set(removed.stdout.splitlines()) == {f"uninstalled alignkit-{n} 0.1 (plugins: {n})" for n in names}
    assert venv.files() == before
    assert "fine-" not in venv.run("alignkit", "plugins").stdout


def test_the_page_on_stages_shows_what_is_generated() -> None:
    page = (Path(__file__).parents[1] / "docs" / "stages.md").read_text().split("\n## ")[0]
    template = (TEMPLATES / "stage" / "alignkit_my_thing.py").read_text().replace("my-thing", "mine")
    generated = [ast.dump(statement) for statement in ast.parse(template).body]
    shown = [ast.dump(ast.parse(block).body[0]) for block in re.findall(r"```python\n(.*?)```", page, re.S)]

    assert len(shown) == 2
    assert set(shown) <= set(generated)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Fine", "invalid plugin name 'Fine'. Use lowercase letters and digits, separated by hyphens"),
        ("fine_thing", "invalid plugin name 'fine_thing'"),
        ("../fine", "invalid plugin name '../fine'"),
        ("lora", "alignkit 0.1.0 already provides 'lora'. Choose another name"),
        ("alignkit-adafactor", "alignkit 0.1.0 already provides 'adafactor'. Choose another name"),
        ("check", "invalid plugin name 'check'"),
        ("there", "alignkit-there already exists. Choose another name, or remove it"),
    ],
)
def test_new_refuses_in_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("alignkit-there").mkdir()

    assert main(["new", name, "--kind", "loss"]) == 2
    assert capsys.readouterr().err.startswith(f"alignkit: error: {told}")
    assert [path.name for path in tmp_path.iterdir()] == ["alignkit-there"]


BROKEN = {
    "pyproject.toml": """
[project]
name = "odd"
version = "0.3"
{entry}
[tool.setuptools]
py-modules = ["odd"]
""",
    "odd.py": "import nosuchlib",
}
ENTRY = '[project.entry-points.alignkit]\nodd = "odd"\n'


def test_install_says_what_is_wrong_with_what_it_installed_and_uninstall_removes_it(venv: Venv, tmp_path: Path) -> None:
    for file, text in BROKEN.items():
        (tmp_path / file).write_text(text.format(entry=ENTRY))
    before = venv.files()
    installed = venv.run("alignkit", "install", str(tmp_path))

    assert installed.returncode == 1
    assert installed.stdout.startswith(
        "odd  odd 0.3  could not be imported: ModuleNotFoundError: No module named 'nosuchlib'"
    )
    assert installed.stdout.count("\n") == 1
    listed = venv.run("alignkit", "plugins")
    assert (listed.returncode, "odd         odd 0.3" in listed.stdout) == (0, True)  # it locks nobody out
    assert venv.run("alignkit", "uninstall", "odd").returncode == 0
    assert venv.files() == before


def test_a_distribution_that_is_no_plugin_is_not_uninstalled(venv: Venv, tmp_path: Path) -> None:
    for file, text in BROKEN.items():
        (tmp_path / file).write_text(text.format(entry=""))
    installed = venv.run("alignkit", "install", str(tmp_path))

    assert installed.returncode == 2
    problem = "odd was installed but is not a plugin: it has no entry point in the group alignkit"
    assert installed.stderr == f"alignkit: error: {problem}. To remove it: pip uninstall odd\n"
    refused = venv.run("alignkit", "uninstall", "odd")
    assert refused.stderr == "alignkit: error: no plugin 'odd' is installed. Installed: only the built-in plugins\n"
    assert (venv.site / "odd.py").exists()


@pytest.mark.parametrize("name", ["alignkit", "lora"])
def test_what_comes_with_alignkit_is_not_uninstalled(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["uninstall", name]) == 2
    assert f"{name} is part of alignkit" in capsys.readouterr().err


def test_what_pip_cannot_install_is_one_line(venv: Venv, tmp_path: Path) -> None:
    failed = venv.run("alignkit", "install", "alignkit-no-such-thing")

    assert failed.returncode == 2
    assert failed.stderr.startswith("alignkit: error: pip could not install alignkit-no-such-thing: ")
    assert failed.stderr.count("\n") == 1


def test_a_missing_pip_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert main(["install", "alignkit-kto"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("alignkit: error: pip is not installed in ")
    assert told.count("\n") == 1
