"""``alignkit chat``."""

from __future__ import annotations

import typer

from alignkit.cli import common, completion


def chat(
    model: str = typer.Argument(
        metavar="RUN_OR_MODEL",
        help="A run folder, a model folder or a hub id.",
        autocompletion=completion.run_folders,
    ),
    overrides: list[str] = common.ModelKwargs,
    prompt: str = typer.Option(None, "--prompt", metavar="TEXT", help="Answer this prompt and exit."),
    max_new_tokens: int = typer.Option(256, help="Maximum tokens of an answer."),
    temperature: float = typer.Option(0.0, help="Sampling temperature; 0 is greedy decoding."),
) -> None:
    """Chat with a model. Answers are streamed. An empty line or Ctrl-D exits."""
    from alignkit.generation.chat import locate

    kwargs = common.model_kwargs_of(model, overrides)
    located = locate(model)  # before torch is imported, so that a wrong name fails at once
    common.quiet()
    from alignkit.generation.chat import Chat

    conversation = Chat(located, max_new_tokens, temperature, kwargs)
    if prompt is not None:
        conversation.say(prompt)
        return
    typer.echo(f"{model}. Enter an empty line to exit.")
    while True:
        try:
            message = input("\n> ").strip()
        except EOFError:
            return
        if not message:
            return
        conversation.say(message)
