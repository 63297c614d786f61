"""The labeling page: ranking by keyboard, by dragging and on a phone; grades, flags, undo and skip."""

from __future__ import annotations

from label_pages import PHONE, Serve, Visit
from label_samples import dense, numbered, rank_of


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
    assert all(0 <= row["labels"][0]["seconds"] < 30 for row in exported)
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
    person.press("g", "9")
    assert person.message() == "Grades go from 1 to 7."


def test_grades_and_flags_are_given_by_keyboard(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(1, k=2), "--scale", "10", "--flags", "rude,false")
    person = visit(server)
    first, second = (int(text[-1]) for text in person.answers())  # the order in the row

    person.press("g", "4", "0")  # 10
    assert "digits give ranks again" in person.message()
    person.press("ArrowLeft", "f", "2", "Tab", "Shift+Tab", "Space", "Escape")
    pills = person.page.locator("#answers > article").nth(1).locator(".pills li")
    assert pills.all_text_contents() == ["false", "rude"]
    person.press("1")  # of this pair, the left answer is better
    person.submit()

    (row,) = server.exported()
    (label,) = row["labels"]
    assert [label["ranks"][first], label["ranks"][second]] == [0, 1]
    assert [label["grades"][first], label["grades"][second]] == [4, 10]
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


def test_the_name_can_be_changed(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(1), "--overlap", "1")
    person = visit(server, "anna")
    person.press("1", "2", "2")

    person.page.locator("#labeler").click()
    person.page.keyboard.type("ben")  # in place of the name that is selected
    with person.page.expect_navigation():
        person.press("Enter")
    person.page.wait_for_selector("#labeler:text-is('ben')")
    assert person.order() == " | ABC"  # anna's draft is hers
    person.rank(rank_of)
    person.submit()
    (row,) = server.exported()
    assert [label["labeler"] for label in row["labels"]] == ["ben"]


def test_the_time_of_a_correction_is_added_to_that_of_the_label(serve: Serve, visit: Visit) -> None:
    server = serve(numbered(1))
    call = server.client()
    call("POST", "/api/session", {"labeler": "anna"})
    item = call("GET", "/api/next")["item"]["id"]
    call("PUT", f"/api/items/{item}", {"ranks": {"0": 0, "1": 1, "2": 2}, "seconds": 50})

    person = visit(server, "anna")
    person.press("u")
    person.settle()
    person.press("3")
    person.submit()
    (row,) = server.exported()
    assert 50 <= row["labels"][0]["seconds"] < 80


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
    (x, y), end = person.middle(".chip:text-is('B')"), person.middle(".chip:text-is('A')")
    for kind, places in (("Start", [(x, y)]), ("Move", [(x - 9, y)]), ("Move", [end]), ("Move", [end]), ("End", [])):
        points = [{"x": x, "y": y} for x, y in places]
        touch.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
        person.page.wait_for_timeout(100)  # a finger that rests before it is lifted, which flings nothing
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
