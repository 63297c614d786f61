"""Rendered conversations tokenized in pieces, so that a turn that many texts have in common is tokenized once.

A tokenizer cuts a text at its special tokens before it does anything else. The token ids of a text are therefore those
of its pieces, each of which begins with a special token and ends before the next.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

SEPARATOR = "\ufdd1"  # a noncharacter, which stands for a special token
KEPT = 2048  # pieces of which the token ids are kept


class Pieces:
    """Token ids from a backend of the ``tokenizers`` library, which cuts texts at the special tokens ``cuts``."""

    def __init__(self, backend: Any, cuts: Iterable[str]) -> None:
        self._backend = backend
        longest_first = sorted(filter(None, cuts), key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._known: tuple[str, list[int]] = "", []  # the last text up to its last piece, with its token ids
        self._of_piece = functools.lru_cache(KEPT)(self._tokenize)

    def ids(self, text: str) -> list[int]:
        """The token ids of a text in which special tokens are tokens."""
        self._backend.encode_special_tokens = False  # whoever used the backend last may have set these
        self._backend.no_truncation()
        self._backend.no_padding()
        known, ids = self._known
        if text.startswith(known) and self._cut.match(text, len(known)):  # the conversation goes on
            ids = ids.copy()
        else:
            known, ids = "", []
        start = len(known)
        for cut in self._cut.finditer(text, start + 1):
            ids += self._of_piece(text[start : cut.start()])
            start = cut.start()
        self._known = text[:start], ids.copy()
        return ids + self._of_piece(text[start:]) if start < len(text) else ids

    def _tokenize(self, piece: str) -> list[int]:
        [encoded] = self._backend.encode_batch_fast([piece], add_special_tokens=False)
        return list(encoded.ids)


def of(tokenizer: Any, sample: str) -> Pieces | None:
    """The pieces of a tokenizer that does no more than its backend, as most of Transformers; else None.

    Texts are cut at those special tokens that are in ``sample``: a tokenizer may have thousands.
    """
    backend = _backend(tokenizer)
    if backend is None:
        return None
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.normalized]
    if tokenizer.split_special_tokens or any(token.lstrip or token.single_word for token in added):
        return None  # what is a token depends on the text before it
    texts = [str(token) for token in added]
    return Pieces(backend, [text for text in texts if text in sample and not _inside_another(text, texts)])


def plain_behind(tokenizer: Any, plain: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """As ``plain``, which tokenizes a text as if it had no special tokens, but for a text behind a special token.

    Some tokenizers add a space to the beginning of a text, but not behind a special token. It is ``plain`` itself for a
    tokenizer that does more than its backend.
    """
    from tokenizers import AddedToken, Tokenizer

    backend = _backend(tokenizer)
    if backend is None:
        return plain
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.add_tokens([AddedToken(SEPARATOR, normalized=False)])
    backend.encode_special_tokens = True  # special tokens are text; the separator is not one

    def ids(text: str) -> list[int]:
        if SEPARATOR in text:
            return plain(text)
        return list(backend.encode(SEPARATOR + text, add_special_tokens=False).ids[1:])

    return ids


def _backend(tokenizer: Any) -> Any:
    """The backend of a tokenizer that does no more than it; else None."""
    encode = getattr(type(tokenizer), "_encode_plus", None)
    is_of_transformers = getattr(encode, "__module__", "") == "transformers.tokenization_utils_tokenizers"
    is_only_backend = is_of_transformers or getattr(tokenizer, "is_only_backend", False)
    return tokenizer.backend_tokenizer if is_only_backend else None


def _inside_another(token: str, tokens: list[str]) -> bool:
    """Whether a token can begin inside the text of another, which then is what the tokenizer takes."""
    rests = (other[start:] for other in tokens for start in range(1, len(other)))
    return any(rest.startswith(token) or token.startswith(rest) for rest in rests)
