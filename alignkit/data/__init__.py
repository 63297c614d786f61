"""From files, folders and the hub to rows, and from rows to token ids.

Nothing here imports torch at the top.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = [
    "IGNORE",
    "Branches",
    "Encoded",
    "EncodedRanking",
    "Encoder",
    "Mapped",
    "PromptEncoder",
    "Ranked",
    "RankingEncoder",
    "SequenceEncoder",
    "check_column_fits",
    "check_fit",
    "conversation_ids",
    "encode",
    "encode_answer",
    "encode_each",
    "encode_rankings",
    "encode_rows",
    "encoded_rankings",
    "ids_key",
    "load",
    "load_tokenizer",
    "pad_token",
    "prompt_ids",
    "prompt_of",
    "prompt_text",
    "stored_dataset",
    "tokenizer_of_run",
    "usable_rankings",
]

if TYPE_CHECKING:
    from alignkit.data.chat_template import (
        IGNORE,
        conversation_ids,
        encode,
        encode_answer,
        load_tokenizer,
        pad_token,
        prompt_ids,
        tokenizer_of_run,
    )
    from alignkit.data.encoding import (
        Branches,
        EncodedRanking,
        Ranked,
        check_column_fits,
        check_fit,
        encode_each,
        encode_rankings,
        encode_rows,
        encoded_rankings,
        ids_key,
        usable_rankings,
    )
    from alignkit.data.prompts import prompt_of, prompt_text
    from alignkit.data.reading import load
    from alignkit.data.row_encoders import PromptEncoder, RankingEncoder, SequenceEncoder
    from alignkit.data.spool import Mapped
    from alignkit.data.token_cache import Encoded, Encoder, stored_dataset
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
