"""The command line. Each command is a module of this package, imported when the command runs.

A command imports torch inside its function, after it has checked its arguments.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from typing import Any

import typer
from typer.core import CompletionItem, TyperGroup  # type: ignore[attr-defined]  # the first is not exported

from alignkit.api import libraries
from alignkit.cli import terminal
from alignkit.errors import AlignkitError, one_line

COMMANDS = {  # each with the first sentence of its function's docstring
    "train": "Train a stage, after the stages that it needs.",
    "launch": "Train in several processes, on one node or on several.",
    "sweep": "Train a run for every combination of settings.",
    "watch": "Show the curves of a run in the terminal, while it trains.",
    "check": "Check a training command and print its plan.",
    "plan": "Estimate the memory of a run before it starts.",
    "config": "Print the config of a stage, with a comment on every key.",
    "chat": "Chat with a model.",
    "sample": "Sample answers to prompts.",
    "label": "Rank answers in a browser.",
    "rank": "Rank sampled answers by a judge or by score.",
    "score": "Score answers with a reward model.",
    "evaluate": "Measure perplexity or lm-eval scores of runs, and compare them with another run.",
    "compare": "Compare runs on the same held-out prompts.",
    "export": "Write a run as a standard Transformers model, and verify it against the run.",
    "serve": "Serve a run with an OpenAI-compatible API.",
    "serve-rollouts": "Print the command that starts a vLLM server for sampling.",
    "report": "Write an HTML report on runs: what was trained from what, whether it worked, and what it cost.",
    "runs": "List runs with stage, base, result, age and size, and the commands that continue unfinished ones.",
    "show": "Show a run: its parents and data, its held-out results, and the command that reproduces it.",
    "clean": "Delete the checkpoints of finished runs, after asking.",
    "plugins": "List, describe or check the installed plugins.",
    "new": "Create a plugin from a template.",
    "install": "Install plugins with pip and check them.",
    "uninstall": "Uninstall plugins with pip.",
    "demo": "Download the bundled model (100 MB), which the first examples train.",
    "doctor": "Show versions, extras, device, memory and disk space, and report problems.",
}
MODULES = {"uninstall": "install"}  # of commands that have no module of their name


class Commands(TyperGroup):
    """Imports the module of a command when the command is used, so that ``alignkit --help`` imports none."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**{**attributes, "commands": dict.fromkeys(COMMANDS)})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"alignkit.cli.{MODULES.get(cmd_name, cmd_name.replace('-', '_'))}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(getattr(module, cmd_name.replace("-", "_")))
        return typer.main.get_command(single)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[CompletionItem]:
        """The commands that begin so. Unlike TyperGroup's, it imports none."""
        found = [(name, help) for name, help in COMMANDS.items() if name.startswith(incomplete)]
        options = super(TyperGroup, self).shell_complete(ctx, incomplete)
        return [*(CompletionItem(name, help=help) for name, help in found), *options]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


__all__ = ["main", "run"]

app = typer.Typer(
    name="alignkit",
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from alignkit import __version__

        print(f"alignkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error, and all warnings."),
    trust: bool = typer.Option(
        False, "--trust-remote-code", help="Run the code of model repositories: model_kwargs.trust_remote_code=true."
    ),
) -> None:
    """RLHF on one GPU, every stage a plugin."""


FLAGS = {  # accepted before and after the command -> the variable that it sets
    "--debug": "ALIGNKIT_DEBUG",
    "--trust-remote-code": "ALIGNKIT_TRUST_REMOTE_CODE",
}
UsageError: Any = typer.BadParameter.__mro__[1]  # typer vendors click


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 after an error (one line on stderr), 130 after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv
    libraries.set_environment()
    for flag, variable in FLAGS.items():
        if flag in arguments:
            os.environ[variable] = "1"
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a not in FLAGS] or ["--help"]
    try:
        return int(app(arguments, prog_name="alignkit", standalone_mode=False) or 0)
    except UsageError as error:
        command = f"{arguments[0]} " if arguments[0] in COMMANDS else ""
        text = error.format_message()
        message = f"{text}{'' if text.endswith(('.', '?')) else '.'} See alignkit {command}--help"
    except AlignkitError as error:
        if debug:
            traceback.print_exc()
        message = str(error)
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        from alignkit.registry.blame import culprit

        if message_of_plugin := culprit(error):
            message = message_of_plugin
        elif isinstance(error, OSError) and error.strerror:  # an unusable path, a full disk
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        else:
            message = f"{one_line(error)}. This is unexpected. Run again with --debug for the traceback"
    from alignkit.cli import processes

    processes.report(message)
    return 2


def run() -> None:
    """The console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot encode a character must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    terminal.protect()
    sys.exit(main())
