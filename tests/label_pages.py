"""The labeling page in a real browser, served by a real ``alignkit label``."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browsers import PHONE, WIDE

from alignkit.cli import main
from alignkit.labeling.report import report

__all__ = ["PHONE", "WIDE", "Person", "Serve", "Server", "Visit", "label_all"]


class Server:
    """``alignkit label`` in a process of its own."""

    def __init__(self, samples: str | Path, *options: str) -> None:
        self.samples, self.options = Path(samples), options
        self.start()

    def start(self) -> None:
        """Start it, and wait for its address."""
        words = [sys.executable, "-m", "alignkit", "label", str(self.samples), "--no-browser", *self.options]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = re.search(r"http\S+", self.process.stdout.readline())[0]
        self.origin = "{0.scheme}://{0.netloc}".format(urlsplit(self.address))

    def kill(self) -> None:
        """End it without warning, as ``kill -9`` does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def client(self) -> Callable[..., Any]:
        """``call("PUT", "/api/items/1", body)``: the reply to a request of a browser that has opened the address."""
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        opener.open(self.address).close()

        def call(method: str, path: str, body: Any = None) -> Any:
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Origin": self.origin}
            with opener.open(urllib.request.Request(self.origin + path, data, headers, method=method)) as response:
                return json.load(response)

        return call

    def labels(self) -> int:
        """The number of labels in the report of the server."""
        return int(report(self.samples)["labels"])

    def exported(self, merge: str = "mean") -> list[dict[str, Any]]:
        """The rows of ``alignkit label --export``."""
        output = self.samples.with_name("rankings.jsonl")
        assert main(["label", str(self.samples), "--export", str(output), "--merge", merge]) == 0
        return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]

    def ranks(self) -> list[list[int]]:
        """The exported ranks of each row."""
        return [row["ranks"] for row in self.exported()]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``serve(rows, "--no-grades")``: a server for a file of rows, which ends with the test."""
    servers: list[Server] = []

    def start(rows: list[dict[str, Any]], *options: str) -> Server:
        samples = tmp_path / "samples.jsonl"
        samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        servers.append(Server(samples, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


class Person:
    """A labeler at a browser of their own, with its page open."""

    def __init__(self, browser: Any, server: Server, name: str | None, **options: Any) -> None:
        self.server = server
        self.context = browser.new_context(**{"viewport": WIDE, **options})
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.context.on("console", lambda message: self.note(message.type, message.text))
        self.context.on("weberror", lambda error: self.errors.append(str(error.error)))
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.page.goto(server.address)
        if name is not None:
            self.page.wait_for_selector("#name-dialog[open]")
            self.page.keyboard.type(name)
            self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#answers > article, #finished:not([hidden])")

    def note(self, kind: str, text: str) -> None:
        """Keep errors of the console; a lost connection is the test's doing."""
        if kind in ("error", "warning") and "Failed to load resource" not in text:
            self.errors.append(text)

    def press(self, *keys: str) -> None:
        """Press keys one after another."""
        for key in keys:
            self.page.keyboard.press(key)

    def answers(self) -> list[str]:
        """The texts of the answers, in the order of the page."""
        return self.page.locator("#answers > article .text").all_inner_texts()

    def prompt(self) -> str:
        """The prompt of the item."""
        return str(self.page.locator("#prompt .text").inner_text())

    def selected(self) -> int:
        """The index of the selected answer."""
        return int(self.page.locator("#answers > article.selected").get_attribute("data-index"))

    def order(self) -> str:
        """The order in the bar, and the unranked: "B CD | A"."""
        groups = self.page.locator("#board .group").all()
        texts = ["".join(group.locator(".chip").all_inner_texts()) for group in groups]
        return " ".join(texts[:-1]) + " | " + texts[-1]

    def rank(self, wanted: Callable[[str], int]) -> None:
        """Give each answer its rank by digits, in the order of the page, which goes to the next one by itself."""
        for text in self.answers():
            self.press(str(wanted(text)))

    def submit(self) -> None:
        """Submit by Enter, and wait until the server has it."""
        with self.page.expect_response(lambda response: response.url.endswith("/api/next")):
            self.press("Enter")
        self.settle()

    def settle(self) -> None:
        """Wait until no request is on its way."""
        self.page.wait_for_selector("html:not(.busy)", state="attached")

    def drag(self, source: str, target: str) -> None:
        """Drag the element of one selector onto that of another, with the mouse."""
        mouse = self.page.mouse
        mouse.move(*self.middle(source))
        mouse.down()
        mouse.move(*(place + 12 for place in self.middle(source)))
        mouse.move(*self.middle(target), steps=3)  # gaps are wider now
        mouse.move(*self.middle(target))
        mouse.up()

    def middle(self, selector: str) -> tuple[float, float]:
        """The middle of an element, in pixels."""
        box = self.page.locator(selector).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def message(self) -> str:
        """What the page says."""
        return str(self.page.locator("#message").inner_text())

    def fits(self) -> bool:
        """Whether the page needs no horizontal scrolling."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Person]]:
    """``visit(server, "anna")``: a labeler in a context of their own. No request may go elsewhere or fail."""
    people: list[Person] = []

    def open_page(server: Server, name: str | None = "anna", **options: Any) -> Person:
        people.append(Person(browser, server, name, **options))
        return people[-1]

    yield open_page
    for person in people:
        person.context.close()
        own = (person.server.origin + "/", "data:")
        assert [url for url in person.requests if not url.startswith(own)] == []
        assert person.errors == []


Serve = Callable[..., Server]  # the types of the fixtures
Visit = Callable[..., Person]


def label_all(arguments: list[str]) -> None:
    """Run ``alignkit label`` with these arguments, and rank all that two labelers get, over the server's API."""
    server = Server(*arguments[1:])
    try:
        for name in ("Anna", "Ben"):
            call = server.client()
            call("POST", "/api/session", {"labeler": name})
            while item := call("GET", "/api/next")["item"]:
                ranks = {answer["id"]: rank for rank, answer in enumerate(item["answers"])}
                call("PUT", f"/api/items/{item['id']}", {"ranks": ranks, "seconds": 12})
    finally:
        server.kill()
