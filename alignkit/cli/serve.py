"""``alignkit serve``."""

from __future__ import annotations

import typer

from alignkit import paths
from alignkit.cli import common, completion
from alignkit.errors import ConfigError
from alignkit.exporting import cached, serving, source
from alignkit.labeling.serve import LOOPBACK, listen


def serve(
    run: str = typer.Argument(
        metavar="RUN", autocompletion=completion.run_folders, help="The folder of a finished run that trained a policy."
    ),
    options: list[str] = typer.Argument(
        None, metavar="[-- OPTION...]", help="Further options of the server, after `--`."
    ),
    engine: serving.Engine = typer.Option("transformers", help="The server: `transformers serve`, or vLLM."),
    host: str = typer.Option("127.0.0.1", metavar="ADDRESS", help="The address to listen on."),
    port: int = typer.Option(8000, min=1, max=65535, help="The port to listen on."),
    dtype: str = typer.Option("bfloat16", metavar="DTYPE", help="The dtype of the served weights."),
    print_command: bool = typer.Option(False, "--print", help="Print the command that starts the server, and exit."),
) -> None:
    """Serve a run with an OpenAI-compatible API. Ctrl-C stops the server."""
    folder = paths.expand(run)
    if source.read(folder, "serve")["role"] != "policy":  # before torch is imported
        raise ConfigError(
            f"serve: {run} is a reward model, which cannot answer. Score answers: alignkit score {run} FILE"
        )
    if not print_command:
        serving.check_installed(engine)
        listen(host, port).close()
        if host not in LOOPBACK:
            typer.echo("warning: other machines can use the server, and what is sent is not encrypted", err=True)
    common.quiet()
    model = cached.cached(folder, dtype, lambda line: typer.echo(line, err=print_command))
    command = serving.command(engine, model, host, port, options or [])
    if print_command:
        typer.echo(str(command))
        return
    log = model.parent / f"server-{port}.log"
    typer.echo(f"starting {engine} serve, which prints to {log}")

    def ready() -> None:
        address = f"http://{serving.named(host)}:{port}/v1"
        typer.echo(f"serving {run} as model {model.name!r} on {address} (press Ctrl-C to stop)")

    serving.run(command, host, port, log, ready)
