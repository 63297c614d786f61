"""``alignkit install`` and ``alignkit uninstall``: pip in the current environment, and a check of what it installed."""

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
from alignkit.registry.plugin import installed, same_distribution


def install(
    targets: list[str] = typer.Argument(metavar="NAME_OR_PATH", help="Distribution names, folders, wheels or URLs."),
    editable: bool = typer.Option(False, "--editable", "-e", help="Install a folder in editable mode."),
) -> None:
    """Install plugins with pip and check them. Lists the settings of every plugin that was installed."""
    # pip would look up the bare name of a folder in the package index
    targets = [str(Path(target).absolute()) if Path(target).exists() else target for target in targets]
    with tempfile.TemporaryDirectory() as folder:
        report, option = Path(folder) / "report.json", ["--editable"] if editable else []
        pip("install", "--report", str(report), *(word for target in targets for word in (*option, target)))
        metadata = [each["metadata"] for each in json.loads(report.read_text("utf-8"))["install"] if each["requested"]]
    names = [each["name"] for each in metadata] or targets
    listed = json.loads(_alignkit("plugins", "--json").stdout)
    added = [
        f"{p['name']}@{p['distribution']}"
        for p in listed
        if any(same_distribution(p["distribution"], n) for n in names)
    ]
    if not added:
        distributions = " ".join(names)
        raise PluginError(
            f"{distributions} was installed but is not a plugin: it has no entry point in the group alignkit. "
            f"To remove it: pip uninstall {distributions}"
        )
    checked = _alignkit("plugins", "check", *added)
    if checked.returncode:
        typer.echo(checked.stdout + checked.stderr, nl=False)
        raise typer.Exit(checked.returncode)
    typer.echo(_alignkit("plugins", *added).stdout, nl=False)


def _alignkit(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a new process, which sees what pip has just installed."""
    return subprocess.run([sys.executable, "-P", "-m", "alignkit", *arguments], capture_output=True, text=True)


def uninstall(
    names: list[str] = typer.Argument(metavar="NAME", help="Plugins, NAME@DISTRIBUTION, or distribution names."),
) -> None:
    """Uninstall plugins with pip. Their dependencies stay installed."""
    providers = sorted({_provider(name) for name in names})
    pip("uninstall", "--yes", *(provider.split()[0] for provider, _ in providers))
    for provider, plugins in providers:
        typer.echo(f"uninstalled {provider} (plugins: {plugins})")


def _provider(name: str) -> tuple[str, str]:
    """The distribution and plugins that ``muon``, ``muon@alignkit-muon`` or ``alignkit-muon`` names.

    Returns:
        Such as ``("alignkit-muon 0.1", "muon")``.

    Raises:
        PluginError: no such plugin, several, or a built-in one.
    """
    plugins = installed()
    plugin, _, distribution = name.partition("@")
    matches = [p for p in plugins if p.is_from(name)]
    matches = matches or [p for p in plugins if p.name == plugin and p.is_from(distribution or p.distribution)]
    if not matches:
        known = sorted({p.name for p in plugins if not p.builtin})
        others = f"Installed: {', '.join(known) or 'only the built-in plugins'}"
        raise PluginError(f"no plugin '{name}' is installed.{did_you_mean(name, known)} {others}")
    distributions = list(dict.fromkeys(p.distribution for p in matches))
    if len(distributions) > 1:
        commands = " or ".join(f"alignkit uninstall {name}@{each}" for each in distributions)
        raise PluginError(f"{' and '.join(distributions)} both provide a plugin '{name}'. Run {commands}")
    if matches[0].builtin:
        raise PluginError(f"{name} is part of alignkit. To remove alignkit: pip uninstall alignkit")
    return matches[0].provider, ", ".join(p.name for p in plugins if p.distribution == distributions[0])


def pip(*arguments: Any) -> None:
    """Run pip in this environment.

    Raises:
        PluginError: pip is not installed, or it fails.
    """
    if importlib.util.find_spec("pip") is None:
        raise PluginError(
            f"pip is not installed in {sys.prefix}. Run {sys.executable} -m ensurepip, or {arguments[0]} with the tool "
            "that created the environment, such as uv pip"
        )
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    as_root = () if arguments[0] == "download" else ("--root-user-action=ignore",)
    command = [sys.executable, "-m", "pip", arguments[0], *quiet, *as_root, *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line[len("error: ") :] for line in lines if line.lower().startswith("error: ")]
        reasons = [line for line in errors if " " in line] or lines[-1:]  # a single word is pip's name of the error
        raise PluginError(f"pip could not {arguments[0]} {arguments[-1]}: {' '.join(reasons)}")
