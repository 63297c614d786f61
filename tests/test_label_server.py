"""The API of ``alignkit label``: what the page sends and gets, and what is kept."""

from __future__ import annotations

import re
from typing import Any

import pytest
from label_clients import Site, texts
from label_samples import numbered


def test_the_page_gets_what_it_shows_and_nothing_about_where_answers_come_from(sites: Any) -> None:
    row = {"prompt": "Hi?", "responses": ["a", "b", "c"], "models": ["sft", "ppo", "ppo"], "note": "secret"}
    anna = sites([row], guide="# Rank *well*", scale=5, flags=["rude"]).labeler()

    assert anna.get("/api/session").json() == {
        "labeler": "anna",
        "scale": 5,
        "flags": ["rude"],
        "markdown": False,
        "guide": "<h1>Rank <em>well</em></h1>\n",
        "file": "samples.jsonl",
    }
    response = anna.get("/api/next")
    item = response.json()["item"]
    assert item["prompt"] == [{"role": "user", "content": "Hi?"}]
    assert sorted(texts(item)) == ["a", "b", "c"]
    assert [answer["id"] for answer in item["answers"]] == ["0", "1", "2"]
    assert {*item} == {"id", "number", "prompt", "answers", "label"}
    assert response.json()["progress"] == {"done": 0, "skipped": 0, "total": 1, "seconds_per_item": None}
    assert "secret" not in response.text
    assert "ppo" not in response.text


def test_answers_are_in_a_blind_order_of_each_labeler_and_ranks_are_mapped_back(sites: Any) -> None:
    site = sites(numbered(12, k=5), overlap=1.0, seed=3)
    orders = {}
    for name in ("anna", "ben"):
        person = site.labeler(name)
        for number in range(12):
            item = person.next()
            orders[name, number] = [int(text[-1]) for text in texts(item)]
            assert texts(person.get(f"/api/items/{item['id']}").json()["item"]) == texts(item)
            person.rank(item, [f"item {number}, answer {answer}" for answer in (3, 1, 0, 4, 2)])

    assert len({tuple(order) for order in orders.values()}) > 12
    assert {order[0] for order in orders.values()} == {0, 1, 2, 3, 4}  # each answer is sometimes the first one
    exported = site.labeler("carla").get("/api/export?merge=apart").text.splitlines()
    assert len(exported) == 24
    assert all('"ranks":[2,1,4,0,3]' in line.replace(" ", "") for line in exported)


def test_a_label_is_kept_with_ties_grades_flags_and_seconds(sites: Any) -> None:
    site = sites(numbered(1), flags=["rude", "wrong"])
    anna = site.labeler()
    item = anna.next()
    places = {text[-1]: str(place) for place, text in enumerate(texts(item))}
    label = {
        "ranks": {places["0"]: 7, places["1"]: 2, places["2"]: 7},
        "grades": {places["1"]: 6},
        "flags": {places["2"]: ["wrong", "rude", "wrong"], places["0"]: []},
        "seconds": 12.5,
    }
    assert anna.put(f"/api/items/{item['id']}", label).json() == {
        "progress": {"done": 1, "skipped": 0, "total": 1, "seconds_per_item": 12.5}
    }

    again = anna.get(f"/api/items/{item['id']}").json()["item"]["label"]
    assert again == {
        "ranks": {places["0"]: 1, places["1"]: 0, places["2"]: 1},
        "grades": {places["1"]: 6},
        "flags": {places["2"]: ["rude", "wrong"]},
        "seconds": 12.5,
    }
    assert anna.get("/api/export").json() == {
        **numbered(1)[0],
        "ranks": [1, 0, 1],
        "labels": [
            {
                "labeler": "anna",
                "ranks": [1, 0, 1],
                "grades": [None, 6, None],
                "flags": [[], [], ["rude", "wrong"]],
                "seconds": 12.5,
            }
        ],
    }


RANKS = {"0": 0, "1": 1, "2": 2}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "the body must be an object"),
        ({}, "every answer needs a rank"),
        ({"ranks": {"0": 0, "1": 1}}, "every answer needs a rank"),
        ({"ranks": {**RANKS, "3": 3}}, "'ranks' has an unknown answer '3'"),
        ({"ranks": [0, 1, 2]}, "'ranks' must be an object with the ids of answers"),
        ({"ranks": {**RANKS, "2": 1.5}}, "'ranks' has an invalid value for answer '2'"),
        ({"ranks": {**RANKS, "2": True}}, "'ranks' has an invalid value for answer '2'"),
        ({"ranks": {**RANKS, "2": None}}, "'ranks' has an invalid value for answer '2'"),
        ({"ranks": RANKS, "grades": {"0": 8}}, "'grades' has an invalid value for answer '0'"),
        ({"ranks": RANKS, "grades": {"0": "7"}}, "'grades' has an invalid value for answer '0'"),
        ({"ranks": RANKS, "flags": {"0": ["no such flag"]}}, "'flags' has an invalid value for answer '0'"),
        ({"ranks": RANKS, "flags": {"0": [["x"]]}}, "'flags' has an invalid value for answer '0'"),
        ({"ranks": RANKS, "seconds": -1}, "'seconds' must be a number of seconds"),
        ({"ranks": RANKS, "seconds": float("nan")}, "'seconds' must be a number of seconds"),
        ({"ranks": RANKS, "seconds": 10**400}, "'seconds' must be a number of seconds"),
        ({"ranks": RANKS, "comment": ""}, "unknown field 'comment'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_invalid_label_is_refused(sites: Any, body: Any, message: str) -> None:
    anna = sites(numbered(1)).labeler()
    response = anna.put(f"/api/items/{anna.next()['id']}", body)

    assert response.status_code == 400
    assert response.json()["error"].startswith(message)
    assert anna.get("/api/status").json()["labels"] == 0


def test_grades_are_refused_where_there_are_none(sites: Any) -> None:
    anna = sites(numbered(1), scale=None).labeler()

    assert anna.put(f"/api/items/{anna.next()['id']}", {"ranks": RANKS, "grades": {"0": 1}}).status_code == 400


def test_an_item_sent_twice_is_one_label_and_the_last_one_counts(sites: Any) -> None:
    anna = sites(numbered(2)).labeler()
    item = anna.next()
    for order in ("012", "012", "210"):
        progress = anna.rank(item, [f"item 0, answer {answer}" for answer in order])
        assert (progress["done"], progress["total"]) == (1, 2)

    assert anna.get("/api/status").json()["labels"] == 1
    assert anna.get("/api/export").json()["ranks"] == [2, 1, 0]


def test_a_name_is_needed_and_can_be_changed(sites: Any) -> None:
    site = sites(numbered(1))
    person = site.labeler(None)

    assert person.get("/api/session").json()["labeler"] is None
    assert (person.get("/api/next").status_code, person.post("/api/undo").status_code) == (409, 409)
    for name in ("", "  ", 7, None, "a" * 65, "a\x00b"):
        assert person.post("/api/session", {"labeler": name}).status_code == 400
    assert person.post("/api/session", {"labeler": "  Anna \n Lee "}).json()["labeler"] == "Anna Lee"
    assert person.post("/api/session", {"labeler": "ben"}).json()["labeler"] == "ben"


def test_a_labeler_is_the_same_person_with_an_accent_as_one_character_or_two(sites: Any) -> None:
    person = sites(numbered(1)).labeler(None)
    for name in ("Ren\u00e9", "Rene\u0301"):
        assert person.post("/api/session", {"labeler": name}).json()["labeler"] == "Ren\u00e9"


def test_a_labeler_is_the_same_person_with_and_without_a_capital(sites: Any) -> None:
    site = sites(numbered(2), overlap=1.0)
    anna = site.labeler("Anna")
    item = anna.next()
    anna.rank(item, sorted(texts(item)))
    again = site.labeler(None)

    assert again.post("/api/session", {"labeler": "anna"}).json()["labeler"] == "Anna"
    assert again.next()["number"] == 2
    assert again.get("/api/status").json()["agreement"] is None


def test_a_server_for_one_labeler_knows_no_other_name(sites: Any) -> None:
    anna = sites(numbered(1), labeler="anna").labeler(None)

    assert anna.get("/api/session").json()["labeler"] == "anna"
    assert anna.post("/api/session", {"labeler": "ben"}).status_code == 409
    assert anna.post("/api/session", {"labeler": "anna"}).status_code == 200


def test_markdown_is_sent_as_safe_html(sites: Any) -> None:
    hostile = (
        "**bold** <script>alert(1)</script> [x](javascript:alert(1)) ![p](http://tracker.example/p.png) "
        "<img src=x onerror=alert(1)> [y](https://example.org)"
    )
    anna = sites([{"prompt": "p", "responses": [hostile, "plain"]}], as_markdown=True).labeler()
    (answer,) = [each for each in anna.next()["answers"] if each["text"] == hostile]

    assert "<strong>bold</strong> &lt;script&gt;" in answer["html"]
    assert re.findall("<[a-z]+[^>]*>", answer["html"]) == [
        "<p>",
        "<strong>",
        '<a href="http://tracker.example/p.png" target="_blank" rel="noopener noreferrer nofollow">',
        '<a href="https://example.org" target="_blank" rel="noopener noreferrer nofollow">',
    ]


def test_conversations_tools_and_calls_are_shown_as_text(sites: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    row = {"prompt": prompt, "responses": ["2", {"role": "assistant", "content": "two"}], "tools": [{"name": "add"}]}
    anna = sites([row]).labeler()
    item = anna.next()

    assert [turn["role"] for turn in item["prompt"]] == ["tools", "system", "user", "assistant", "tool"]
    assert item["prompt"][2]["content"] == "1 + 1?"
    assert item["prompt"][3]["content"] == '{"name": "add", "arguments": {"a": 1}}'
    assert sorted(texts(item)) == ["2", "two"]
    anna.rank(item, ["two", "2"])
    assert {**row, "ranks": [1, 0]}.items() <= anna.get("/api/export").json().items()


def test_a_full_disk_is_an_error_of_one_sentence_and_labeling_continues_when_there_is_space(sites: Any) -> None:
    site: Site = sites(numbered(300, k=2))
    anna, database = site.labeler(), site.store._database
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    response = None
    while response is None or response.status_code == 200:
        item = anna.next()
        response = anna.put(f"/api/items/{item['id']}", {"ranks": {"0": 0, "1": 1}})
        confirmed = item["number"] - 1

    assert (response.status_code, response.json()) == (500, {"error": "OperationalError: database or disk is full"})
    database.execute(f"PRAGMA max_page_count = {2 * pages}")
    assert anna.get("/api/next").json()["progress"]["done"] == confirmed
    assert anna.rank(item, sorted(texts(item)))["done"] == confirmed + 1
