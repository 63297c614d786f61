"""Rows that are encoded into the cache: the same records, notes and errors, by however many processes and starts."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest

from alignkit import DataError, Demonstration, Located, Prompt, Ranking
from alignkit.data import load_tokenizer, token_cache
from alignkit.data.row_encoders import PromptEncoder, RankingEncoder, SequenceEncoder
from alignkit.data.spool import spool
from alignkit.data.token_cache import encode_all

ROWS = 90


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(token_cache, "CACHED", 10)
    monkeypatch.setattr(token_cache, "ROWS_A_PROCESS", 20)
    datasets.disable_progress_bars()
    yield tmp_path / "cache"
    datasets.enable_progress_bars()


def demonstrations(number: int = ROWS) -> list[Any]:
    def messages(n: int) -> list[Any]:
        thought = f"<think>\n{n}\n</think>\n\n"
        texts = [f"Question {n}?", thought + "Yes. " * (n % 7 + 1), "And then?", thought + "No."]
        return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]

    return [Located(f"x.jsonl line {n + 1}", Demonstration(messages(n))) for n in range(number)]


TEMPLATE = (  # leaves out earlier thoughts, and refuses a text
    "{% for m in messages %}{% if 'Question 33?' in m.content and refuses %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role + ': ' + (m.content.split('</think>')[-1] if not loop.last else m.content) + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def tokenizer(tokenizer_folder: Path, tmp_path: Path) -> Any:
    def load(template: str = TEMPLATE, **how: Any) -> Any:
        (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
        return load_tokenizer(str(tokenizer_folder), str(tmp_path / "t.jinja"), **how)

    return load


def sequences(tokenizer: Any, max_length: int = 64, cut: bool = True, stop_ids: tuple[int, ...] = (0,)) -> Any:
    return SequenceEncoder(tokenizer, stop_ids, max_length=max_length, cut=cut)


def all_of(rows: Any, encoder: Any, skip: bool = False, processes: int = 1) -> tuple[Any, list[str]]:
    """The whole table, what was counted, and what was printed."""
    lines: list[str] = []
    result = encode_all(rows, encoder, skip=skip, processes=processes, say=lines.append)
    return (result.dataset.to_list(), result.notes(), result.errors()), lines


def files(cache: Path) -> list[str]:
    return [str(file) for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_one_process_and_three_and_the_second_start_give_the_same(
    tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, encoder = demonstrations(), sequences(tokenizer())
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "CACHED", 1000)
        expected, _ = all_of(rows, encoder)
    assert not cache.exists()
    assert len(expected[0]) == 2 * ROWS  # the template rewrites earlier turns
    assert expected[1] == Counter({"answers": 2 * ROWS, next(iter(expected[1] - Counter(answers=999))): ROWS})

    assert all_of(rows, encoder) == (expected, [])
    first = files(cache)
    assert [Path(name).suffix for name in first].count(".arrow") == 1
    for each in cache.glob("generator/*"):
        each.rename(tmp := each.with_name("moved"))
    result, lines = all_of(rows, encoder, processes=3)
    assert result == expected
    assert lines == [f"encoding {ROWS} rows in 3 processes"]
    assert [Path(name).suffix for name in files(cache) if str(tmp) not in name].count(".arrow") == 3

    with monkeypatch.context() as patch:
        patch.setattr(SequenceEncoder, "__call__", None)
        assert all_of(rows, encoder, processes=3) == (expected, [])
        assert all_of(spool(rows), encoder, processes=3) == (expected, [])


def test_what_the_records_depend_on_is_in_the_key(tokenizer: Any, cache: Path) -> None:
    rows, dated = demonstrations(20), "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    encoders = [
        sequences(tokenizer(day="2026-01-01")),
        sequences(tokenizer(), max_length=32),
        sequences(tokenizer(), cut=False),
        sequences(tokenizer(), stop_ids=(0, 5)),
        sequences(tokenizer(TEMPLATE.replace("user", "USER").replace(": ", "> "))),
        sequences(tokenizer(special_tokens="tokens")),
        sequences(tokenizer(dated, day="2026-01-01")),
        sequences(tokenizer(dated, day="2026-01-02")),
        PromptEncoder(tokenizer(), [0]),
    ]
    added = tokenizer()
    added.add_tokens(["Question"])
    encoders.append(sequences(added))
    keys = [token_cache._key(rows, each, False) for each in encoders]
    keys.append(token_cache._key(rows, encoders[0], True))
    keys.append(token_cache._key(rows[:-1], encoders[0], False))
    rows[3].row.messages[1]["content"] += "!"
    keys.append(token_cache._key(rows, encoders[0], False))
    assert len(set(keys)) == len(keys)
    # neither the day, where the template does not ask for it, nor where the rows stand
    moved = [Located(f"y {n}", located.row) for n, located in enumerate(rows)]
    encoders[0].tokenizer("other texts", padding="max_length", max_length=9, truncation=True)
    assert token_cache._key(moved, sequences(tokenizer(day="2026-01-02")), False) == keys[-1]
    assert token_cache._key(rows, encoders[0], False) == keys[-1]


def test_bad_rows_are_the_same_whoever_finds_them(tokenizer: Any) -> None:
    rows, encoder = demonstrations(), sequences(tokenizer("{% set refuses = true %}" + TEMPLATE))
    why = "the chat template refuses this conversation: TemplateError: no"
    for processes in (1, 3, 3):
        (records, _, errors), _ = all_of(rows, encoder, skip=True, processes=processes)
        assert errors == {33: why}
        assert sorted({record["row"] for record in records}) == list(range(ROWS))
        (_, _, errors), _ = all_of(rows, encoder, processes=processes)
        assert next(iter(errors.items())) == (33, why)


@pytest.mark.parametrize("damage", ["cut in half", "emptied", "other bytes", "no info"])
def test_a_damaged_file_is_made_again(tokenizer: Any, cache: Path, damage: str) -> None:
    rows, encoder = demonstrations(), sequences(tokenizer())
    expected, _ = all_of(rows, encoder)
    [file] = cache.rglob("*.arrow")
    content = file.read_bytes()
    if damage == "no info":
        (file.parent / "dataset_info.json").write_text("{")
    file.write_bytes(
        {"cut in half": content[: len(content) // 2], "emptied": b"", "other bytes": b"x" * 999}.get(damage, content)
    )

    result, lines = all_of(rows, encoder)
    assert result == expected
    assert len(lines) == 1
    assert lines[0].startswith("encoding the rows again: their cache is damaged (")
    assert all_of(rows, encoder) == (expected, [])


class Stopped(SequenceEncoder):
    after: ClassVar[int] = 50

    def __call__(self, row: Any, notes: Counter[str]) -> list[dict[str, Any]]:
        if row.messages[0]["content"] == f"Question {self.after}?":
            raise KeyboardInterrupt
        return super().__call__(row, notes)


def test_an_interrupt_leaves_no_half_cache(tokenizer: Any, cache: Path) -> None:
    rows, encoder = demonstrations(), Stopped(tokenizer(), [0], max_length=64, cut=True)
    with pytest.raises(KeyboardInterrupt):
        all_of(rows, encoder)
    assert not files(cache)
    encoder.after = 1000  # type: ignore[misc]
    (records, _, _), lines = all_of(rows, encoder, processes=3)
    assert len(records) == 2 * ROWS
    assert lines == [f"encoding {ROWS} rows in 3 processes"]


def test_rows_that_cannot_be_handed_to_processes_are_encoded_by_one(tokenizer: Any) -> None:
    class Local(SequenceEncoder):
        def __getstate__(self) -> dict[str, Any]:
            raise TypeError("cannot be handed over")

    rows, tokenizer = demonstrations(), tokenizer()
    expected, _ = all_of(rows, sequences(tokenizer))
    result, lines = all_of(rows, Local(tokenizer, [0], max_length=64, cut=True), processes=3)
    assert result == expected
    assert lines[-1].startswith("encoding in one process, since several failed: ")


def test_rankings_and_prompts(tokenizer: Any) -> None:
    from alignkit.data import encode_answer, prompt_ids

    known, asked = tokenizer(), [{"role": "user", "content": "Q"}]
    rows: Any = [Located(f"line {n}", Ranking(asked, ["A" * (n + 1), "B"], [0, 1])) for n in range(ROWS)]  # type: ignore[arg-type]
    for processes in (1, 2):
        (records, _, _), _ = all_of(rows, RankingEncoder(known, [0]), processes=processes)
        for record, located in zip(records, rows, strict=True):
            for ids, answer in zip(record["answers"], located.row.answers, strict=True):
                assert encode_answer(known, asked, answer, [0]) == (record["prompt"] + ids, len(record["prompt"]))  # type: ignore[arg-type]
    prompts: Any = [Located("", Prompt([{"role": "user", "content": f"Q{n}"}])) for n in range(ROWS)]
    (records, _, _), _ = all_of(prompts, PromptEncoder(known, [0]))
    assert [record["prompt"] for record in records] == [prompt_ids(known, located.row.prompt) for located in prompts]


def test_a_bad_row_is_an_error_with_its_place(tokenizer: Any) -> None:
    from types import SimpleNamespace

    from alignkit.data.encoding import encode_rows

    lines: list[str] = []
    config = SimpleNamespace(data=SimpleNamespace(on_bad_row="error", num_proc=2))
    run: Any = SimpleNamespace(config=config, say=lines.append, skipped=0)
    encoder = sequences(tokenizer("{% set refuses = true %}" + TEMPLATE))
    with pytest.raises(DataError, match="^x.jsonl line 34: the chat template refuses this conversation"):
        encode_rows(run, demonstrations(), encoder)
    config.data.on_bad_row = "skip"
    for rows in (demonstrations(), spool(demonstrations())):
        encode_rows(run, rows, encoder)  # type: ignore[arg-type]
        assert [row.where for row in rows] == [f"x.jsonl line {n + 1}" for n in range(ROWS) if n != 33]
    assert run.skipped == 2
    said = [line for line in lines if "processes" not in line]
    assert said[0].startswith(f"skipped 1 bad rows of {ROWS}. The first: x.jsonl line 34: ")
    assert said[1].startswith(f"{ROWS - 1} of {ROWS - 1} rows are split into one row a turn")
    assert said[: len(said) // 2] == said[len(said) // 2 :]


class Counted(SequenceEncoder):
    """Leaves a line in a file for each row that it encodes."""

    def __call__(self, row: Any, notes: Counter[str]) -> list[dict[str, Any]]:
        with Path(self.settings["log"]).open("a") as log:
            log.write("row\n")
        return super().__call__(row, notes)


def test_of_processes_that_train_together_one_encodes(tokenizer: Any, tmp_path: Path) -> None:
    import multiprocess

    encoder, log = Counted(tokenizer(), [0], max_length=64, cut=True), tmp_path / "log"
    encoder.settings["log"] = str(log)
    context = multiprocess.get_context("fork")
    results = context.Queue()

    def train() -> None:
        results.put(all_of(demonstrations(), encoder)[0])

    processes = [context.Process(target=train) for _ in range(3)]
    for process in processes:
        process.start()
    first, *others = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len(first[0]) == 2 * ROWS
    assert others == [first, first]
    assert len(log.read_text().splitlines()) == ROWS


def test_a_terminal_shows_progress(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal in (False, True):
        written = io.StringIO()
        monkeypatch.setattr(written, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr(sys, "stderr", written)
        encoder = sequences(tokenizer(), max_length=60 + is_terminal)
        all_of(demonstrations(), encoder)
        assert ("180 examples" in written.getvalue()) is is_terminal
        written.truncate(0)
        all_of(demonstrations(), encoder)
        assert not written.getvalue()
        assert datasets.utils.are_progress_bars_disabled()


def test_an_interrupt_stops_all_processes(
    tokenizer: Any, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    started = tmp_path / "started"

    class Sleeping(SequenceEncoder):
        def __call__(self, row: Any, notes: Counter[str]) -> list[dict[str, Any]]:
            started.touch()
            time.sleep(0.5)
            return super().__call__(row, notes)

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.05)
        time.sleep(1)
        os.killpg(0, signal.SIGINT)

    def train() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
        threading.Thread(target=interrupt).start()
        try:
            all_of(demonstrations(), Sleeping(tokenizer(), [0], max_length=64, cut=True), processes=2)
        except KeyboardInterrupt:
            os._exit(7)

    import multiprocess

    process = multiprocess.get_context("fork").Process(target=train)
    process.start()
    process.join(30)
    assert process.exitcode == 7
    assert not files(cache)
    assert not capfd.readouterr().err
