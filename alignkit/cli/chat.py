"""``alignkit chat``."""

from __future__ import annotations

import typer

from alignkit.cli import common


def chat(
    model: str = typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, a model folder, a hub id."),
    prompt: str = typer.Option(None, "--prompt", metavar="TEXT", help="Ask this one thing and leave."),
    max_new_tokens: int = typer.Option(256, help="How long an answer may become."),
    temperature: float = typer.Option(0.0, help="0: always the likeliest token; above: sample."),
) -> None:
    """Talk to a model; answers appear as they are written. An empty line or Ctrl-D leaves."""
    from alignkit.generation.chat import locate

    located = locate(model)  # a wrong name is told before torch is imported
    common.quiet()
    from alignkit.generation.chat import Chat

    talk = Chat(located, max_new_tokens, temperature)
    if prompt is not None:
        talk.say(prompt)
        return
    typer.echo(f"{model}. An empty line leaves.")
    while True:
        try:
            said = input("\n> ").strip()
        except EOFError:
            return
        if not said:
            return
        talk.say(said)
