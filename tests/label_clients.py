"""The server of ``alignkit label`` in this process, and clients that are signed in to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from alignkit.labeling import binding, items
from alignkit.labeling.app import build
from alignkit.labeling.security import Tokens
from alignkit.labeling.store import Store

ADDRESS = "http://127.0.0.1:8000"
JSON = {"content-type": "application/json", "origin": ADDRESS}


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def texts(item: Mapping[str, Any]) -> list[str]:
    """The answers of an item, as they stand on the page."""
    return [answer["text"] for answer in item["answers"]]


class Labeler:
    """A person with a browser of their own."""

    def __init__(self, app: ASGIApp, token: str, name: str | None) -> None:
        self.client = TestClient(app, ADDRESS, headers={"host": "127.0.0.1:8000"}, follow_redirects=False)
        assert self.client.get("/", params={"token": token}).status_code == 200
        if name is not None:
            assert self.post("/api/session", {"labeler": name}).json()["labeler"] == name

    def get(self, path: str) -> Any:
        return self.client.get(path)

    def post(self, path: str, body: Any = None) -> Any:
        return self.client.post(path, content=json.dumps(body), headers=JSON)

    def put(self, path: str, body: Any) -> Any:
        return self.client.put(path, content=json.dumps(body), headers=JSON)

    def next(self) -> Any:
        """The next item; None if nothing is left."""
        return self.get("/api/next").json()["item"]

    def rank(self, item: Mapping[str, Any], best_first: Sequence[str], **label: Any) -> Any:
        """Rank the answers of an item by their texts; the progress of the labeler."""
        ranks = {answer["id"]: best_first.index(answer["text"]) for answer in item["answers"]}
        response = self.put(f"/api/items/{item['id']}", {"ranks": ranks, "seconds": 20, **label})
        assert response.status_code == 200, response.text
        return response.json()["progress"]


class Site:
    """The server of one file of samples."""

    def __init__(self, samples: Path, labeler: str | None = None, as_markdown: bool = False, **given: Any) -> None:
        self.samples, self.store_file, self.tokens = samples, items.store_file(samples), Tokens()
        self.messages: list[str] = []
        self.store = Store(*binding.bind(samples, given, self.messages.append))
        self.app = build(samples, self.store, self.tokens, "127.0.0.1", labeler, as_markdown)

    def labeler(self, name: str | None = "anna") -> Labeler:
        return Labeler(self.app, self.tokens.printed, name)


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Any]:
    """``sites(rows, overlap=1.0)``: a server of these rows, or again of the rows of before."""
    opened: list[Site] = []

    def serve(rows: Sequence[Mapping[str, Any]] | None = None, **given: Any) -> Site:
        samples = tmp_path / "samples.jsonl"
        if rows is not None:
            write_rows(samples, rows)
        opened.append(Site(samples, **given))
        return opened[-1]

    yield serve
    for site in opened:
        site.store.close()
