"""Fixtures for the tests of plugins. pytest finds them if alignkit is installed. Importing this imports no torch.

=================  ====================================================================================================
``tiny_model``     ``tiny_model("qwen2")``: a folder with a two-layer random model of that architecture, and a tokenizer
``tiny_data``      ``tiny_data("rankings")``: a small ``.jsonl`` file of that kind of data
``check_plugin``   ``check_plugin("mine")``: what ``alignkit plugins check mine`` finds, as an AssertionError
``run_stage``      ``run_stage("sft", "--plugin", "mine")``: train two steps in this process; returns the run folder
=================  ====================================================================================================
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import AlignkitError, did_you_mean
from alignkit.rows import Demonstration, Prompt, Ranking, Rated, Text

DEMONSTRATIONS = [
    {"prompt": f"What is {n} and one?", "response": f"It is {n + 1}. " + "Count on! " * (n % 3 + 1)} for n in range(16)
]
RANKINGS = [
    {"prompt": f"What is {n} and one?", "responses": [f"It is {n + 1}.", "I know not.", "No."], "ranks": [0, 1, 1]}
    for n in range(16)
]
PREFERENCES = [
    {"prompt": f"What is {n} and one?", "chosen": f"It is {n + 1}.", "rejected": "I know not."} for n in range(16)
]
RATINGS = [
    {"prompt": f"What is {n} and one?", "completion": f"It is {n + n % 2}.", "label": n % 2 == 1} for n in range(16)
]
PROMPTS = [{"prompt": f"What is {n} and one?"} for n in range(16)]
TEXTS = [{"text": f"{n} and one is {n + 1}."} for n in range(16)]

DATA: dict[str, list[dict[str, Any]]] = {
    "demonstrations": DEMONSTRATIONS,
    "rankings": RANKINGS,
    "preferences": PREFERENCES,
    "ratings": RATINGS,
    "prompts": PROMPTS,
    "text": TEXTS,
}
KIND_OF_ROW = {Demonstration: "demonstrations", Ranking: "rankings", Rated: "ratings", Prompt: "prompts", Text: "text"}

SMALL = (
    *("train.max_steps=2", "train.per_device_train_batch_size=2", "train.per_device_eval_batch_size=2"),
    *("data.eval_size=4", "train.use_cpu=true"),
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with 512 tokens, trained on the bundled demonstrations; eos is <eos>, without pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from alignkit import bundled

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rows = [json.loads(line) for line in bundled.DATA["bundled:demonstrations"].read_text("utf-8").splitlines()]
    tokenizer.train_from_iterator(
        (text for row in rows for text in row.values()),
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model("llama")``: a folder with a two-layer random model of that architecture, and a tokenizer.

    An architecture is a ``model_type`` of Transformers (llama, qwen2, qwen3, gemma, mistral, gpt2, ...). The weights
    are always the same. The folder is created once per session: do not write into it.
    """
    made: dict[str, Path] = {}

    def make(architecture: str = "llama") -> Path:
        if architecture not in made:
            import torch
            from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

            sizes = {
                "vocab_size": 576,  # some tokenizer classes add tokens
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "max_position_embeddings": 512,
                "bos_token_id": None,
                "eos_token_id": 0,
                "pad_token_id": None,
            }
            if architecture == "gpt2":
                sizes = {"vocab_size": 576, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
                sizes |= {"bos_token_id": 0, "eos_token_id": 0}
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**sizes))
            made[architecture] = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(made[architecture])
            AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(made[architecture])
        return made[architecture]

    return make


@pytest.fixture
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_data("preferences")``: the path of a ``.jsonl`` file with 16 rows, written for this test.

    Kinds: ``demonstrations``, ``rankings`` (three answers, two of them tied), ``preferences``, ``ratings``,
    ``prompts``, ``text``.
    """
    folder = tmp_path_factory.mktemp("data")

    def make(kind: str) -> Path:
        if kind not in DATA:
            raise ValueError(f"there is no kind of data '{kind}'.{did_you_mean(kind, DATA)} Kinds: {', '.join(DATA)}")
        file = folder / f"{kind}.jsonl"
        if not file.exists():
            file.write_text("".join(json.dumps(row) + "\n" for row in DATA[kind]), encoding="utf-8")
        return file

    return make


@pytest.fixture
def run_stage(
    tiny_model: Callable[..., Path],
    tiny_data: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Path]:
    """``run_stage("sft", "--plugin", "mine", "mine.r=4")``: ``alignkit train --plugin sft`` in this process.

    The model is ``tiny_model()``. Every stage trains on ``tiny_data`` of its first row type, for two steps of two rows
    on the CPU; the runs that it needs are trained first. Further arguments are those of the command line and take
    precedence. Returns the run folder, which is in ``tmp_path / "runs"`` without ``--output``. It has no curves, since
    drawing them takes as long as training.

    Raises:
        AssertionError: the command failed; the message is its one-line error.
    """
    from alignkit.cli import main
    from alignkit.registry import Registry

    monkeypatch.setenv("ALIGNKIT_DEBUG", "1")  # keep the settings of libraries, which are global
    monkeypatch.setattr("alignkit.runs.curves.can_draw", lambda: False)

    def run(stage: str, *arguments: str) -> Path:
        registry = Registry()
        with contextlib.suppress(AlignkitError):  # the command below reports it
            registry.activate(stage, *_given(arguments, "--plugin", "-p"))
        stages = [registry.stage(each.name) for each in registry.all("stage")]
        kinds = {each.name: [KIND_OF_ROW[row] for row in each.rows if row in KIND_OF_ROW] for each in stages}
        data = [f"stages.{name}.data.path={tiny_data(known[0])}" for name, known in kinds.items() if known]
        given = ["--model", str(tiny_model()), "--output", str(tmp_path / "runs")]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            status = main(["--debug", "train", "--plugin", stage, *given, *data, *SMALL, *arguments])
        print(errors.getvalue(), end="", file=sys.stderr)
        if status:
            raise AssertionError(errors.getvalue().strip().splitlines()[-1])
        return Path([str(tmp_path / "runs"), *_given(arguments, "--output", "-o")][-1]) / stage

    return run


@pytest.fixture
def check_plugin() -> Callable[[str], None]:
    """``check_plugin("mine")``: run ``alignkit plugins check mine``, which imports the plugin in another process.

    Raises:
        AssertionError: the plugin has problems; the message has one line for each.
    """
    from alignkit.config import plugins_check

    def check(name: str) -> None:
        problems = [
            problem for checked in plugins_check.check(plugins_check.named(name)) for problem in checked.problems
        ]
        if problems:
            raise AssertionError("\n".join(problems))

    return check


def _given(arguments: Sequence[str], *flags: str) -> list[str]:
    return [value for flag, value in itertools.pairwise(arguments) if flag in flags]
