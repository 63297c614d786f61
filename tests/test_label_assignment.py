"""Who gets which item: tabs, several labelers, leases, skips, undo, and pages of another labeler."""

from __future__ import annotations

import time
from typing import Any

import pytest
from label_clients import texts
from label_samples import numbered

RANKS = {"0": 0, "1": 1, "2": 2}


def test_two_tabs_of_a_labeler_have_the_same_item(sites: Any) -> None:
    site = sites(numbered(3))
    tab, other_tab = site.labeler("anna"), site.labeler("anna")

    assert tab.next() == other_tab.next()
    tab.rank(tab.next(), [f"item 0, answer {answer}" for answer in "012"])
    assert other_tab.next()["number"] == 2


def test_two_labelers_at_once_share_the_work(sites: Any) -> None:
    site = sites(numbered(10), overlap=0.0)
    people = [site.labeler("anna"), site.labeler("ben")]
    seen = []
    while items := [item for person in people if (item := person.next())]:
        assert len({item["id"] for item in items}) == len(items)
        for person, item in zip(people, items, strict=False):
            seen.append(item["number"])
            person.rank(item, sorted(texts(item)))

    assert sorted(seen) == list(range(1, 11))
    assert people[0].get("/api/status").json()["labels"] == 10


def test_all_labelers_get_the_overlap_which_stays_the_same(sites: Any) -> None:
    site = sites(numbered(200, k=2), overlap=0.2)
    for name in ("anna", "ben"):
        person = site.labeler(name)
        while item := person.next():
            person.rank(item, sorted(texts(item)))
    status = person.get("/api/status").json()

    assert status["done"] == 200
    assert 25 <= status["labels"] - 200 == status["agreement"]["items"] <= 55  # about 40
    assert status["agreement"]["share"] == 1
    assert sites().labeler("ben").next() is None


def test_a_lease_ends_and_the_late_label_still_counts(sites: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = sites(numbered(1), overlap=0.0)
    anna, ben = site.labeler("anna"), site.labeler("ben")
    item = anna.next()
    assert ben.next() is None
    assert ben.get("/api/next").json()["progress"]["total"] == 0
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)

    assert ben.next()["number"] == 1
    anna.rank(item, sorted(texts(item)))
    assert anna.get("/api/status").json()["labels"] == 1


def test_a_skipped_item_goes_to_the_others(sites: Any) -> None:
    site = sites(numbered(2), overlap=0.0)
    anna, ben = site.labeler("anna"), site.labeler("ben")
    item = anna.next()

    assert anna.post(f"/api/items/{item['id']}/skip").json()["progress"]["skipped"] == 1
    assert anna.next()["number"] == 2
    assert anna.get("/api/status").json()["skipped"] == 1
    assert ben.next()["number"] == 1
    ben.rank(ben.next(), sorted(texts(item)))
    assert anna.get("/api/status").json()["skipped"] == 0


def test_undo_reopens_one_item_after_another_with_what_was_submitted(sites: Any) -> None:
    anna = sites(numbered(4)).labeler()
    for _ in range(2):
        item = anna.next()
        anna.rank(item, sorted(texts(item)), grades={"0": 3})
    anna.post(f"/api/items/{anna.next()['id']}/skip")

    undone = [anna.post("/api/undo").json() for _ in range(3)]
    assert [each["item"]["number"] for each in undone] == [3, 2, 1]
    assert [each["item"]["label"] is None for each in undone] == [True, False, False]
    assert undone[1]["item"]["label"]["grades"] == {"0": 3}
    assert (undone[2]["progress"]["done"], undone[2]["progress"]["skipped"]) == (0, 0)
    nothing = anna.post("/api/undo")
    assert (nothing.status_code, nothing.json()) == (409, {"error": "there is nothing to undo"})
    assert anna.get("/api/export").text == ""  # a reopened label is withdrawn

    for done in (1, 2):
        item = anna.next()
        assert anna.rank(item, sorted(texts(item)))["done"] == done
    assert anna.post("/api/undo").json()["item"]["number"] == 2


def test_what_a_labeler_may_see_depends_on_the_name(sites: Any) -> None:
    """Another labeler's cookie reads and writes no item of hers, undoes nothing, and has its own progress."""
    site = sites(numbered(2), overlap=0.0)
    anna, ben = site.labeler("anna"), site.labeler("ben")
    item = anna.next()
    anna.rank(item, sorted(texts(item)))

    assert ben.get(f"/api/items/{item['id']}").status_code == 404
    assert ben.put(f"/api/items/{item['id']}", {"ranks": RANKS}).status_code == 404
    assert ben.post(f"/api/items/{item['id']}/skip").status_code == 404
    assert ben.post("/api/undo").status_code == 409
    assert ben.get("/api/next").json()["progress"]["done"] == 0
    assert anna.get("/api/export").json()["labels"][0]["labeler"] == "anna"


@pytest.mark.parametrize("item", ["0", "3", "-1", "x", "²", "1", f"{2**70}", f"1-{'0' * 16}", "1/../2"])
def test_there_are_no_other_items(sites: Any, item: str) -> None:
    anna = sites(numbered(2)).labeler()
    anna.next()

    assert anna.get(f"/api/items/{item}").status_code == 404


def test_the_page_of_another_labeler_or_of_another_store_labels_nothing(sites: Any) -> None:
    """The answers on such a page are in another order, but a tab of the same browser sends the same cookie."""
    site = sites(numbered(1), overlap=1.0)
    person = site.labeler("anna")
    item = person.next()
    person.post("/api/session", {"labeler": "ben"})
    assert person.next()["number"] == item["number"]

    assert person.put(f"/api/items/{item['id']}", {"ranks": RANKS}).status_code == 404
    assert person.post(f"/api/items/{item['id']}/skip").status_code == 404
    site.store_file.unlink()
    again = sites(seed=1).labeler("anna")
    again.next()
    assert again.put(f"/api/items/{item['id']}", {"ranks": RANKS}).status_code == 404
    assert again.get("/api/status").json()["labels"] == 0


def test_a_skip_in_another_tab_does_not_undo_a_label(sites: Any) -> None:
    anna = sites(numbered(1)).labeler()
    item = anna.next()
    anna.rank(item, sorted(texts(item)), grades={"0": 2})

    assert anna.post(f"/api/items/{item['id']}/skip").json()["progress"]["done"] == 1
    anna.post("/api/undo")
    assert anna.post(f"/api/items/{item['id']}/skip").json()["progress"]["skipped"] == 1
    assert anna.get("/api/export").text == ""
    assert anna.post("/api/undo").json()["item"]["label"]["grades"] == {"0": 2}
