"""Perplexity of held-out rows, with its standard error, from sums over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

SUMS = ("nll", "tokens", "rows", "nll_nll", "nll_tokens", "tokens_tokens")


def sums(nll: Tensor, mask: Tensor, row: Tensor) -> dict[str, Tensor]:
    """The :data:`SUMS` of a batch. ``nll`` [B, T] is the negative log-likelihood of each token, 0 outside of ``mask``.

    ``row`` [B, T] says which row a token belongs to. A row without target tokens does not count. The squares are in
    float64, as :func:`of` subtracts large sums from each other that may be nearly equal.
    """
    values = torch.stack([nll.float().flatten(), mask.float().flatten()])
    added = values.new_zeros(values.shape).index_add_(1, row.flatten(), values)  # there are no more rows than tokens
    of_rows, tokens = added.cpu().double()  # MPS has no float64
    return {
        "nll": of_rows.sum(),
        "tokens": tokens.sum(),
        "rows": (tokens > 0).sum(),
        "nll_nll": (of_rows * of_rows).sum(),
        "nll_tokens": (of_rows * tokens).sum(),
        "tokens_tokens": (tokens * tokens).sum(),
    }


def of(sums: Mapping[str, float]) -> dict[str, float]:
    """The perplexity and its standard error from the :data:`SUMS` of all rows. Empty without tokens.

    Rows are independent, tokens of a row are not: the error of the mean is that of a ratio of two sums over rows, and
    the error of its exponential is, to first order, that times the perplexity.
    """
    if not sums.get("tokens"):
        return {}
    mean, rows = sums["nll"] / sums["tokens"], sums["rows"]
    perplexity = math.exp(min(mean, 700))
    if rows < 2:
        return {"perplexity": perplexity}
    squares = sums["nll_nll"] - 2 * mean * sums["nll_tokens"] + mean**2 * sums["tokens_tokens"]
    error = math.sqrt(max(squares, 0.0) * rows / (rows - 1)) / sums["tokens"]
    return {"perplexity": perplexity, "perplexity_error": perplexity * error}
