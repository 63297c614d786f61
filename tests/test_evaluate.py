"""``alignkit evaluate``: perplexity, and what training changed in it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from stage_runs import RANKINGS

from alignkit.cli import main
from alignkit.data import encode
from alignkit.evaluation import perplexity, standard_error
from alignkit.evaluation.perplexity import Nll
from alignkit.rows import Demonstration, Text

TEXTS = [
    "The cat sat on the mat and looked at the rain.",
    "Rain again.",
    "It rained for nine days, and then it stopped.",
]
STEPS = ["train.max_steps=3", "train.learning_rate=0.05", "train.bf16=false"]
QUESTIONS = [("How many legs has a spider?", "Eight."), ("Name a colour, please.", "Blue, like the sea in June.")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """The folders of an SFT run and of a DPO run that starts from it, and two files of rows."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    rows = [{"prompt": prompt, "response": answer} for prompt, answer in QUESTIONS]
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def trained(runs: Path, train: Callable[..., Path], train_dpo: Callable[..., Path], tmp_path: Path) -> Path:
    """``runs`` with the runs ``sft`` and ``dpo``, trained once."""
    if not (runs / "dpo").exists():
        sft = train("--plugin", "lora", *STEPS, output="out")
        dpo = train_dpo("--plugin", "lora", f"dpo.policy={sft}", *STEPS)
        shutil.copytree(sft, runs / "sft")
        record = json.loads((dpo / "alignkit.json").read_text())
        record["parents"]["policy"]["folder"] = str(runs / "sft")
        shutil.copytree(dpo, runs / "dpo")
        (runs / "dpo" / "alignkit.json").write_text(json.dumps(record))
    return runs


def evaluate(*arguments: object, output: Path) -> list[dict[str, Any]]:
    assert main(["evaluate", *map(str, arguments), "--output", str(output)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def expected(run: Path, rows: list[Demonstration | Text]) -> Nll:
    """By plain Transformers and PEFT, a row at a time, in fp32."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(run).eval()
    record = json.loads((run / "alignkit.json").read_text())
    sums, tokens = list[float](), list[int]()
    for row in rows:
        [(ids, labels)] = encode(tokenizer, row, record["stop_ids"])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        tokens.append(sum(label != -100 for label in labels[1:]))
        sums.append(float(loss) * tokens[-1])
    return Nll(sums, tokens)


def test_perplexity_is_that_of_plain_transformers(trained: Path, tmp_path: Path) -> None:
    """Of texts and of answers, in any batches; errors and differences are over rows."""
    data = [trained / "texts.jsonl", trained / "demos.jsonl"]
    given = [trained / "sft", trained / "dpo", "--data", data[0], "--data", data[1]]
    rows = evaluate(*given, output=tmp_path / "table.jsonl")
    questions = [
        Demonstration([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
        for prompt, answer in QUESTIONS
    ]
    texts = [Text(text) for text in TEXTS]

    assert [(Path(row["run"]).name, Path(row["data"]).name) for row in rows] == [
        ("sft", "texts.jsonl"),
        ("dpo", "texts.jsonl"),
        ("sft", "demos.jsonl"),
        ("dpo", "demos.jsonl"),
    ]
    for first, second, of_source in ((rows[0], rows[1], texts), (rows[2], rows[3], questions)):
        before, after = expected(trained / "sft", [*of_source]), expected(trained / "dpo", [*of_source])
        for row, nll in ((first, before), (second, after)):
            assert row["nats_per_token"] == pytest.approx(sum(nll.sums) / sum(nll.tokens), rel=1e-5)
            assert row["perplexity"] == pytest.approx(math.exp(row["nats_per_token"]))
            assert (row["rows"], row["tokens"]) == (len(of_source), sum(nll.tokens))
        assert second["difference"] == pytest.approx(second["nats_per_token"] - first["nats_per_token"], abs=1e-6)
        assert abs(second["difference"]) > 1e-3
        assert first["difference"] is None
    alone = evaluate(*given, "--batch", 1, output=tmp_path / "alone.jsonl")
    assert [row["nats_per_token"] for row in alone] == pytest.approx([row["nats_per_token"] for row in rows], rel=1e-6)


def test_a_single_run_is_compared_with_its_parent_on_what_that_held_out(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = evaluate(trained / "dpo", output=tmp_path / "table.jsonl")

    assert [Path(row["run"]).name for row in rows] == ["sft", "dpo"]
    assert {row["data"] for row in rows} == {f"held out by {trained / 'sft'}"}
    assert rows[0]["rows"] == json.loads((trained / "sft" / "alignkit.json").read_text())["data"]["eval_rows"]
    assert "change from" in capsys.readouterr().out


def test_a_parent_that_was_trained_again_is_not_compared_with(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are not those that the run started from, so the difference is not what training changed."""
    shutil.copytree(trained / "dpo", tmp_path / "dpo")
    record = json.loads((tmp_path / "dpo" / "alignkit.json").read_text())
    record["parents"]["policy"]["weights"] = "those before"
    (tmp_path / "dpo" / "alignkit.json").write_text(json.dumps(record))
    rows = evaluate(tmp_path / "dpo", "--data", trained / "texts.jsonl", output=tmp_path / "table.jsonl")

    assert [(Path(row["run"]).name, row["difference"]) for row in rows] == [("dpo", None)]
    assert "is gone or was trained again: there is nothing to compare it with" in capsys.readouterr().err


def test_rows_that_a_run_was_trained_on_are_a_warning(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = json.loads((trained / "sft" / "alignkit.json").read_text())["data"]["source"]
    shutil.copy(source, tmp_path / "demos.jsonl")
    record = json.loads((trained / "sft" / "alignkit.json").read_text())["data"]
    evaluate(trained / "dpo", "--data", tmp_path / "demos.jsonl", output=tmp_path / "table.jsonl")

    warning = f"warning: one of these runs was trained on {record['train_rows']} of the rows of {tmp_path}/demos.jsonl"
    assert warning in capsys.readouterr().err


def test_texts_of_ppo_ptx_are_rows_that_a_run_was_trained_on(trained: Path) -> None:
    texts = trained / "texts.jsonl"
    (policy,) = perplexity.policies_of([str(trained / "dpo")])[1:]
    (source,) = perplexity.sources_of([str(texts)], [policy.run], 2)
    settings = policy.record["config"]["stages"]["dpo"]

    assert perplexity.trained_on(source, [policy.run]) == 0
    settings |= {"ptx_coef": 0.5, "ptx_data": str(texts)}  # as in the manifest of a PPO run
    assert perplexity.trained_on(source, [policy.run]) == 2
    settings |= {"ptx_coef": 0.0}
    assert perplexity.trained_on(source, [policy.run]) == 0


def test_errors_are_those_of_a_mean_over_tokens_whose_rows_are_independent() -> None:
    nll, first = Nll([2.0, 9.0, 1.0], [2, 3, 1]), Nll([1.0, 9.5, 0.5], [2, 3, 1])
    row = perplexity.metrics(nll, first)
    per_token = [1.0, 1.0, 3.0, 3.0, 3.0, 1.0]
    change = [0.5, 0.5, -0.5 / 3, -0.5 / 3, -0.5 / 3, 0.5]

    assert row["nats_per_token"] == pytest.approx(2.0)
    assert row["nats_per_token_error"] == pytest.approx(standard_error(per_token, [0, 0, 1, 1, 1, 2]))
    assert row["difference"] == pytest.approx(1 / 6)
    assert row["difference_error"] == pytest.approx(standard_error(change, [0, 0, 1, 1, 1, 2]))
    assert perplexity.metrics(Nll([2.0], [2]), None)["perplexity_error"] is None


def test_a_diverged_model_has_a_perplexity() -> None:
    row = perplexity.metrics(Nll([2400.0, 1600.0], [3, 2]), None)

    assert (row["nats_per_token"], row["perplexity"]) == (800, math.exp(700))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "evaluate: nosuch is not a finished run"),
        (["{folder}"], "is not a finished run\n"),  # the folder itself is not suggested
        (["{sft}", "--data", "none.jsonl"], "no file or folder none.jsonl"),
        (["{sft}", "--data", "{rankings}"], "rankings.jsonl"),
        (["{sft}", "--output", "table.csv"], "must end in .jsonl"),
    ],
)
def test_mistakes_are_one_line(
    trained: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rankings, folder = tmp_path / "rankings.jsonl", tmp_path / "folder"
    rankings.write_text("".join(json.dumps(row) + "\n" for row in RANKINGS))
    folder.mkdir()
    given = [argument.format(sft=trained / "sft", rankings=rankings, folder=folder) for argument in arguments]

    assert main(["evaluate", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
