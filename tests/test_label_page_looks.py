"""What the labeling page shows: guide, results, long answers; accessibility; the screenshots of the documentation."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from browsers import serious_findings
from label_pages import PHONE, Serve, Visit
from label_samples import REALISTIC, essay, numbered

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"


def test_the_page_shows_how_well_two_labelers_agree(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(4), "--overlap", "1")
    for name, sign in (("anna", 1), ("ben", -1)):
        person = visit(server, name)
        for item in range(4):  # they disagree on the first item, with its three pairs of twelve
            person.rank(lambda text, turn=sign if item == 0 else 1: 2 + turn * (int(text[-1]) - 1))
            person.submit()

    person.page.locator("#finished-results").click()
    person.page.wait_for_selector("#results td:has-text('ben')")
    assert re.search(r"Labelers order 75\.0% ± \d+\.\d% of 12 pairs", person.page.locator("#results").inner_text())
    with person.page.expect_download() as download:
        person.page.get_by_text("labelers apart").click()
    assert len(Path(download.value.path()).read_text().splitlines()) == 8


def test_nine_long_answers_are_cut_and_compared_two_at_a_time(serve: Serve, visit: Visit) -> None:
    server = serve([{"prompt": "Write an essay.", "responses": [essay(2000, seed) for seed in range(9)]}])
    person = visit(server)
    page = person.page
    cards = page.locator("#answers > article")
    assert max(card.bounding_box()["height"] for card in cards.all()) < 900
    assert page.locator(".more:visible").count() == 9

    person.press("c")
    shown = [card for card in cards.all() if card.is_visible()]
    assert [card.locator(".letter").inner_text() for card in shown] == ["A", "B"]
    assert person.selected() == 1
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    person.press("PageDown")
    page.wait_for_function("() => document.querySelectorAll('#answers > article')[1].scrollTop > 100")
    person.press("ArrowRight", "p")  # C beside A; then C is held, and A is selected
    assert person.selected() == 0
    person.press("ArrowRight", "1")  # B, and on to the next answer without a rank
    assert [card.locator(".letter").inner_text() for card in cards.all() if card.is_visible()] == ["C", "D"]
    person.press("Escape")
    assert all(card.is_visible() for card in cards.all())
    assert person.order() == "B | ACDEFGHI"


def test_of_a_long_conversation_the_last_turn_is_shown(serve: Serve, visit: Visit) -> None:
    turns = [{"role": role, "content": essay(120, n)} for n, role in enumerate(["user", "assistant"] * 3)]
    turns.append({"role": "user", "content": "And why?"})
    person = visit(serve([{"prompt": turns, "responses": ["a", "b"]}]))
    box, last = (person.page.locator(f"#prompt {part}").bounding_box() for part in (".turns", ".turn:last-child .text"))
    assert box["height"] < 300
    assert box["y"] <= last["y"] < last["y"] + last["height"] <= box["y"] + box["height"] + 1

    person.page.locator("#prompt .more").click()
    box = person.page.locator("#prompt .turns").bounding_box()
    assert box["height"] > 800


def test_the_guide_stands_beside_the_answers_and_is_remembered(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    guide = tmp_path / "guide.md"
    guide.write_text("# How to rank\n\nTruth **first**.\n\n<script>window.broken = true</script>\n")
    person = visit(serve(numbered(2), "--guide", str(guide)))
    page = person.page

    assert page.locator("#guide h1").inner_text() == "How to rank"
    guide_box, card_box = page.locator("#guide").bounding_box(), page.locator("article").nth(2).bounding_box()
    assert guide_box["x"] >= card_box["x"] + card_box["width"]
    person.press("i")
    page.reload()
    page.wait_for_selector("#answers > article")
    assert page.locator("#guide").is_hidden()
    assert page.evaluate("window.broken") is None


def test_axe_finds_nothing_serious_at_either_width_in_light_and_dark(
    serve: Serve, visit: Visit, tmp_path: Path
) -> None:
    guide = tmp_path / "guide.md"
    guide.write_text("# How to rank\n\n- Truth first.\n")
    person = visit(serve(REALISTIC, "--guide", str(guide)))
    page = person.page

    def check(state: str) -> None:
        assert serious_findings(page) == [], state

    person.press("1", "2", "2", "g", "5", "f", "Space")
    check("grading, with flags")
    person.press("Escape", "c")
    check("two at a time")
    person.press("?")
    check("help")
    person.press("Escape", "r")
    page.wait_for_selector("#results table")
    check("results")
    person.press("Escape", "Escape")
    for _ in REALISTIC:
        person.press("s")
        person.settle()
    check("all done")


GUIDE = """# How to rank

Put the answer first that you would rather have been given. In this order:

1. **Truth.** A false statement outweighs good style.
2. **Help.** It does what was asked, within the limits that the prompt sets.
3. **No harm.**

Tie two answers only if you would be equally happy with either.
"""
SUBMIT = """async (seconds) => {
    const { item } = await (await fetch("/api/next")).json();
    const ranks = Object.fromEntries(item.answers.map((answer, place) => [answer.id, place]));
    const headers = { "Content-Type": "application/json" };
    await fetch(`/api/items/${item.id}`, { method: "PUT", headers, body: JSON.stringify({ ranks, seconds }) });
}"""


@pytest.mark.parametrize(
    ("file", "size", "scheme"),
    [("label.png", {"width": 1280, "height": 800}, "light"), ("label-phone.png", PHONE, "dark")],
)
def test_screenshots(file: str, size: dict[str, int], scheme: str, serve: Serve, visit: Visit, tmp_path: Path) -> None:
    """The screenshots of the documentation. ``ALIGNKIT_UPDATE_SCREENSHOTS=1`` takes them again."""
    image = IMAGES / file
    if os.environ.get("ALIGNKIT_UPDATE_SCREENSHOTS"):
        from PIL import Image

        guide = tmp_path / "guide.md"
        guide.write_text(GUIDE)
        server = serve(REALISTIC * 40, "--guide", str(guide))
        person = visit(server, "Anna", viewport=size, color_scheme=scheme, reduced_motion="reduce")
        for item in range(30):
            person.page.evaluate(SUBMIT, 30 + item)
        if size is PHONE:
            person.press("i")
        person.page.reload()
        person.page.wait_for_selector("#answers > article")
        best = ["Yellow leaves", "Basil needs", "There are many", "Your basil"]
        places = [next(i for i, start in enumerate(best) if text.startswith(start)) for text in person.answers()]
        person.press("g", *(str((6, 5, 3, 2)[place]) for place in places))
        person.press(*(str((1, 2, 3, 3)[place]) for place in places))
        IMAGES.mkdir(exist_ok=True)
        person.page.screenshot(path=image)
        Image.open(image).quantize(128, dither=Image.Dither.NONE).save(image, optimize=True)

    assert image.stat().st_size < 150_000
    assert f"images/{file}" in (ROOT / "docs" / "feedback.md").read_text(encoding="utf-8")
