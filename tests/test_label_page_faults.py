"""The labeling page loses and doubles nothing, and shows hostile answers as text."""

from __future__ import annotations

from typing import Any

import pytest
from label_pages import PHONE, WIDE, Serve, Visit
from label_samples import dense, numbered, rank_of


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


def test_a_label_that_is_refused_after_a_reload_does_not_stop_the_page(serve: Serve, visit: Visit) -> None:
    person = visit(serve(numbered(2)))
    person.page.route("**/api/items/*", lambda route: route.abort())
    person.rank(rank_of)
    person.press("Enter")
    person.page.wait_for_selector("#banner:not([hidden])")
    spoil = """(key) => localStorage.setItem(key, localStorage.getItem(key).replace('"ranks":{', '"ranks":{"9":0,'))"""
    person.page.evaluate(
        spoil, next(key for key in person.page.evaluate("Object.keys(localStorage)") if "pending" in key)
    )
    person.page.unroute("**/api/items/*")
    person.page.reload()

    person.page.wait_for_selector("#banner:has-text('An earlier label was refused')")
    person.page.wait_for_selector("#prompt:has-text('Question 0?')")
    assert person.order().endswith("| ")  # its draft is still there
    person.submit()
    assert person.prompt() == "Question 1?"


def test_another_name_in_another_tab_does_not_get_this_label(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(2), "--overlap", "1")
    person = visit(server, "anna")
    person.rank(rank_of)
    headers = {"Content-Type": "application/json", "Origin": server.origin}
    reply = person.context.request.post(f"{server.origin}/api/session", data='{"labeler": "ben"}', headers=headers)
    assert reply.ok

    person.press("Enter")
    person.page.wait_for_selector("#banner:has-text('What you entered is kept in this browser. Reload the page.')")
    assert server.labels() == 0


def test_a_double_click_skips_one_item(serve: Serve, visit: Visit) -> None:
    person = visit(serve(numbered(3)))
    person.page.locator("#skip-button").dblclick()
    person.settle()
    assert person.prompt() == "Question 1?"


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
