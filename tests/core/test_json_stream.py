"""A JSON file that is read in parts gives the elements, and the errors, of one that is read whole."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from data_files import ANY

from alignkit import DataError
from alignkit.config import DataConfig
from alignkit.data import json_stream, load
from alignkit.data.json_stream import JsonStream, NotAList
from alignkit.registry import Registry

NUMBERS = [1, -2.5e-10, 1e300, -0.0, 123456789012345678901234567890]
OBJECT = {"text": 'é "quoted" \\ \n \U0001f600', "n": [*NUMBERS, True, False, None, {}, [], ""], "deep": [[{}]]}
VALUES: list[Any] = [OBJECT, "text", *NUMBERS, True, None, [], [1, [2, "]"]], {"data": [1]}]


@pytest.mark.parametrize("chunk", [1, 2, 7, 100, 1 << 16])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 3])
def test_elements_are_those_of_the_whole_file(
    monkeypatch: pytest.MonkeyPatch, chunk: int, ascii_only: bool, indent: int | None
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    for values in ([], VALUES, [OBJECT] * 50, [0], [[]]):
        for content in (values, {"data": values}, {"a": OBJECT, "data": values, "": [3], "datum": {"data": 1}}):
            text = f" \n{json.dumps(content, ensure_ascii=ascii_only, indent=indent)}\n"
            elements = list(JsonStream(io.StringIO(text)).elements("data"))
            assert [element for element, _ in elements] == values
            assert [json.loads(written) for _, written in elements] == values
    assert list(JsonStream(io.StringIO("\n ")).elements("data")) == []


INVALID = [
    *('[{"a": 1}', '[{"a": 1}, ', "[", '[{"a": 1},]', '[{"a": 1} {"b": 2}]', '[{"a": 1}}', '[\n{"a": tru}]', '["a\n"]'),
    *(
        '[{"a" 1}]',
        "[{a: 1}]",
        '[{"a": "\\x"}]',
        '[{"a": "\\u12"}]',
        '["long text without an end',
        "[1.]",
        "[1e]",
        "[-]",
    ),
    *(
        '{"data": [1}',
        '{"data": [1], }',
        '{"data": [1] "b": 1}',
        '{"data" [1]}',
        "{data: [1]}",
        '{"data": [1]',
        "{",
        "{1",
    ),
    *('{"a": 1}\n{"a": 2}', "[1]\n\n[2]", '[1] "b"', "1 2", "nul", "]", "{1", "[-]", '{"data": [1]}\n}', '{"a": [}'),
]


TRAILING_COMMA = {  # what Python 3.13 and newer say of it -> what older versions and this parser do
    "Illegal trailing comma before end of array": "Expecting value",
    "Illegal trailing comma before end of object": "Expecting property name enclosed in double quotes",
}


@pytest.mark.parametrize("text", INVALID)
@pytest.mark.parametrize("chunk", [1, 5, 1 << 16])
def test_errors_are_those_of_the_whole_file(monkeypatch: pytest.MonkeyPatch, text: str, chunk: int) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    stream = JsonStream(io.StringIO(text))
    with pytest.raises(json.JSONDecodeError) as raised:
        list(stream.elements("data"))
    message = TRAILING_COMMA.get(expected.value.msg, expected.value.msg)
    assert (raised.value.msg, stream.lines_before + raised.value.lineno) == (message, expected.value.lineno)


@pytest.mark.parametrize(("text", "type_"), [("{}", "dict"), ('{"data": 1}', "dict"), ("12", "int"), ('"a"', "str")])
def test_a_single_value_is_named(text: str, type_: str) -> None:
    with pytest.raises(NotAList, match=f"^{type_}$"):
        list(JsonStream(io.StringIO(text)).elements("data"))


def test_two_lists_of_one_name_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"data": [{"text": "a"}],\n "data": [{"text": "b"}]}')
    with pytest.raises(DataError, match=r"^a\.json line 2: not valid JSON: two fields are named 'data'$"):
        load(Registry(), DataConfig(), str(file), ANY)


def test_an_error_in_a_large_file_is_found_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 64)
    text = io.StringIO('[\n{"a": oops},\n' + '{"a": 1},\n' * 10_000 + "]")
    stream = JsonStream(text)
    with pytest.raises(json.JSONDecodeError):
        list(stream.elements("data"))
    assert text.tell() <= 128  # the rest is not read


def test_only_a_part_of_the_file_is_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"text": "x" * 1000}] * 20_000))  # 20 MB
    tracemalloc.start()
    with file.open() as text:
        assert sum(1 for _ in JsonStream(text).elements("data")) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
