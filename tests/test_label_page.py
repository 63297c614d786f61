"""The labeling page: ranking by keyboard and by dragging, drafts, lost connections, hostile answers, accessibility."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from label_pages import PHONE, WIDE, Person, Server
from label_samples import REALISTIC, essay, numbered

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"

Serve = Callable[..., Server]
Visit = Callable[..., Person]


def rank_of(text: str) -> int:
    """A rank from 1 for "item 4, answer 2": every third item is a tie of two answers, and every fourth has gaps."""
    item, answer = map(int, re.findall(r"\d+", text))
    rank = (item + answer) % 3 + 1
    if item % 3 == 0:
        rank = min(rank, 2)
    return rank if item % 4 else {1: 1, 2: 3, 3: 3}[rank]


def dense(ranks: list[int]) -> list[int]:
    return [sorted(set(ranks)).index(rank) for rank in ranks]


def test_ten_items_are_ranked_by_keyboard_alone_and_exported_as_they_were_ranked(serve: Serve, visit: Visit) -> None:
    rows = numbered(10)
    server = serve(rows)
    person = visit(server, "anna")
    for _ in rows:
        person.rank(rank_of)
        person.submit()

    assert "10 labeled, 0 skipped" in person.page.locator("#finished-text").inner_text()
    assert person.page.evaluate("document.activeElement.id") == "finished"
    exported = server.exported()
    assert [row["responses"] for row in exported] == [row["responses"] for row in rows]
    assert [row["ranks"] for row in exported] == [dense([rank_of(text) for text in row["responses"]]) for row in rows]


def test_keys_move_between_answers_and_change_ranks(serve: Serve, visit: Visit) -> None:
    person = visit(serve(numbered(1, k=4)))

    person.press("1", "2", "2", "1")
    assert person.order() == "AD BC | "
    assert "tied with A" in person.message()
    person.press("ArrowLeft")
    assert person.selected() == 2
    person.press("ArrowLeft", "3")  # B
    assert person.order() == "AD C B | "
    person.press("ArrowRight", "Backspace")  # C
    assert person.order() == "AD B | C"
    person.press("ArrowRight", "ArrowRight", "Shift+ArrowDown")  # A, out of its tie
    assert (person.selected(), person.order()) == (0, "D A B | C")
    person.press("Shift+ArrowDown")
    assert person.order() == "D AB | C"

    person.page.locator("#prompt").focus()
    person.press("Tab")
    assert person.selected() == 0
    person.press("Tab", "Tab")
    assert person.selected() == 2
    person.press("Shift+Tab")
    assert person.selected() == 1

    person.press("Enter")
    assert person.message() == "Rank answer C first, or skip the item."
    assert person.selected() == 2
    person.press("9")
    assert person.message() == "There are 4 answers: ranks go from 1 to 4."


def test_grades_and_flags_are_given_by_keyboard(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(1, k=2), "--scale", "5", "--flags", "rude,false")
    person = visit(server)
    first, second = (int(text[-1]) for text in person.answers())  # the order in the row

    person.press("g", "4", "6")
    assert person.message() == "Grades go from 1 to 5."
    person.press("2")
    assert "digits give ranks again" in person.message()
    person.press("ArrowLeft", "f", "2", "Tab", "Shift+Tab", "Space", "Escape")
    pills = person.page.locator("#answers > article").nth(1).locator(".pills li")
    assert pills.all_text_contents() == ["false", "rude"]
    person.press("1")  # of this pair, the left answer is better
    person.submit()

    (row,) = server.exported()
    (label,) = row["labels"]
    assert [label["ranks"][first], label["ranks"][second]] == [0, 1]
    assert [label["grades"][first], label["grades"][second]] == [4, 2]
    assert [label["flags"][first], label["flags"][second]] == [[], ["rude", "false"]]


def test_a_pair_takes_one_key(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(3, k=2))
    person = visit(server)
    wanted = []
    for key, ranks in (("1", (0, 1)), ("2", (0, 0)), ("3", (1, 0))):
        wanted.append([ranks[int(text[-1])] for text in person.answers()])
        person.press(key)
        assert person.page.locator("#numbers [aria-pressed=true] kbd").inner_text() == key
        person.submit()

    assert server.ranks() == wanted


def test_drag_and_drop_orders_answers_and_ties_them(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(1, k=4))
    person = visit(server)
    texts = person.answers()

    for letter, target in (("A", "gap:0"), ("B", "gap:0"), ("C", "gap:1")):
        person.drag(f".chip:text-is('{letter}')", f"[data-drop='{target}']")
    assert person.order() == "B C A | D"
    person.drag(".chip:text-is('D')", ".chip:text-is('C')")
    assert person.order() == "B CD A | "
    person.drag(".chip:text-is('B')", ".unranked")
    assert person.order() == "CD A | B"
    person.drag("article:nth-child(2) .letter", "article:nth-child(1) .text")  # the cards themselves
    assert person.order() == "CD AB | "
    person.drag(".chip:text-is('D')", "[data-drop='gap:2']")
    assert person.order() == "C AB D | "

    person.submit()
    (row,) = server.ranks()
    assert [row[int(text[-1])] for text in texts] == [1, 1, 0, 2]


def test_a_finger_ranks_on_a_phone(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(2))
    person = visit(server, viewport=PHONE, has_touch=True, is_mobile=True)
    texts = person.answers()
    boxes = [card.bounding_box() for card in person.page.locator("#answers > article").all()]
    assert all(box["x"] == boxes[0]["x"] and box["width"] > 340 for box in boxes)  # one below the other

    person.page.locator("#numbers [data-number='2']").tap()
    person.page.locator("article:nth-child(3)").tap()
    person.page.locator("#numbers [data-number='1']").tap()
    assert person.order() == "C A | B"
    touch = person.context.new_cdp_session(person.page)
    start, end = person.middle(".chip:text-is('B')"), person.middle(".chip:text-is('A')")
    for kind, (x, y) in (("touchStart", start), ("touchMove", (start[0] - 9, start[1])), ("touchMove", end)):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert person.order() == "C AB | "

    sizes = [button.bounding_box() for button in person.page.locator("#bar button:visible:not(.chip)").all()]
    assert all(size["height"] >= 44 for size in sizes)
    with person.page.expect_response("**/api/next"):
        person.page.locator("#submit-button").tap()
    (row,) = server.ranks()
    assert [row[int(text[-1])] for text in texts] == [1, 1, 0]


def test_undo_reopens_the_item_before_with_its_label_and_skip_leaves_it_out(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(3))
    person = visit(server)
    person.rank(rank_of)
    person.submit()
    person.press("1")  # of the second item, which keeps it

    person.press("u")
    person.settle()
    assert (person.prompt(), person.message()) == ("Question 0?", "Item 1 is open again.")
    assert person.order().endswith("| ")
    person.page.reload()  # loses nothing
    person.page.wait_for_selector("#answers > article")
    assert (person.prompt(), person.order()[-2:]) == ("Question 0?", "| ")
    for text in person.answers():
        person.press(str(int(text[-1]) + 1), "ArrowRight")
    person.submit()
    assert (person.prompt(), person.order()) == ("Question 1?", "A | BC")

    person.press("s")
    person.settle()
    assert person.prompt() == "Question 2?"
    person.rank(rank_of)
    person.submit()
    assert "2 labeled, 1 skipped" in person.page.locator("#finished-text").inner_text()
    assert [row["prompt"] for row in server.exported()] == ["Question 0?", "Question 2?"]
    assert server.ranks()[0] == [0, 1, 2]


def test_a_reload_in_the_middle_loses_nothing(serve: Serve, visit: Visit) -> None:
    person = visit(serve(numbered(2)))
    person.press("2", "1", "g", "5", "f", "3", "Escape")
    before = person.page.locator("#answers").inner_text(), person.order()

    person.page.reload()
    person.page.wait_for_selector("#answers > article")
    assert (person.page.locator("#answers").inner_text(), person.order()) == before
    assert person.selected() == 2


def test_the_server_killed_and_restarted_in_the_middle_loses_and_doubles_nothing(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(4))
    person = visit(server)
    person.rank(rank_of)
    person.submit()
    person.rank(rank_of)
    server.kill()

    person.press("Enter")
    person.page.wait_for_selector("#banner:has-text('No connection to the server. What you entered is kept')")
    person.press("1", "Enter", "s", "u")  # nothing happens twice meanwhile
    server.start()
    person.page.wait_for_selector("#banner", state="hidden")
    person.settle()
    assert person.prompt() == "Question 2?"
    for _ in range(2):
        person.rank(rank_of)
        person.submit()

    assert server.ranks() == [dense([rank_of(f"{item} {answer}") for answer in range(3)]) for item in range(4)]
    assert len(server.exported("apart")) == 4


def test_a_label_whose_confirmation_was_lost_is_sent_again_and_counts_once(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(3))
    person = visit(server)
    lost: list[Any] = []

    def lose(route: Any) -> None:
        lost.append(route.fetch())  # the server stores it, but its answer does not arrive
        route.abort()

    person.page.route("**/api/items/*", lose, times=1)
    person.rank(rank_of)
    person.submit()
    assert (len(lost), person.prompt()) == (1, "Question 1?")

    person.page.route("**/api/items/*", lambda route: route.abort())
    person.rank(rank_of)
    person.press("Enter")
    person.page.wait_for_selector("#banner:not([hidden])")
    person.page.unroute("**/api/items/*")
    person.page.reload()  # before it was sent
    person.page.wait_for_selector("#prompt:has-text('Question 2?')")

    assert len(server.exported("apart")) == 2


def test_two_labelers_at_once_share_the_items(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(6), "--overlap", "0")
    anna, ben = visit(server, "anna"), visit(server, "ben")
    seen = []
    for _ in range(3):
        assert anna.prompt() != ben.prompt()
        for person in (anna, ben):
            seen.append(person.prompt())
            person.rank(rank_of)
            person.submit()

    assert sorted(seen) == [f"Question {item}?" for item in range(6)]
    assert len(server.exported("apart")) == 6
    assert server.ranks() == [dense([rank_of(f"{item} {answer}") for answer in range(3)]) for item in range(6)]


def test_the_page_shows_how_well_two_labelers_agree(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(4), "--overlap", "1")
    for name, sign in (("anna", 1), ("ben", -1)):
        person = visit(server, name)
        for item in range(4):  # they disagree on the first item, with its three pairs of twelve
            person.rank(lambda text, turn=sign if item == 0 else 1: 2 + turn * (int(text[-1]) - 1))
            person.submit()

    person.page.locator("#finished-results").click()
    person.page.wait_for_selector("#results td:has-text('ben')")
    assert re.search(r"Labelers order 75\.0 ± \d+\.\d % of 12 pairs", person.page.locator("#results").inner_text())
    with person.page.expect_download() as download:
        person.page.get_by_text("labelers apart").click()
    assert len(Path(download.value.path()).read_text().splitlines()) == 8


HOSTILE = [
    "<script>window.broken = true</script>",
    '<img src="x" onerror="window.broken = true"> </div></article><style>* { display: none }</style>',
    "W" * 100_000,
    "\u202eمرحبا بالعالم this is turned around \u202e (أ)",
    "{{ 7 * 7 }} ${7 * 7} &lt;b&gt; \u0000 \U0001f600 \u0301\u0301\u0301",
]


@pytest.mark.parametrize("options", [[], ["--markdown"]], ids=["text", "markdown"])
def test_hostile_answers_stay_text_and_break_no_layout(options: list[str], serve: Serve, visit: Visit) -> None:
    server = serve([{"prompt": "".join(HOSTILE[:2]), "responses": HOSTILE}], *options)
    person = visit(server, "<b>anna</b>")
    page = person.page
    for size in (WIDE, PHONE):
        page.set_viewport_size(size)
        assert person.fits()
        for _ in HOSTILE:
            person.press("e", "ArrowRight")  # shows all of each answer
        assert person.fits()
        heights = [card.bounding_box()["height"] for card in page.locator("#answers > article").all()]
        assert max(heights) > 5000  # the long one is there
        person.press("c")
        assert person.fits()
        page.reload()
        page.wait_for_selector("#answers > article")

    if not options:
        assert sorted(page.locator("#answers .text").all_text_contents()) == sorted(HOSTILE)
        assert page.locator("#prompt .text").text_content() == "".join(HOSTILE[:2])
    assert page.locator("#labeler").text_content() == "<b>anna</b>"
    assert page.locator("#answers :is(script, img, style), #prompt :is(script, img, style)").count() == 0
    assert page.evaluate("window.broken") is None


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


def test_what_the_server_refuses_is_shown_as_a_sentence(serve: Serve, visit: Visit) -> None:
    person = visit(serve(numbered(2)))
    person.press("u")
    person.settle()
    assert person.message() == "There is nothing to undo."

    person.press("1", "2", "3")
    person.context.clear_cookies()
    person.press("Enter")
    banner = "Not signed in: open the address that alignkit label printed. What you entered is kept in this browser."
    person.page.wait_for_selector(f"#banner:has-text('{banner}')")
    person.page.goto(person.server.address)  # signs in again; the name is asked for again
    person.page.wait_for_selector("#name-dialog[open]")
    person.page.keyboard.type("anna")
    person.press("Enter")
    person.page.wait_for_selector("#prompt:has-text('Question 1?')")
    assert len(person.server.exported()) == 1


def test_axe_finds_nothing_serious_at_either_width_in_light_and_dark(
    serve: Serve, visit: Visit, tmp_path: Path
) -> None:
    import axe_core_python

    (folder,) = axe_core_python.__path__
    guide = tmp_path / "guide.md"
    guide.write_text("# How to rank\n\n- Truth first.\n")
    person = visit(serve(REALISTIC, "--guide", str(guide)))
    page = person.page
    page.evaluate((Path(folder) / "axe.min.js").read_text(encoding="utf-8"))

    def check(state: str) -> None:
        for size in (WIDE, PHONE):
            page.set_viewport_size(size)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
                report = page.evaluate("axe.run()")
                assert "color-contrast" in [each["id"] for each in report["passes"]]
                serious = [each for each in report["violations"] if each["impact"] in ("serious", "critical")]
                nodes = [(each["id"], node["html"]) for each in serious for node in each["nodes"]]
                assert nodes == [], (state, size, scheme)

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
