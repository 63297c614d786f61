"""`data.streaming`: SFT on rows that are read while it trains equals SFT on rows in memory, and resumes exactly."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import on_two_processes
from safetensors.torch import load_file

from alignkit.cli import main
from alignkit.config import DataConfig
from alignkit.data import load, sources
from alignkit.data.streaming import HEAD, Position, RowStream
from alignkit.errors import ConfigError, DataError
from alignkit.registry import Registry
from alignkit.rows import Demonstration
from alignkit.runs import manifest
from alignkit.training.streaming import StreamedExamples

Train = Callable[..., Path]
ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}. " + "Count on! " * (n % 3)} for n in range(40)]
IN_ORDER = ("data.streaming=true", "data.shuffle_buffer=0")
SMALL = ("data.eval_size=0", "train.max_steps=5", "train.per_device_train_batch_size=4", "train.save_strategy=no")


def write(file: Path, rows: list[dict[str, str]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write(tmp_path / "rows.jsonl", ROWS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def stream(path: str | list[str], **config: object) -> RowStream:
    options = {"eval_size": 0, **config}
    return RowStream(Registry(), DataConfig(path=path, streaming=True, **options), (Demonstration,))  # type: ignore[arg-type]


def prompts(rows: RowStream, blocks: int, process: int = 0, processes: int = 1) -> list[str]:
    """The prompts of the first blocks."""
    result = []
    for _, block in itertools.islice(rows.blocks(Position(), 0, process, processes), blocks):
        result += [located.row.key for raw in block for located in rows.rows(raw)]
    return result


# --- what is trained on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [(), ("sft.packing=true", "sft.max_length=64")], ids=["rows", "packed"])
def test_without_shuffling_a_stream_trains_the_weights_that_the_same_rows_in_memory_train(
    train: Train, data: str, packing: tuple[str, ...]
) -> None:
    given = ("--data", data, *SMALL, *packing)

    in_memory = train(*given, "train.train_sampling_strategy=sequential", output="memory")

    assert same(train(*given, *IN_ORDER, output="stream"), in_memory)
    assert not same(train(*given, "data.streaming=true", "data.shuffle_buffer=7", output="shuffled"), in_memory)


def test_a_run_that_is_resumed_in_the_middle_of_a_stream_ends_with_the_same_weights(
    train: Train, tmp_path: Path
) -> None:
    """Both stop between and within blocks, in the second epoch too; a row is bad, and dropout draws numbers."""
    rows: list[dict[str, str]] = [*ROWS[:15], {"prompt": "no answer"}, *ROWS[15:]]
    given = ("--data", write(tmp_path / "rows.jsonl", rows), "data.streaming=true", "data.shuffle_buffer=7")
    given += ("data.on_bad_row=skip", "data.eval_size=2", "train.eval_strategy=no", "train.save_steps=1")
    given += ("train.per_device_train_batch_size=3", "train.gradient_accumulation_steps=2", "tuner.lora_dropout=0.2")
    whole = train(*given, "train.max_steps=10", "train.lr_scheduler_type=constant", output="whole")
    resumed = ("train.lr_scheduler_type=constant", "train.max_steps=")

    train(*given, *resumed[:1], f"{resumed[1]}3", output="parts")
    train(*given, *resumed[:1], f"{resumed[1]}8", "--resume", output="parts")
    (tmp_path / "parts" / "sft" / "checkpoints" / "checkpoint-8" / "stream-0.json").unlink()  # killed before it
    parts = train(*given, *resumed[:1], f"{resumed[1]}10", "--resume", output="parts")

    assert same(parts, whole)
    record, expected = manifest.read(parts)["data"], manifest.read(whole)["data"]
    assert [record[key] for key in ("train_rows", "eval_rows", "skipped_rows")] == [38, 2, 1]
    assert record == {**expected, "lengths": record["lengths"]}
    log = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert [each["epoch"] for each in log if "loss" in each and each["step"] in (6, 7)] == [0, 1]


def test_two_processes_train_on_the_batches_of_one(train: Train, data: str, tmp_path: Path) -> None:
    given = ("--data", data, "data.streaming=true", "data.shuffle_buffer=7", "data.eval_size=3", "train.save_steps=3")
    given += ("train.bf16=false", "train.lr_scheduler_type=constant")  # in bf16, other shapes are rounded otherwise
    batch = "train.per_device_train_batch_size="
    one = train(*given, "train.max_steps=8", "train.logging_steps=1", f"{batch}6", output="one")
    model = json.loads((one / "adapter_config.json").read_text())["base_model_name_or_path"]
    words = ("train", "--plugin", "sft", "--model", model, *given, "train.use_cpu=true", f"{batch}3")
    words += ("train.logging_steps=1", "--output", str(tmp_path / "two"))

    two = on_two_processes(*words, "train.max_steps=6")
    assert two.returncode == 0, two.stderr
    two = on_two_processes(*words, "train.max_steps=8", "--resume")

    assert two.returncode == 0, two.stderr
    assert two.stdout.count("it is read again") == 1  # by the first process
    assert manifest.read(tmp_path / "two" / "sft")["processes"] == 2
    left, right = weights(one), weights(tmp_path / "two" / "sft")
    assert all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)
    assert manifest.read(tmp_path / "two" / "sft")["data"]["train_rows"] == 37


# --- reading -------------------------------------------------------------------------------------------------------


def test_shares_of_processes_are_the_rows_of_one_in_its_order(data: str) -> None:
    rows = stream(data, shuffle_buffer=7)  # blocks of 7, 7, 7, 7, 7 and 5

    one = prompts(rows, 12)
    shares = [prompts(rows, 12, process=process, processes=3) for process in range(3)]

    assert sorted(one[:40]) == sorted(one[40:]) == sorted(f"What is {n}?" for n in range(40))
    assert one[:7] != sorted(one[:7])
    assert one[:40] != one[40:]
    assert [share[n // 3] for n, share in zip(range(80), shares * 27, strict=False)] == one


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet", "rows.json", "rows.csv.gz"])
def test_rows_of_other_files_are_the_same(name: str, data: str, tmp_path: Path) -> None:
    file, table = tmp_path / name, pyarrow.Table.from_pylist(ROWS)
    text = Path(data).read_bytes()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, file)
    elif name.endswith(".zst"):
        with pyarrow.output_stream(file, compression="zstd") as out:
            out.write(text)
    elif name.endswith(".json"):
        file.write_text(json.dumps(ROWS))
    else:
        lines = "prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in ROWS)
        with gzip.open(file, "wb") as out:
            out.write(text if "jsonl" in name else lines.encode())

    assert prompts(stream(str(file)), 1) == prompts(stream(data), 1)
    assert load(Registry(), DataConfig(), str(file), (Demonstration,)).rows[3].row.key == "What is 3?"


def test_a_damaged_archive_is_an_error_that_names_it(data: str, tmp_path: Path) -> None:
    whole = gzip.compress(Path(data).read_bytes() * 100)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-100])
    rows = stream(str(tmp_path / "cut.jsonl.gz"))

    with pytest.raises(DataError, match=r"^cut\.jsonl\.gz cannot be read: .*Compressed file ended before"):
        prompts(rows, 5)


def test_a_data_set_of_the_hub_is_streamed(data: str) -> None:
    """A folder in its place, since no test may need the network."""
    config, folder = DataConfig(streaming=True), str(Path(data).parent)
    rows = sources._hub(config, folder)

    assert [row["prompt"] for _, row in rows.rows] == [row["prompt"] for row in ROWS]  # type: ignore[index]
    assert sources._hub(config, folder).fingerprint == rows.fingerprint
    write(Path(data), ROWS[:-1])
    assert sources._hub(config, folder).fingerprint != rows.fingerprint


def test_several_sources_alternate(data: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{"prompt": word, "response": "x"} for word in ("one", "two")])
    rows = stream([data, other], shuffle_buffer=0)

    assert prompts(rows, 1)[:6] == ["What is 0?", "one", "What is 1?", "two", "What is 2?", "What is 3?"]
    assert len(prompts(rows, 1)) == 42
    with pytest.raises(ConfigError, match=r"data\.path: a weight needs the number of rows"):
        stream([data, {"path": other, "weight": 2}])  # type: ignore[list-item]


def test_the_first_rows_are_held_out_and_their_prompts_are_not_trained_on(tmp_path: Path) -> None:
    rows = stream(write(tmp_path / "rows.jsonl", [*ROWS[:5], {**ROWS[1], "response": "Again."}]), eval_size=3)

    assert [located.row.key for located in rows.eval_rows] == ["What is 0?", "What is 1?", "What is 2?"]
    assert sorted(prompts(rows, 2)) == sorted(["What is 3?", "What is 4?"] * 2)


def test_a_file_that_changes_while_it_is_read_is_an_error(data: str) -> None:
    begun = stream(data).blocks(Position(), 0, 0, 1)
    next(begun)
    with Path(data).open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")

    with pytest.raises(DataError, match="changed while it was read"):
        next(begun)


# --- bad rows and refusals -----------------------------------------------------------------------------------------


def test_a_bad_row_in_the_middle_of_a_stream_stops_it_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("w") as lines:
        for n in range(HEAD + 10):
            lines.write(json.dumps(ROWS[n % 40]) + "\n" if n != HEAD + 5 else "{\n")
    rows = stream(str(file), shuffle_buffer=0)

    with pytest.raises(DataError, match=rf"^rows\.jsonl line {HEAD + 6}: not valid JSON"):
        prompts(rows, 3)
    with pytest.raises(DataError, match=r"^rows\.jsonl line 1: not valid JSON"):
        stream(write_text(file, "{\n"))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("", "has no rows to train on: it is empty"),
        ("{\n{\n", "not valid JSON"),
        (json.dumps(ROWS[0]) + "\n", "holding out the first 1 rows of .* leaves none to train on"),
    ],
)
def test_a_stream_without_training_rows_is_an_error(rows: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason):
        stream(write_text(tmp_path / "rows.jsonl", rows), on_bad_row="skip", eval_size=None)


def write_text(file: Path, text: str) -> str:
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("train.max_steps=-1", "data.streaming needs train.max_steps, since the number of rows is not known"),
        ("train.dataloader_num_workers=2", "train.dataloader_num_workers has no effect with data.streaming"),
        ("train.eval_strategy=epoch", "train.eval_strategy=epoch: with data.streaming, the end of an epoch is not"),
        ("train.train_sampling_strategy=sequential", "train.train_sampling_strategy=sequential has no effect"),
        ("data.eval_size=0.1", "data.eval_size must be a count with data.streaming"),
        ("data.streaming=false data.shuffle_buffer=5", "data.shuffle_buffer has no effect without data.streaming"),
        ("--plugin dpo", "stage 'dpo' cannot train on a stream of rows. Set data.streaming=false"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_in_one_line(
    settings: str, reason: str, data: str, tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = () if "--plugin" in settings else ("--plugin", "sft")
    words = ["check", *stage, "--model", str(tiny_model()), "--data", data]

    assert main([*words, "data.streaming=true", "train.max_steps=5", *settings.split()]) == 2
    assert reason in capsys.readouterr().err


def test_check_says_which_rows_of_a_stream_it_checked(
    data: str, tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", "--plugin", "sft", "--model", str(tiny_model()), "--data", data, "data.eval_size=3"]

    assert main([*words, "data.streaming=true", "train.max_steps=5"]) == 0

    out = capsys.readouterr().out
    assert f"a stream from {data} (format prompt-completion)" in out
    assert "the first 37 training rows are checked now" in out
    assert "the first 3 rows of the training data" in out
    assert "a stream, 5 steps, batches of 8" in out


def test_a_data_seed_of_0_is_one() -> None:
    train = {"seed": 7, "data_seed": 0}
    run: Any = SimpleNamespace(stream=object(), config=SimpleNamespace(train=train))

    assert StreamedExamples(run, lambda *_: [], lambda *_: []).seed == 0
