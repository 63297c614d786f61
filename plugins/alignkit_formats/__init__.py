"""The common data formats. Their converters are in ``convert.py``."""

from alignkit import DataFormat, Rated, fields_of, hookimpl
from alignkit_formats import convert
from alignkit_formats.convert import messages, prompt_completion

__all__ = ["messages", "prompt_completion"]


@hookimpl
def alignkit_data() -> list[DataFormat]:
    return [
        DataFormat(
            name="messages",
            summary="messages: [{role, content}, ...]",
            fits=lambda row: max(fields_of("messages")(row), fields_of("messages", "prompt")(row)),
            convert=messages,
        ),
        DataFormat(
            name="prompt-completion",
            summary="prompt, and completion or response",
            fits=lambda row: max(fields_of("prompt", "completion")(row), fields_of("prompt", "response")(row)),
            convert=prompt_completion,
        ),
        DataFormat(
            name="alpaca",
            summary="instruction, output, and optionally input",
            fits=fields_of("instruction", "output"),
            convert=convert.alpaca,
        ),
        DataFormat(
            name="sharegpt",
            summary="conversations: [{from, value}, ...], for preferences also chosen and rejected: {from, value}",
            fits=lambda row: max(
                fields_of("conversations")(row), fields_of("conversations", "chosen", "rejected")(row)
            ),
            convert=convert.sharegpt,
        ),
        DataFormat(
            name="preference",
            summary="prompt, chosen, rejected (texts or messages; without prompt, messages that begin alike)",
            fits=convert.fits_preference,
            convert=convert.preference,
        ),
        DataFormat(
            name="hh-rlhf",
            summary="chosen and rejected: whole transcripts with 'Human:' and 'Assistant:' turns",
            fits=convert.fits_hh_rlhf,
            convert=convert.hh_rlhf,
        ),
        DataFormat(
            name="ranking",
            summary="prompt, responses: [K >= 2 texts], ranks: [K numbers, lower is better, equal is a tie]",
            fits=fields_of("prompt", "responses", "ranks"),
            convert=convert.ranking,
        ),
        DataFormat(
            name="rated",
            summary="label (true or false) with prompt and completion, or with messages",
            fits=convert.fits_rated,
            convert=convert.rated,
            rows=(Rated,),
        ),
        DataFormat(
            name="prompts",
            summary="prompt (a text or messages)",
            fits=fields_of("prompt"),
            convert=convert.prompts,
        ),
        DataFormat(
            name="text",
            summary="text",
            fits=fields_of("text"),
            convert=convert.text,
        ),
    ]
