"""Whether the Hugging Face hub can be reached. Imports none of its libraries, which read the environment once."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

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
