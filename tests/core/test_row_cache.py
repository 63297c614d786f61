"""The rows of large files on the second start: the same as on the first, and never those of other data or code."""

from __future__ import annotations

import json
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_files import ANY

from alignkit import AlignkitError, DataError, Prompt
from alignkit.config import DataConfig
from alignkit.data import load, reading, row_cache
from alignkit.data.held_out import hold_out, split
from alignkit.data.reading import Rows
from alignkit.data.row_cache import Record
from alignkit.data.spool import Spool, spool
from alignkit.data.token_cache import _key
from alignkit.registry import Registry

ROWS = 60


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("alignkit.data.spool.IN_MEMORY", 10)
    monkeypatch.setattr("alignkit.data.row_cache.BATCH", 7)
    return tmp_path / "cache" / "alignkit-rows"


def raw_rows(file: Path, bad: int | None = 17) -> Path:
    rows = [{"prompt": f"Qé{n // 3}", "completion": f"A {n}" if n != bad else ""} for n in range(ROWS)]
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".csv":
        file.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def read(file: Path, accepts: Any = ANY, registry: Registry | None = None, **config: Any) -> Rows:
    return load(registry or Registry(), DataConfig(**{"on_bad_row": "skip", **config}), str(file), accepts)


def all_of(rows: Rows) -> Any:
    train, held_out = hold_out(rows.rows, 10, 3)
    return list(rows.rows), rows.skipped, rows.describe(), list(train), list(held_out)


def files(cache: Path) -> list[str]:
    return sorted(file.name for file in cache.glob("*") if file.suffix != ".lock")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_the_second_start_gives_the_same_rows_and_reports_without_converting(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    file = raw_rows(tmp_path / f"rows{suffix}")
    with monkeypatch.context() as patch:
        patch.setattr("alignkit.data.spool.IN_MEMORY", 1000)
        in_memory = read(file)
        expected = all_of(in_memory)
        key = _key(in_memory.rows, Encoder(), False)
    assert not cache.exists()
    assert len(expected[0]) == ROWS - 1
    assert len(expected[1]) == 1

    first = read(file)
    assert all_of(first) == expected
    assert files(cache)
    monkeypatch.setattr(reading, "_accepted", None)
    second = read(file)
    assert all_of(second) == expected
    assert _key(first.rows, Encoder(), False) == _key(second.rows, Encoder(), False) == key
    assert list(pickle.loads(pickle.dumps(second.rows[3:9]))) == expected[0][3:9]
    assert second.rows[-1] == expected[0][-1]


class Encoder:
    columns: dict[str, str] = {}  # noqa: RUF012

    def fingerprint(self) -> str:
        return ""


def test_raw_rows_that_give_no_row_or_several_are_the_same_on_the_second_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = reading._convert
    monkeypatch.setattr(reading, "_convert", lambda *a: convert(*a) * (int(a[1]["completion"][2:]) % 3))
    file = raw_rows(tmp_path / "rows.jsonl", bad=None)
    first = all_of(read(file))
    assert f", {ROWS // 3} rows of the source give none" in first[2][0]
    assert len(first[0]) == ROWS
    assert all_of(read(file)) == first
    monkeypatch.setattr(reading, "_accepted", None)
    assert all_of(read(file)) == first


def test_all_that_the_rows_depend_on_is_in_the_name_of_the_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = raw_rows(tmp_path / "rows.jsonl")
    read(file)
    seen = set(files(cache))

    def is_new(rows: Rows) -> bool:
        new = set(files(cache)) - seen
        seen.update(new)
        return len(new) == 1 and rows.rows[0].where.startswith(Path(rows.path).name)

    file.write_text(file.read_text().replace("A 5", "B 5"))
    assert is_new(read(file))
    assert is_new(read(file.rename(tmp_path / "other.jsonl")))
    file = tmp_path / "other.jsonl"
    assert is_new(read(file, accepts=ANY[:1]))
    assert is_new(read(file, format="prompts"))
    raw_rows(file, bad=None)
    assert is_new(read(file))
    assert is_new(read(file, on_bad_row="error"))
    assert is_new(read(file, split="test"))  # of a folder that `datasets` has saved
    assert not is_new(read(file))

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("package")
    names = []

    def add(a: int = 2, files: int = 1) -> None:
        names.append(row_cache.file_for(["package"], [file] * files, settings={"a": a}))

    add()
    add(a=1)
    add(files=2)
    (package / "helper.py").write_text("A = 1")
    add()
    (package / "helper.py").write_text("A = 2")
    add()
    monkeypatch.setattr("platform.python_version", lambda: "3.99")
    add()
    monkeypatch.setattr(row_cache, "version", lambda name: "99")
    add()
    assert len(set(names)) == len(names)


def test_the_same_bytes_in_other_files_are_other_rows(tmp_path: Path) -> None:
    lines = raw_rows(tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    for cut in (20, 40):
        (folder / "a.jsonl").write_text("".join(lines[:cut]))
        (folder / "b.jsonl").write_text("".join(lines[cut:]))
        assert read(folder).rows[45].where == f"b.jsonl line {47 - cut}"  # line 18 is bad


def test_the_format_of_another_distribution_is_not_cached(
    install: Callable[..., None], tmp_path: Path, cache: Path
) -> None:
    install(
        "shout",
        """
        import pathlib
        from alignkit import DataFormat, Prompt, fields_of, hookimpl

        def convert(row):
            ending = (pathlib.Path(__file__).parent / "ending.txt").read_text()
            return Prompt([{"role": "user", "content": row["prompt"] + ending}])

        @hookimpl
        def alignkit_data():
            return [DataFormat(name="shout", summary="prompt", fits=fields_of("prompt"), convert=convert)]
        """,
    )
    registry, file = Registry(), raw_rows(tmp_path / "rows.jsonl")
    registry.activate("shout")
    for ending in ("!", "?"):
        (tmp_path / "site" / "ending.txt").write_text(ending)
        rows: Any = read(file, registry=registry, format="shout").rows
        assert rows[0].row.prompt[0]["content"] == "Qé0" + ending
        assert isinstance(rows, Spool)
    assert not cache.exists()


def test_a_value_that_json_does_not_hold_is_kept(tmp_path: Path, cache: Path) -> None:
    tool = {"name": "now", "at": None}
    rows = [{"prompt": f"Q{n}", "completion": "A", "tools": [{**tool, "sizes": [("a", n)]}]} for n in range(ROWS)]
    schema = pyarrow.schema({"prompt": pyarrow.string(), "completion": pyarrow.string()})
    sizes = pyarrow.map_(pyarrow.string(), pyarrow.int64())  # becomes a list of tuples
    tools = pyarrow.list_(pyarrow.struct({"name": pyarrow.string(), "sizes": sizes}))
    schema = schema.append(pyarrow.field("tools", tools))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file := tmp_path / "rows.parquet")
    row: Any = read(file).rows[3].row
    assert row.tools == [{"name": "now", "sizes": [("a", 3)]}]
    assert not files(cache)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"", lambda _: b"x" * 999])
def test_a_damaged_file_is_made_again(tmp_path: Path, cache: Path, damage: Callable[[bytes], bytes]) -> None:
    file = raw_rows(tmp_path / "rows.jsonl")
    expected = all_of(read(file))
    [stored] = cache.glob("*.arrow")
    content = stored.read_bytes()
    stored.write_bytes(damage(content))
    assert all_of(read(file)) == expected
    assert stored.read_bytes() == content


def test_data_that_change_while_they_are_read_are_an_error_and_leave_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, convert = raw_rows(tmp_path / "rows.jsonl"), reading._convert

    def changing(*arguments: Any) -> Any:
        file.write_text(file.read_text() + "\n")
        return convert(*arguments)

    monkeypatch.setattr(reading, "_convert", changing)
    with pytest.raises(DataError, match=r"^rows\.jsonl changed while it was read\. Start again when it is complete$"):
        read(file)
    assert not files(cache)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_an_interrupt_leaves_no_half_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def interrupted(where: str) -> None:
        if "line 40" in where:
            raise error

    convert = reading._convert
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_convert", lambda *a: interrupted(a[2]) or convert(*a))  # type: ignore[func-returns-value]
        with pytest.raises(type(error)):
            read(raw_rows(tmp_path / "rows.jsonl"))
    assert not files(cache)


def test_a_bad_row_stops_a_large_file_too(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl line 18: 'completion' is empty"):
        read(raw_rows(tmp_path / "rows.jsonl"), on_bad_row="error")
    assert not files(cache)


def test_a_cache_that_cannot_be_written_is_an_error_with_its_folder(tmp_path: Path, cache: Path) -> None:
    cache.parent.write_text("a file")
    with pytest.raises(AlignkitError, match=f"^the rows cannot be written to {cache}: .*Set HF_DATASETS_CACHE to"):
        read(raw_rows(tmp_path / "rows.jsonl"))


def test_of_processes_that_start_together_one_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocess

    file, log, write = raw_rows(tmp_path / "rows.jsonl"), tmp_path / "log", row_cache._columns

    def logged(record: Any) -> Any:
        with log.open("a") as lines:
            lines.write("row\n")
        return write(record)

    monkeypatch.setattr(row_cache, "_columns", logged)
    context = multiprocess.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=lambda: results.put(all_of(read(file)))) for _ in range(3)]
    for process in processes:
        process.start()
    first, *others = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert others == [first, first]
    assert len(log.read_text().splitlines()) == ROWS


@pytest.mark.parametrize("variable", ["", "XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE"])
def test_the_cache_is_that_of_datasets(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "~/elsewhere")
    config = runpy.run_path(str(datasets.config.__file__), {"__package__": "datasets"}, "datasets.config")
    assert row_cache.folder_of_cache() == config["HF_DATASETS_CACHE"].expanduser()


def test_values_of_rows_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "VALUES", 11)
    rows = read(raw_rows(tmp_path / "rows.jsonl")).rows
    for name in row_cache.COLUMNS:
        assert list(row_cache.values(rows[5:40], name)) == list(row_cache.values(spool(rows[5:40]), name))
        assert list(row_cache.values(rows, name)) == list(row_cache.values(list(rows), name))


def test_the_hub_is_not_cached(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.Dataset.from_list([{"prompt": f"Q{n}"} for n in range(ROWS)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: made)
    assert len(load(Registry(), DataConfig(), "some/prompts", ANY).rows) == ROWS
    assert not cache.exists()


def test_a_list_of_sources_is_read_from_their_files(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, other = raw_rows(tmp_path / "a" / "rows.jsonl"), raw_rows(tmp_path / "b" / "rows.jsonl", bad=3)
    small = raw_rows(tmp_path / "small.jsonl", bad=None)
    small.write_text("".join(small.read_text().splitlines(keepends=True)[:6]))
    paths: Any = [str(large), {"path": str(other), "weight": 2.5}, str(small)]

    def loaded() -> Any:
        rows = load(Registry(), DataConfig(on_bad_row="skip"), paths, ANY)
        train, held_out = split(rows, 2, 3)
        return rows, (list(rows.rows), rows.skipped, rows.describe(), list(train), list(held_out))

    with monkeypatch.context() as patch:
        patch.setattr("alignkit.data.spool.IN_MEMORY", 1000)
        _, expected = loaded()
    assert len(expected[0]) == 2 * (ROWS - 1) + 6
    first, result = loaded()
    assert result == expected
    assert len([file for file in files(cache) if file.endswith(".arrow")]) == 2
    assert read(large).rows[0].where == "rows.jsonl line 1"  # without the folder, as there is one source
    monkeypatch.setattr(row_cache, "_write", None)
    second, result = loaded()
    assert result == expected
    assert list(pickle.loads(pickle.dumps(second.rows[50:]))) == expected[0][50:]
    assert _key(first.rows, Encoder(), False) == _key(second.rows, Encoder(), False)
    assert _key(first.rows, Encoder(), False) == _key(expected[0], Encoder(), False)
    uncached = spool(expected[0][:20])  # as of the format of another distribution
    assert list(row_cache.joined([second.rows, uncached])) == [*expected[0], *uncached]


def test_origins_are_the_same_on_the_second_start(tmp_path: Path) -> None:
    row = Prompt([{"role": "user", "content": "Q"}])
    records = [Record(f"line {n}", row if n % 3 else None, origin=("b", None, "a")[n // 5 % 3]) for n in range(ROWS)]
    for file in (None, tmp_path / "rows.arrow", tmp_path / "rows.arrow"):
        result = row_cache.converted(records, file)
        assert result.origins == ["b", "a"]
        assert (len(result.rows), result.empty) == (40, 20)
