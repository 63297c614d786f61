"""The command line. Each command is a small file; whatever imports torch is imported inside it."""

from __future__ import annotations

import io
import os
import sys
import traceback
from typing import Any

import typer

from alignkit.cli import chat, check, compare, config, install, new, plugins, rank, sample, score, train
from alignkit.errors import AlignkitError, one_line
from alignkit.registry.plugin import culprit

app = typer.Typer(
    name="alignkit",
    help="RLHF on one GPU, every stage a plugin.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("check")(check.check)
app.command("chat")(chat.chat)
app.command("config")(config.config)
app.command("plugins")(plugins.plugins)
app.command("new")(new.new)
app.command("install")(install.install)
app.command("uninstall")(install.uninstall)
app.command("sample")(sample.sample)
app.command("rank")(rank.rank)
app.command("score")(score.score)
app.command("compare")(compare.compare)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error, and all warnings."),
) -> None:
    """RLHF on one GPU, every stage a plugin."""


UsageError: Any = typer.BadParameter.__mro__[1]  # typer carries its own click


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status: 0, 2 for an error (one line on stderr), 130 for Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainers send a usage ping otherwise
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or a pipe that lacks a character must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    debug = "--debug" in arguments  # taken anywhere, before or after the command
    if debug:
        os.environ["ALIGNKIT_DEBUG"] = "1"
    arguments = [a for a in arguments if a != "--debug"] or ["--help"]
    try:
        return int(app(arguments, standalone_mode=False) or 0)
    except UsageError as error:
        command = "" if arguments[0].startswith("-") else f"{arguments[0]} "
        message = f"{error.format_message()} See alignkit {command}--help"
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
        who, told = culprit(error), one_line(error)
        if who:
            message = f"{who}: {told}. --debug shows where it comes from"
        elif isinstance(error, OSError) and error.strerror:  # a path that cannot be used, a full disk
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        else:
            message = f"{told}. This is unexpected; --debug shows where it comes from"
    print("alignkit: error:", " ".join(message.split()), file=sys.stderr)
    return 2


def run() -> None:
    """The console script."""
    sys.exit(main())
