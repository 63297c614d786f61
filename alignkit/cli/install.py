"""``alignkit install`` and ``alignkit uninstall``: pip in the running environment, and a look at what it brought."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer

from alignkit.errors import PluginError, did_you_mean
from alignkit.registry.plugin import installed, same


def install(
    targets: list[str] = typer.Argument(metavar="NAME_OR_PATH...", help="Distribution names, folders, wheels or URLs."),
    editable: bool = typer.Option(False, "--editable", "-e", help="Install a folder in editable mode."),
) -> None:
    """Install plugins with pip and check them. Lists the settings of every plugin that was installed."""
    # pip would take a folder's bare name for a name in the index
    targets = [str(Path(target).absolute()) if Path(target).exists() else target for target in targets]
    with tempfile.TemporaryDirectory() as folder:
        report, option = Path(folder) / "report.json", ["--editable"] if editable else []
        _pip("install", "--report", str(report), *(word for target in targets for word in (*option, target)))
        metadata = [each["metadata"] for each in json.loads(report.read_text("utf-8"))["install"] if each["requested"]]
    names = [each["name"] for each in metadata] or targets
    listed = json.loads(_alignkit("plugins", "--json").stdout)
    brought = [f"{p['name']}@{p['distribution']}" for p in listed if any(same(p["distribution"], n) for n in names)]
    if not brought:
        what = " ".join(names)
        raise PluginError(f"{what} is no plugin: it has no entry point in the group alignkit. pip uninstall {what}")
    checked = _alignkit("plugins", "check", *brought)
    if checked.returncode:
        typer.echo(checked.stdout + checked.stderr, nl=False)
        raise typer.Exit(checked.returncode)
    typer.echo(_alignkit("plugins", *brought).stdout, nl=False)


def _alignkit(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a fresh process, which sees what pip has just put on the path."""
    return subprocess.run([sys.executable, "-P", "-m", "alignkit", *arguments], capture_output=True, text=True)


def uninstall(
    names: list[str] = typer.Argument(metavar="NAME...", help="Plugins, NAME@DISTRIBUTION, or distribution names."),
) -> None:
    """Uninstall plugins with pip. Their dependencies stay installed."""
    meant = sorted({_provider(name) for name in names})
    _pip("uninstall", "--yes", *(provider.split()[0] for provider, _ in meant))
    for provider, given in meant:
        typer.echo(f"{provider} is uninstalled, and with it: {given}")


def _provider(name: str) -> tuple[str, str]:
    """What ``kto``, ``kto@alignkit-kto`` or a distribution's name means: ``("alignkit-kto 0.1", "kto")``.

    Raises:
        PluginError: nothing that can be uninstalled.
    """
    found = installed()
    plugin, _, distribution = name.partition("@")
    meant = [p for p in found if p.is_from(name)]
    meant = meant or [p for p in found if p.name == plugin and p.is_from(distribution or p.distribution)]
    if not meant:
        known = sorted({p.name for p in found if not p.builtin})
        there = f"Installed: {', '.join(known) or 'only the built-in'}"
        raise PluginError(f"no plugin '{name}' is installed.{did_you_mean(name, known)} {there}")
    distributions = list(dict.fromkeys(p.distribution for p in meant))
    if len(distributions) > 1:
        which = " or ".join(f"alignkit uninstall {name}@{each}" for each in distributions)
        raise PluginError(f"plugin '{name}' is given by {' and '.join(distributions)}: run {which}")
    if meant[0].builtin:
        raise PluginError(f"{name} comes with alignkit itself. To remove all of it: pip uninstall alignkit")
    return meant[0].provider, ", ".join(p.name for p in found if p.distribution == distributions[0])


def _pip(*arguments: Any) -> None:
    if importlib.util.find_spec("pip") is None:
        raise PluginError(
            f"pip is not in this environment ({sys.prefix}): run {sys.executable} -m ensurepip, or {arguments[0]} with "
            "what made the environment, such as uv pip"
        )
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    command = [sys.executable, "-m", "pip", arguments[0], *quiet, "--root-user-action=ignore", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        told = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line[len("error: ") :] for line in told if line.lower().startswith("error: ")]
        why = [line for line in errors if " " in line] or told[-1:]  # the others are pip's names for kinds of errors
        raise PluginError(f"pip could not {arguments[0]} {arguments[-1]}: {' '.join(why)}")
