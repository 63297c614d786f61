"""The documentation as a site: complete, built without a network, and searched and read without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from browsers import WIDE

import alignkit
from alignkit.config import DataConfig
from alignkit.config.resolve import TopLevel

ROOT = Path(__file__).parents[1]


class Loader(yaml.SafeLoader):
    """Reads ``mkdocs.yml``, which names a Python function in a tag."""


Loader.add_multi_constructor("!!python", lambda loader, suffix, node: None)
Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def pages(entry: Any) -> Iterator[str]:
    """The pages of a navigation."""
    if isinstance(entry, str):
        yield entry
    for each in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from pages(each)


def test_every_page_is_in_the_navigation_once() -> None:
    listed = list(pages(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]))
    docs = [page for page in listed if "/" not in page]

    assert sorted(docs) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    assert len(listed) == len(set(listed))


def test_the_citation_has_the_current_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))

    assert citation["version"] == alignkit.__version__


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors and without a network."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    unreachable = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **unreachable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def open_page(browser: Any, site: Path) -> Iterator[Callable[[str], Any]]:
    """``open_page("ppo.html")``: the page, opened from the disk. It may request only files of the site."""
    context, requests, errors = browser.new_context(viewport=WIDE), list[str](), list[str]()
    context.on("request", lambda request: requests.append(request.url))
    context.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)

    def visit(name: str) -> Any:
        page = context.new_page()
        page.goto((site / name).as_uri())
        return page

    yield visit
    context.close()
    assert [url for url in requests if not url.startswith((site.as_uri(), "blob:", "data:"))] == []
    assert errors == []


def test_a_search_finds_a_page_without_a_server(open_page: Callable[[str], Any]) -> None:
    page = open_page("index.html")
    page.get_by_role("textbox", name="Search").press_sequentially("kahneman")
    page.locator(".md-search-result__link").first.click()

    page.wait_for_url(re.compile(r"/kto\.html"))
    assert "Kahneman-Tversky" in page.locator("article").inner_text()


def test_a_link_to_a_file_of_the_repository_opens_its_page(open_page: Callable[[str], Any]) -> None:
    page = open_page("hooks.html")
    page.get_by_role("link", name="hookspecs.py").first.click()

    assert "def alignkit_stage() -> list[Stage]:" in page.locator("article").inner_text()


def test_the_api_page_has_the_docstring_of_a_public_name(open_page: Callable[[str], Any]) -> None:
    article = open_page("api/alignkit.data.html").locator("article")

    assert article.get_by_role("heading", name="encode_rankings").is_visible()
    assert str(alignkit.ConfigError.__doc__) in open_page("api/alignkit.html").locator("article").inner_text()


def test_the_page_of_all_settings_has_each_with_its_whole_description(open_page: Callable[[str], Any]) -> None:
    """Markdown would take a part of some: ``<|im_end|>`` as a column, and ``{revision: v2}`` as attributes."""
    text = open_page("api/settings.html").locator("article").inner_text()

    described = [(field.name, field.metadata["help"]) for each in (TopLevel, DataConfig) for field in fields(each)]
    assert [name for name, description in described if description not in text] == []
