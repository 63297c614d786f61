"""The report in a real browser: it loads nothing, runs nothing, and shows what models wrote as text."""

from __future__ import annotations

import http.server
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import PHONE, WIDE, serious_findings
from reported_runs import HOSTILE, write_pipeline

from alignkit.cli import main

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"

pytestmark = pytest.mark.draws_curves


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """``open_page(file)``: the page, opened from the disk. It may request nothing else, and nothing may go wrong."""
    contexts, requests, errors = [], list[str](), list[str]()

    def visit(file: Path, **options: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options}))
        contexts[-1].on("request", lambda request: requests.append(request.url))
        contexts[-1].on("console", lambda message: errors.append(message.text))
        page = contexts[-1].new_page()
        page.goto(file.absolute().as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert {url.rpartition(".")[2] for url in requests} <= {"html"}
    assert errors == []


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """The report of a pipeline whose prompts and answers are hostile."""
    runs = write_pipeline(tmp_path / "<b>runs</b>", HOSTILE)
    assert main(["report", str(runs)]) == 0
    return runs / "report.html"


def test_a_script_or_a_picture_that_is_in_the_page_all_the_same_does_nothing(browser: Any, hostile: Path) -> None:
    """The content security policy is the second line of defence, behind escaping."""
    asked: list[str] = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    with http.server.HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        inserted = f"<script>document.title = 'run'</script><img src='{url}/a.png'><iframe src='{url}'></iframe></body>"
        hostile.write_text(hostile.read_text("utf-8").replace("</body>", inserted), "utf-8")
        page = browser.new_page()
        page.goto(hostile.absolute().as_uri())
        assert page.locator("script").count() == 1
        assert page.title() != "run"
        page.close()
        server.timeout = 0.2
        server.handle_request()
    assert asked == []


def test_the_page_shows_pictures_and_numbers_where_they_belong(open_page: Callable[..., Any], hostile: Path) -> None:
    page = open_page(hostile)

    sections = page.locator("main > section > h2").all_inner_texts()
    assert sections[:3] == ["Did it work?", "What was trained from what", "Data"]
    assert page.locator("#summary ~ .results > li").count() == 3
    ppo = page.locator(".results > li", has_text="score")
    assert "score 1.50 ± 0.60 → 2.75 ± 0.60" in ppo.inner_text()
    assert ppo.locator(".chip").inner_text() == "improved"
    lineage = page.locator("section:has(#lineage) svg:visible")
    assert sorted(lineage.locator(".node .title").all_text_contents()) == ["ppo", "rm", "sft", "smollm2-135m"]
    assert lineage.locator(".edge").count() == 4
    pictures = page.locator("figure svg")
    assert pictures.count() > 12
    for picture in pictures.all():
        box = picture.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 100
        assert picture.get_attribute("aria-label")
    assert page.locator("section:has(#reward) figure").count() == 2
    assert page.locator("section:has(#frontier) figure").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_hostile_text_stays_text(open_page: Callable[..., Any], hostile: Path) -> None:
    page = open_page(hostile)

    assert page.title() == f"{hostile.parent}: alignkit report"
    assert page.locator("script, iframe, object, embed, link, base, form, img").count() == 0
    names = page.evaluate("[...document.querySelectorAll('*')].flatMap(each => each.getAttributeNames())")
    assert [name for name in names if name.startswith("on")] == []
    assert page.locator("h1").count() == 1
    shown = page.locator(".answers > li .pair > div:last-child .text").all_inner_texts()
    assert len(shown) == len(HOSTILE)
    for text, answer in zip(HOSTILE[:4], shown, strict=False):
        assert answer == f"After: {text}"
    assert len(shown[4]) == 2000
    assert "98,007 more characters are in answers.jsonl" in page.locator("#answers ~ details").inner_text()
    assert "{{ 7 * 7 }} {% raw %} &lt;b&gt;" in shown[5]
    assert page.locator("svg [href]:not([href^='#'])").count() == 0
    assert "://" not in hostile.read_text(encoding="utf-8").replace("https://example.com", "")


def test_pictures_are_readable_in_light_and_dark(open_page: Callable[..., Any], hostile: Path) -> None:
    """Their text and their curves have the colors of the page."""
    colors = {}
    for scheme in ("light", "dark"):
        page = open_page(hostile, color_scheme=scheme)
        style = "(selector) => getComputedStyle(document.querySelector(selector))"
        colors[scheme] = [
            page.evaluate(f"({style})('figure').backgroundColor"),
            page.evaluate(f"({style})('figure svg text').fill"),
            page.evaluate(f"({style})('figure svg path[style*=series-1]').stroke"),
        ]
    assert colors["light"] == ["rgb(255, 255, 255)", "rgb(92, 96, 104)", "rgb(47, 85, 200)"]
    assert colors["dark"] == ["rgb(28, 30, 34)", "rgb(163, 168, 178)", "rgb(142, 168, 255)"]


def test_axe_finds_nothing_serious_at_either_width_in_light_and_dark(
    open_page: Callable[..., Any], hostile: Path
) -> None:
    assert serious_findings(open_page(hostile)) == []


def test_on_a_phone_nothing_is_wider_than_the_screen(open_page: Callable[..., Any], hostile: Path) -> None:
    page = open_page(hostile, viewport=PHONE)

    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("section:has(#lineage) svg:visible").bounding_box()["width"] > 300


def test_on_paper_the_page_is_light_and_all_answers_are_there(
    open_page: Callable[..., Any], hostile: Path, tmp_path: Path
) -> None:
    page = open_page(hostile, color_scheme="dark")
    page.locator("details").first.evaluate("each => each.open = false")
    page.emulate_media(media="print")

    for place in ("html", "figure"):
        ground = page.evaluate(f"getComputedStyle(document.querySelector('{place}')).backgroundColor")
        assert ground == "rgb(255, 255, 255)", place
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert page.locator(".answers > li").first.bounding_box()["height"] > 50
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("file", "size", "scheme"),
    [("report.png", {"width": 1280, "height": 960}, "light"), ("report-phone.png", PHONE, "dark")],
)
def test_screenshots(
    file: str, size: dict[str, int], scheme: str, open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The screenshots of the documentation, of the demo's runs. ``ALIGNKIT_UPDATE_SCREENSHOTS=1`` takes them again."""
    image = IMAGES / file
    if os.environ.get("ALIGNKIT_UPDATE_SCREENSHOTS"):
        from PIL import Image

        monkeypatch.chdir(ROOT)
        assert main(["report", "runs/demo"]) == 0
        page = open_page(Path("runs/demo/report.html"), viewport=size, color_scheme=scheme)
        page.screenshot(path=image)
        Image.open(image).quantize(128, dither=Image.Dither.NONE).save(image, optimize=True)

    assert image.stat().st_size < 150_000
    assert f"images/{file}" in (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
