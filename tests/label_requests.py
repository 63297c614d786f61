"""Requests to the server of ``alignkit label``, valid ones and ones with mistakes, as Hypothesis strategies."""

from __future__ import annotations

import json
from typing import NamedTuple

from fuzzing import mistaken
from hypothesis import strategies as st
from label_clients import ADDRESS, JSON, Labeler

BODIES = [
    {"labeler": "anna"},
    {"ranks": {"0": 0, "1": 1}, "grades": {"0": 3}, "flags": {"1": ["rude"]}, "seconds": 4.5},
]
PATHS = ("/", "/static/app.js", "/api/session", "/api/next", "/api/undo", "/api/status", "/api/export", "/api/items/{}")
ACCEPTED = range(200, 300)
REFUSED = (400, 401, 403, 404, 405, 409, 413)


class Sent(NamedTuple):
    """A request; ``{}`` in its path is the id of the labeler's item."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]


@st.composite
def requests(draw: st.DrawFn) -> Sent:
    """A request of a browser that is signed in."""
    path = draw(st.sampled_from([*PATHS, "/api/items/{}", "/api/items/{}", "/api/items/{}/skip"]))
    method = draw(st.sampled_from(["PUT"] if path.endswith("{}") else ["GET", "POST"]))
    if not draw(st.integers(0, 9)):
        method, path = draw(st.sampled_from(["GET", "PUT", "DELETE", "HEAD"])), path + draw(_in_path())
    value = draw(st.sampled_from(BODIES))
    for _ in range(draw(st.integers(0, 2))):
        value = draw(mistaken(value))
    body = json.dumps(value).encode()
    if not draw(st.integers(0, 9)):
        body = body[: draw(st.integers(0, len(body)))] + draw(st.binary(max_size=4) | st.just(b"[" * 9000))
    headers = dict(JSON)
    if not draw(st.integers(0, 9)):
        headers[draw(st.sampled_from(["host", "origin", "content-type", "range", "cookie"]))] = draw(_in_header())
    return Sent(method, path, body, headers)


def _in_path() -> st.SearchStrategy[str]:
    return st.sampled_from(["/", "/../x", "%00", "?merge=x", "?token=%ff", "?merge=apart", "%2e%2e", "9" * 30, "%F0"])


def _in_header() -> st.SearchStrategy[str]:
    latin = st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f")
    return st.text(latin, max_size=20) | st.sampled_from([ADDRESS, "[", "[::1]:x", "bytes=9-1", "a=b; a", ":"])


def fault(person: Labeler, sent: Sent) -> str | None:
    """What is wrong with the response, and with what the request changes; None if nothing is."""
    item = person.next()
    before = person.get("/api/status").json()
    path = sent.path.format(item["id"] if item else "1-x")
    try:
        response = person.client.request(sent.method, path, content=sent.body, headers=_encoded(sent.headers))
    except Exception as error:  # of the server
        return f"{sent.method} {path} {sent.body!r}: {type(error).__name__}: {error}"
    status = response.status_code
    if status not in (*ACCEPTED, *REFUSED, 307, 416):
        return f"{sent.method} {path} {sent.body!r}: status {status}: {response.text[:200]}"
    if status == 400 and sent.method != "HEAD" and set(response.json()) != {"error"}:
        return f"{sent.method} {path}: an error without a sentence: {response.text[:200]}"
    if status >= 400 and person.get("/api/status").json()["labels"] != before["labels"]:
        return f"{sent.method} {path} {sent.body!r}: refused with status {status}, and stored"
    return None


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
