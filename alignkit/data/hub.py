"""Whether the Hugging Face hub can be reached, and what its errors mean.

Imports none of its libraries at the top, as they read the environment once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

from alignkit.errors import one_line

TIMEOUT = 5  # seconds


@functools.cache
def offline_if_unreachable() -> None:
    """Set the offline mode of the hub's libraries if the hub cannot be reached.

    They then use their caches at once, or fail at once. Otherwise they try again for up to a minute.
    """
    if os.environ.get("HF_HUB_OFFLINE") or _is_reachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            loaded: Any = sys.modules[module]
            loaded.HF_HUB_OFFLINE = True


def reason(error: BaseException, name: str, revision: str | None = None) -> str:
    """Why ``name`` cannot be loaded from the hub, and what to do, as one line. ``error`` is that of a library."""
    from huggingface_hub import constants, errors, get_token

    endpoint, causes = constants.ENDPOINT, list(_causes(error))

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in causes)

    token = "use a token that has access" if get_token() else "set the environment variable HF_TOKEN"
    at = f" at revision '{revision}'" if revision else ""
    if is_a(errors.GatedRepoError):
        return f"{name} is gated. Accept its terms on {endpoint}/{name}, and {token}"
    if is_a(errors.RevisionNotFoundError):
        return f"{name} has no revision '{revision or 'main'}'"
    if is_a(errors.RepositoryNotFoundError):
        return f"{name} is not on {endpoint}, or it is private. Check the name; if it is private, {token}"
    if is_a(errors.RemoteEntryNotFoundError):
        return f"{name}{at} has no such file: {one_line(error)}"
    for each in causes:
        if isinstance(each, errors.HfHubHTTPError) and each.response.status_code in (401, 403):
            return f"{endpoint} denies access to {name} (HTTP {each.response.status_code}): {token}"
    if is_a(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        return (
            f"{name}{at} is not in the cache, and the hub is offline: HF_HUB_OFFLINE is set, or {endpoint} cannot be "
            "reached"
        )
    return one_line(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_reachable(endpoint: str) -> bool:
    import ssl  # these are slow to import
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:  # an answer
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the libraries have certificates of their own
    except (OSError, ValueError):
        return False
    return True
