"""The server's routes: the page and its API. ``security.py`` checks requests before they get here."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from alignkit.errors import AlignkitError, one_line
from alignkit.labeling import export, labels, markdown, report
from alignkit.labeling.security import Guard, Tokens, error, session_cookie
from alignkit.labeling.store import Session, Shown, Store

PAGE = Path(__file__).with_name("page")
BODY_LIMIT = 64 * 1024  # bytes


def build(samples: Path, store: Store, tokens: Tokens, host: str, labeler: str | None, as_markdown: bool) -> ASGIApp:
    """The application that serves one file of samples. With ``labeler``, all sessions have this name."""
    failures: list[type[Exception]] = [sqlite3.Error, OSError, AlignkitError]  # such as a full disk
    handlers = {HTTPException: _http_error, labels.InvalidLabelError: _invalid, **dict.fromkeys(failures, _failed)}
    app = Starlette(routes=Api(samples, store, labeler, as_markdown).routes(), exception_handlers=handlers)
    return Guard(app, store, tokens, host, labeler)


class Api:
    """The endpoints of one file of samples."""

    def __init__(self, samples: Path, store: Store, labeler: str | None, as_markdown: bool) -> None:
        self.samples, self.store, self.labeler, self.as_markdown = samples, store, labeler, as_markdown
        pages = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGE), autoescape=True)
        self.template = pages.get_template("index.html")
        guide = store.settings.guide
        self.guide = markdown.render(guide) if guide is not None else None

    def routes(self) -> list[Route]:
        """The routes of the application."""
        return [
            Route("/", self.page),
            Route("/static/{name}", self.static),
            Route("/api/session", self.session, methods=["GET"]),
            Route("/api/session", self.sign_in, methods=["POST"]),
            Route("/api/next", self.next),
            Route("/api/items/{item}", self.item, methods=["GET"]),
            Route("/api/items/{item}", self.submit, methods=["PUT"]),
            Route("/api/items/{item}/skip", self.skip, methods=["POST"]),
            Route("/api/undo", self.undo, methods=["POST"]),
            Route("/api/status", self.status),
            Route("/api/export", self.export),
        ]

    async def page(self, request: Request) -> Response:
        """The page, from its template."""
        return HTMLResponse(self.template.render(file=self.samples.name))

    async def static(self, request: Request) -> Response:
        """A file of the page, by its name."""
        files = {file.name: file for file in PAGE.iterdir() if file.name != "index.html"}
        file = files.get(request.path_params["name"])
        return FileResponse(file) if file and file.is_file() else error(404, "no such file")

    async def session(self, request: Request) -> Response:
        """The labeler and the settings."""
        settings = self.store.settings
        return JSONResponse(
            {
                "labeler": self._session(request).labeler,
                "scale": settings.scale,
                "flags": settings.flags,
                "markdown": self.as_markdown,
                "guide": self.guide,
                "file": self.samples.name,
            }
        )

    async def sign_in(self, request: Request) -> Response:
        """Give the session a name."""
        name = self.store.spelled(labels.labeler_name((await _json_body(request)).get("labeler")))
        if self.labeler not in (None, name):
            raise HTTPException(409, f"the server was started for {self.labeler}")
        self.store.set_labeler(_cookie(request), name)
        return await self.session(request)

    async def next(self, request: Request) -> Response:
        """The next item of the labeler."""
        labeler = self._labeler(request)
        return self._response(labeler, item=self._shown(self.store.next(labeler)))

    async def item(self, request: Request) -> Response:
        """An item that the labeler has or had."""
        labeler = self._labeler(request)
        return self._response(labeler, item=self._shown(self._own(request, labeler)))

    async def submit(self, request: Request) -> Response:
        """Store a label."""
        labeler = self._labeler(request)
        shown, settings = self._own(request, labeler), self.store.settings
        label = labels.submitted(await _json_body(request), shown.order, settings.scale, settings.flags)
        self.store.submit(shown.number, labeler, label)
        return self._response(labeler)

    async def skip(self, request: Request) -> Response:
        """Leave an item to other labelers."""
        labeler = self._labeler(request)
        self.store.skip(self._own(request, labeler).number, labeler)
        return self._response(labeler)

    async def undo(self, request: Request) -> Response:
        """Reopen the labeler's latest item."""
        labeler = self._labeler(request)
        shown = self.store.undo(labeler)
        if shown is None:
            raise HTTPException(409, "there is nothing to undo")
        return self._response(labeler, item=self._shown(shown))

    async def status(self, request: Request) -> Response:
        """The report of ``alignkit label --status``."""
        return JSONResponse(await run_in_threadpool(report.report, self.samples))

    async def export(self, request: Request) -> Response:
        """The rankings as a file."""
        merge = request.query_params.get("merge", "mean")
        if merge not in export.MERGES:
            raise HTTPException(400, f"merge must be {' or '.join(export.MERGES)}")
        name = quote(f"{self.samples.stem}.rankings.jsonl")
        headers = {"Content-Disposition": f"attachment; filename*=utf-8''{name}"}
        return StreamingResponse(export.lines(self.samples, merge), media_type="application/jsonl", headers=headers)

    def _session(self, request: Request) -> Session:
        session = self.store.session(_cookie(request))
        assert session is not None  # the guard has checked it
        return session

    def _labeler(self, request: Request) -> str:
        labeler = self._session(request).labeler
        if labeler is None:
            raise HTTPException(409, "choose a name first")
        return labeler

    def _own(self, request: Request, labeler: str) -> Shown:
        number, _, _ = request.path_params["item"].partition("-")
        known = number.isascii() and number.isdigit() and len(number) < 19  # SQLite's integers have 64 bits
        shown = self.store.shown(int(number), labeler) if known else None
        if shown is None or shown.id != request.path_params["item"]:
            raise HTTPException(404, "no such item")
        return shown

    def _shown(self, shown: Shown | None) -> dict[str, Any] | None:
        if shown is None:
            return None
        answers = [{"id": str(place), "text": text} for place, text in enumerate(shown.answers)]
        if self.as_markdown:
            answers = [{**answer, "html": markdown.render(answer["text"])} for answer in answers]
        label = shown.label.as_shown(shown.order) if shown.label else None
        content = {"id": shown.id, "number": shown.number, "prompt": shown.prompt}
        return {**content, "answers": answers, "label": label}

    def _response(self, labeler: str, **content: Any) -> Response:
        return JSONResponse({**content, "progress": self.store.progress(labeler)._asdict()})


def _cookie(request: Request) -> str:
    cookie = session_cookie(request)
    assert cookie is not None  # as above
    return cookie


async def _json_body(request: Request) -> Any:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise HTTPException(413, f"the body is longer than {BODY_LIMIT} bytes")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not valid JSON") from None
    if not isinstance(content, dict):
        raise HTTPException(400, "the body must be an object")
    return content


async def _http_error(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, HTTPException)
    return error(failure.status_code, failure.detail)


async def _invalid(request: Request, failure: Exception) -> Response:
    return error(400, str(failure))


async def _failed(request: Request, failure: Exception) -> Response:
    return error(500, str(failure) if isinstance(failure, AlignkitError) else one_line(failure))
