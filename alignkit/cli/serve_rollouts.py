"""``alignkit serve-rollouts``."""

from __future__ import annotations

import os
import shlex
import shutil

import typer

from alignkit import paths
from alignkit.cli import completion
from alignkit.errors import ConfigError
from alignkit.exporting import vllm_rollouts


def serve_rollouts(
    model: str = typer.Argument(
        metavar="RUN|MODEL",
        autocompletion=completion.run_folders,
        help="The run that PPO or GRPO starts from, or a base model: a hub id, a folder, bundled:smollm2-135m.",
    ),
    options: list[str] = typer.Argument(None, metavar="[-- OPTION...]", help="Further options of vLLM, after `--`."),
    rank: int = typer.Option(
        None, min=1, metavar="R", help="The rank of the policy's adapter, tuner.r. Default: that of the run, or 16."
    ),
    host: str = typer.Option("127.0.0.1", metavar="ADDRESS", help="The address to listen on."),
    port: int = typer.Option(8000, min=1, max=65535, help="The port to listen on."),
    start: bool = typer.Option(False, "--exec", help="Start the server in place of this command."),
    program: str = typer.Option("vllm", metavar="PATH", help="The program of vLLM, in an environment of its own."),
) -> None:
    """Print the command that starts a vLLM server for sampling."""
    words = vllm_rollouts.command(model, rank, host, port, [*(options or [])], program)
    if not start:
        variables = [f"{name}={value}" for name, value in vllm_rollouts.ENVIRONMENT.items()]
        typer.echo(" ".join([*variables, shlex.join(words)]))
        return
    if shutil.which(paths.expand(program)) is None:
        raise ConfigError(
            f"serve-rollouts: there is no program {program}. Install vLLM in an environment of its own, and name its "
            "program with --program"
        )
    os.execvpe(words[0], words, {**os.environ, **vllm_rollouts.ENVIRONMENT})
