"""``alignkit evaluate --tasks``: lm-eval on the live model of a run, its start beside it, and paired errors."""

from __future__ import annotations

import json
import math
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml

from alignkit.cli import main
from alignkit.evaluation import perplexity, standard_error, task_files, tasks
from alignkit.evaluation.tasks import TaskSettings
from alignkit.runs import evaluations

pytest.importorskip("lm_eval")

CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}}
metadata: {{version: 2}}
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""
ANSWERS = """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
COLOURS = ["red", "green", "blue", "white", "black"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"Which colour has number {n}?",
            "choices": [f" {c}" for c in (COLOURS * 2)[n % 5 :][:3]],
            "answer": n % 3,
        }
        for n in range(12)
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": f"It rained for {n} days. " * (n % 3 + 1)} for n in range(6)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    for name, content in {"choices": CHOICES, "texts": TEXTS, "answers": ANSWERS}.items():
        (folder / f"{name}.yaml").write_text(content.format(folder=folder, name=name))
    return folder


@pytest.fixture
def trained(files: Path, train: Callable[..., Path], train_dpo: Callable[..., Path], tmp_path: Path) -> Path:
    """The folder of the runs ``sft`` and ``dpo``, trained once."""
    if not (files / "dpo").exists():
        steps = ["train.max_steps=3", "train.learning_rate=0.05", "train.bf16=false"]
        sft = train("--plugin", "lora", *steps, output="out")
        dpo = train_dpo("--plugin", "lora", f"dpo.policy={sft}", *steps)
        shutil.copytree(sft, files / "sft")
        record = json.loads((dpo / "alignkit.json").read_text())
        record["parents"]["policy"]["folder"] = str(files / "sft")
        shutil.copytree(dpo, files / "dpo")
        (files / "dpo" / "alignkit.json").write_text(json.dumps(record))
    return files


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses to which something tried to connect."""
    import datasets
    import huggingface_hub

    tried: list[Any] = []

    def refuse(self: Any, address: Any) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: refuse(None, address))
    return tried


def evaluate(*arguments: object, output: Path) -> list[dict[str, Any]]:
    assert main(["evaluate", *map(str, arguments), "--output", str(output)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def by_lm_eval(run: Path, tasks: list[Path], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """``lm_eval.simple_evaluate`` on the model that plain Transformers and PEFT load, in fp32."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it runs pip
    model = peft.AutoPeftModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    harness = HFLM(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(run), batch_size=1)
    manager = TaskManager(include_defaults=False)
    names = list(map(str, tasks))
    return lm_eval.simple_evaluate(harness, tasks=names, task_manager=manager, bootstrap_iters=0, **settings)


@pytest.mark.parametrize("template", [False, True])
def test_results_are_those_of_lm_eval_on_plain_transformers(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[Any], template: bool
) -> None:
    """Of every kind of task, with two examples in each prompt; and lm-eval connects to nothing."""
    tasks = [trained / "choices.yaml", trained / "answers.yaml", trained / "texts.yaml"][: 1 if template else 3]
    given = ["--tasks", ",".join(map(str, tasks)), "--num-fewshot", 2, "--limit", 9]
    rows = evaluate(
        trained / "dpo", *given, *(["--apply-chat-template"] if template else []), output=tmp_path / "rows.jsonl"
    )
    settings = {"num_fewshot": 2, "limit": 9, "apply_chat_template": template}
    before, after = (by_lm_eval(trained / run, tasks, monkeypatch, **settings) for run in ("sft", "dpo"))

    assert no_network == []
    assert (
        len(rows) == sum(len(task) for task in ({"acc", "mcc"}, {"exact_match"}, {"word_perplexity"})[: len(tasks)]) * 2
    )
    for row in rows:
        result = before if row["run"] == str(trained / "sft") else after
        key = f"{row['metric']},{row['filter']}"
        assert row["value"] == pytest.approx(result["results"][row["task"]][key], rel=1e-5)
        assert row["documents"] == result["n-samples"][row["task"]]["effective"]
        assert (row["num_fewshot"], row["version"]) == (2, result["versions"][row["task"]])
        assert row["higher_is_better"] == (row["metric"] != "word_perplexity")
        if row["metric"] in ("acc", "exact_match"):
            values = [sample[row["metric"]] for sample in result["samples"][row["task"]]]
            assert row["error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(9))
    acc = [row for row in rows if row["metric"] == "acc"]
    values = [[sample["acc"] for sample in result["samples"]["choices"]] for result in (before, after)]
    differences = np.subtract(values[1], values[0])
    assert acc[0]["difference"] is None
    assert acc[1]["difference"] == pytest.approx(differences.mean())
    assert acc[1]["difference_error"] == pytest.approx(standard_error(differences))


def test_answers_end_at_the_stop_tokens_of_the_run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the end of a turn, which the generation config of an adapter's base does not name."""
    import lm_eval

    model = perplexity.opened(perplexity.policies_of([str(trained / "dpo")])[1])
    prompt = model.tokenizer("Which colour has number 0?", return_tensors="pt")
    ids = model.model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    original, results = lm_eval.evaluate, list[Any]()
    monkeypatch.setattr(lm_eval, "evaluate", lambda **given: results.append(original(**given)) or results[0])
    loaded = tasks.load([str(trained / "answers.yaml")])
    tasks.measure(model._replace(stop_ids=[*model.stop_ids, ids[0]]), loaded, TaskSettings(limit=1), print)

    ((answer,),) = results[0]["samples"]["answers"][0]["resps"]
    assert (len(ids), answer) == (4, model.tokenizer.decode(ids[:1]))


def test_functions_of_a_task_file_run_only_when_it_is_evaluated(trained: Path, tmp_path: Path) -> None:
    """``docs/security.md`` says that lm-eval runs them. Reading the file to check it does not."""
    (tmp_path / "scores.py").write_text(
        "from pathlib import Path\n\n\ndef always(document, results):\n"
        "    Path(__file__).with_name('ran').touch()\n    return {'acc': 1.0}\n"
    )
    task = tmp_path / "always.yaml"
    text = CHOICES.format(folder=trained, name="always").replace("  - {metric: mcc", "# ")
    task.write_text(f"{text}process_results: !function scores.always\n")
    task_files.check(task)
    assert not (tmp_path / "ran").exists()

    rows = evaluate(trained / "sft", "--tasks", task, "--limit", 2, output=tmp_path / "rows.jsonl")
    assert (tmp_path / "ran").exists()
    assert [row["value"] for row in rows if row["metric"] == "acc"] == [1.0, 1.0]


def test_a_group_has_a_row_with_the_mean_of_its_tasks(trained: Path, tmp_path: Path) -> None:
    """Weighted by size, its error is that of all documents together, up to the tasks' different means."""
    names = ("both::one", "both::two")
    tasks = [{**yaml.safe_load(CHOICES.format(folder=trained, name="")), "task": name[-3:]} for name in names]
    aggregate = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "both", "task": tasks, "aggregate_metric_list": aggregate}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    rows = evaluate(trained / "dpo", "--tasks", tmp_path / "both.yaml", output=tmp_path / "rows.jsonl")
    group, *tasks = [row for row in rows if row["run"] == str(trained / "dpo") and row["metric"] == "acc"]

    assert [row["task"] for row in (group, *tasks)] == ["both", *names]
    assert group["value"] == pytest.approx(np.mean([row["value"] for row in tasks]))
    assert group["error"] == pytest.approx(math.hypot(*(row["error"] / 2 for row in tasks)))
    assert group["difference"] == pytest.approx(np.mean([row["difference"] for row in tasks]))


@pytest.mark.parametrize("tuner", ["full", "qlora"])
def test_a_run_without_a_parent_is_compared_with_its_base(
    train: Callable[..., Path], tiny_model: Callable[..., Path], files: Path, tmp_path: Path, tuner: str
) -> None:
    """In the form in which it was trained: of a 4-bit run, the 4-bit base."""
    run = train("--plugin", tuner, "train.max_steps=3", "train.learning_rate=0.05", "train.bf16=false")
    given = [run, "--tasks", files / "texts.yaml", "--data", files / "texts.jsonl"]
    rows = evaluate(*given, output=tmp_path / "rows.jsonl")
    record = json.loads((run / "alignkit.json").read_text())
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model("llama"),
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        if tuner == "qlora"
        else None,
    ).eval()  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)
    nats = tokens = 0
    for line in (files / "texts.jsonl").read_text().splitlines():
        ids = torch.tensor([[*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            nats += float(plain(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    base, trained, base_task, trained_task = rows

    assert [row["run"] for row in rows] == [record["model"]["name"], str(run)] * 2
    assert base["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-4)
    assert abs(trained["difference"]) > 0.01
    assert trained_task["difference"] == pytest.approx(trained_task["value"] - base_task["value"])


def test_results_are_kept_in_the_run_folder_and_printed_as_json(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALIGNKIT_DEBUG", raising=False)
    for folder in ("sft", "dpo"):
        (trained / folder / "evaluation.json").unlink(missing_ok=True)
    given = ["evaluate", str(trained / "dpo"), "--tasks", str(trained / "choices.yaml")]
    for limit in ("3", "0.5"):
        capsys.readouterr()
        assert main([*given, "--limit", limit, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = evaluations.read(trained / "dpo")

    assert [row["run"] for row in printed["tasks"]] == [str(trained / "sft"), str(trained / "dpo")] * 2
    assert printed["perplexity"] == kept["perplexity"] == []
    assert [(row["metric"], row["limit"], row["documents"]) for row in kept["tasks"]] == [
        ("acc", 0.5, 6),
        ("mcc", 0.5, 6),
    ]
    assert {row["compared_with"] for row in kept["tasks"]} == {str(trained / "sft")}
    assert evaluations.read(trained / "sft")["tasks"][0]["compared_with"] is None
    assert main(["evaluate", str(trained / "dpo"), "--data", str(trained / "texts.jsonl")]) == 0
    assert [row["data"] for row in evaluations.read(trained / "dpo")["perplexity"]] == [str(trained / "texts.jsonl")]
    assert evaluations.read(trained / "dpo")["tasks"] == kept["tasks"]


def test_prompts_that_are_too_long_are_a_warning(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALIGNKIT_DEBUG", raising=False)
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.max_length", 10)
    evaluate(trained / "dpo", "--tasks", trained / "choices.yaml", "--limit", 2, output=tmp_path / "rows.jsonl")

    error = capsys.readouterr().err
    assert "prompts, which are longer than the model's 10 tokens, from the left" in error
    assert "%|" not in error  # no progress bars outside of a terminal


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("arc_esay", "lm-eval has no task 'arc_esay'. Close matches: arc_easy"),
        ("nosuch.yaml", "no file nosuch.yaml"),
        ("", "--tasks '': a name is empty"),
        ("{folder}/choices.yaml,{folder}/again.yaml", "choices is named twice"),
        ("{folder}/metric.yaml", "lm-eval has no metric 'acurracy'"),
        ("{folder}/gone.yaml", "cannot load"),
        ("{folder}/torn.yaml", "is not valid YAML"),
    ],
)
def test_mistakes_are_one_line(
    trained: Path, no_network: list[Any], tasks: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = CHOICES.format(folder=trained, name="choices")
    (trained / "again.yaml").write_text(content)
    (trained / "metric.yaml").write_text(content.replace("metric: acc", "metric: acurracy"))
    (trained / "torn.yaml").write_text("task: [choices")
    (trained / "gone.yaml").write_text(content.replace("choices.jsonl", "gone.jsonl"))

    assert main(["evaluate", str(trained / "dpo"), "--tasks", tasks.format(folder=trained)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert no_network == []


def test_without_lm_eval_the_extra_is_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("alignkit.evaluation.tasks.find_spec", lambda name: None)

    assert main(["evaluate", str(trained / "dpo"), "--tasks", "arc_easy"]) == 2
    assert "pip install 'alignkit[lm-eval]'" in capsys.readouterr().err
