"""Who may use the server of ``alignkit label``: each request that is not the page's own is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from label_clients import ADDRESS, JSON, Site
from label_samples import numbered
from starlette.testclient import TestClient

READS = ["/", "/static/style.css", "/api/session", "/api/next", "/api/items/1", "/api/status", "/api/export"]
WRITES = [
    ("POST", "/api/session", {"labeler": "eve"}),
    ("PUT", "/api/items/1", {"ranks": {"0": 0, "1": 1, "2": 2}}),
    ("POST", "/api/items/1/skip", {}),
    ("POST", "/api/undo", {}),
]


@pytest.fixture
def site(sites: Any) -> Site:
    return sites(numbered(2))


def stranger(site: Site, **headers: str) -> TestClient:
    return TestClient(site.app, ADDRESS, headers=headers, follow_redirects=False)


def test_the_token_is_exchanged_for_a_cookie_that_scripts_and_other_sites_do_not_have(site: Site) -> None:
    client = stranger(site)
    response = client.get("/", params={"token": site.tokens.printed})

    name, _, attributes = response.headers["set-cookie"].partition("; ")
    assert name.startswith("alignkit-label-8000=")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= {*attributes.split("; ")}
    assert "token" not in response.text  # it leaves the address
    assert client.get("/").status_code == 200
    assert site.tokens.printed not in client.get("/").text


@pytest.mark.parametrize("token", ["", "x", "é", "TOKEN+", "TOKEN-", None], ids=repr)
def test_a_wrong_token_is_refused(site: Site, token: str | None) -> None:
    wrong = {"TOKEN+": site.tokens.printed + "x", "TOKEN-": site.tokens.printed[:-1]}.get(token or "", token)
    response = stranger(site).get("/", params={} if wrong is None else {"token": wrong})

    assert response.status_code == 401
    assert "set-cookie" not in response.headers
    assert "Not signed in" in response.text


def test_the_token_on_the_command_line_of_the_browser_is_valid_once(site: Site) -> None:
    token = site.tokens.once

    assert [stranger(site).get("/", params={"token": token}).status_code for _ in range(2)] == [200, 401]


@pytest.mark.parametrize("cookie", [None, "alignkit-label-8000=x", "alignkit-label-8000="])
def test_without_the_cookie_of_a_session_everything_is_refused(site: Site, cookie: str | None) -> None:
    client = stranger(site, **({"cookie": cookie} if cookie else {}))

    assert [client.get(path).status_code for path in READS] == [401] * len(READS)
    for method, path, body in WRITES:
        assert client.request(method, path, content=json.dumps(body), headers=JSON).status_code == 401
    assert client.get("/api/next").json() == {"error": "not signed in: open the address that alignkit label printed"}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("127.0.0.1:9000", 401),  # another port of this machine, such as a tunnel's, with a cookie of its own
        ("localhost:8000", 200),
        ("LOCALHOST:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example:8000", 403),  # a name that now leads here (DNS rebinding)
        ("evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("localhost.evil.example:8000", 403),
        ("localhost:port", 403),
        ("", 403),
    ],
)
def test_a_foreign_host_is_refused(site: Site, host: str, status: int) -> None:
    anna = site.labeler()

    assert anna.client.get("/api/next", headers={"host": host}).status_code == status
    at_token = stranger(site).get("/", params={"token": site.tokens.printed}, headers={"host": host})
    assert at_token.status_code == (403 if status == 403 else 200)


@pytest.mark.parametrize(
    "origin",
    [
        None,
        "null",
        "http://evil.example",
        *("http://[", "//127.0.0.1:8000", "ftp://127.0.0.1:8000"),
        "http://127.0.0.1:8001",
        "http://127.0.0.1",
        "http://localhost:8000",
        ADDRESS + ".evil",
    ],
)
def test_a_write_of_another_site_is_refused(site: Site, origin: str | None) -> None:
    anna = site.labeler()
    anna.next()
    headers = {"content-type": "application/json", **({"origin": origin} if origin else {})}
    for method, path, body in WRITES:
        response = anna.client.request(method, path, content=json.dumps(body), headers=headers)
        assert response.status_code == 403, path

    assert anna.get("/api/session").json()["labeler"] == "anna"
    assert anna.get("/api/status").json()["labels"] == 0


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_cannot_write(site: Site, kind: str) -> None:
    """A form on another site can send these content types without asking the browser."""
    anna = site.labeler()
    anna.next()
    for method, path, body in WRITES:
        headers = {"origin": ADDRESS, "content-type": kind}
        assert anna.client.request(method, path, content=json.dumps(body), headers=headers).status_code == 400


def test_a_long_body_is_refused_also_without_a_declared_length(site: Site) -> None:
    anna = site.labeler()
    path = f"/api/items/{anna.next()['id']}"
    long = json.dumps({"ranks": {}, "seconds": "x" * 70_000})
    chunks = (long[start : start + 1000].encode() for start in range(0, len(long), 1000))

    for content in (long, chunks):
        response = anna.client.put(path, content=content, headers=JSON)
        assert (response.status_code, response.json()) == (413, {"error": "the body is longer than 65536 bytes"})


@pytest.mark.parametrize("body", ["", "{", "[" * 5000, '"text"', "nul", "\xff"])
def test_a_body_that_is_not_a_json_object_is_refused(site: Site, body: str) -> None:
    anna = site.labeler()
    response = anna.client.post("/api/session", content=body.encode("latin-1"), headers=JSON)

    assert response.status_code == 400
    assert set(response.json()) == {"error"}


@pytest.mark.parametrize(
    "path",
    [
        "/static/../store.py",
        "/static/..%2fstore.py",
        "/static/%2e%2e/%2e%2e/errors.py",
        "/static/..%5cstore.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/index.html",
        "/static/",
        "/static/.",
        "/static/style.css%00",
        "/page/index.html",
        "/samples.labels.sqlite",
    ],
)
def test_only_the_files_of_the_page_are_served(site: Site, path: str) -> None:
    response = site.labeler().client.get(path)

    assert response.status_code == 404
    assert set(response.json()) == {"error"}


def test_every_response_has_the_headers_that_keep_the_page_to_itself(site: Site) -> None:
    anna = site.labeler()
    responses = [anna.get(path) for path in [*READS, "/nothing"]]
    responses += [stranger(site).get("/"), anna.client.get("/", headers={"host": "evil.example"})]
    for response in responses:
        assert response.headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'; style-src"
        )
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert "unsafe" not in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in response.headers


def test_a_failure_shows_no_more_than_one_sentence(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    anna = site.labeler()
    monkeypatch.setattr(site.store, "next", lambda labeler: 1 / 0)
    anna.client = TestClient(site.app, ADDRESS, cookies=anna.client.cookies, raise_server_exceptions=False)
    response = anna.get("/api/next")

    assert response.status_code == 500
    assert "Traceback" not in response.text
    assert response.headers["x-content-type-options"] == "nosniff"


def test_a_restart_keeps_sessions_but_not_those_of_another_labeler(sites: Any) -> None:
    cookies = sites(numbered(1)).labeler("anna").client.cookies

    assert TestClient(sites().app, ADDRESS, cookies=cookies).get("/api/session").json()["labeler"] == "anna"
    ben = TestClient(sites(labeler="ben").app, ADDRESS, cookies=cookies)
    assert ben.get("/api/session").status_code == 401


def test_cookies_are_not_in_the_store(site: Site) -> None:
    (cookie,) = site.labeler().client.cookies.values()

    assert site.store.session(cookie) is not None
    files = site.store_file.parent.glob("samples.labels.sqlite*")
    assert all(cookie.encode() not in file.read_bytes() for file in files)
