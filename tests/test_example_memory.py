"""The configs in ``examples/`` fit into the GPU memory that their names state, with rows as long as they allow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from alignkit import planning, yaml
from alignkit.cli import common
from alignkit.planning.fit import parse_size
from alignkit.runs.plan import pipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))
LLAMA = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8},
    **{"head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
}
SHAPES: dict[str, dict[str, Any]] = {  # as in the models' cards
    "Qwen/Qwen2.5-1.5B-Instruct": {
        **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536},
        **{"intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
        **{"max_position_embeddings": 32768, "tie_word_embeddings": True},
    },
    "meta-llama/Llama-3.2-3B-Instruct": {
        **LLAMA,
        **{"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        **LLAMA,
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        "tie_word_embeddings": False,
    },
}


def words(tokens: int) -> str:
    """A text of about so many tokens of the test's tokenizer, in which a letter is a token."""
    return " ".join("q" for _ in range(tokens // 2))


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data whose rows are nearly as long as the examples allow, and the models' configs without weights."""
    monkeypatch.chdir(tmp_path)
    long = {
        "demos": {"prompt": words(200), "response": words(780)},
        "rankings": {
            "prompt": words(200),
            "responses": [f"{n} {words(1700)}" for n in range(4)],
            "ranks": [0, 1, 2, 3],
        },
        "prompts": {"prompt": words(220)},
    }
    for name, row in long.items():
        rows = ({key: f"{value} {n}" if key == "prompt" else value for key, value in row.items()} for n in range(40))
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, shape in SHAPES.items():
        shutil.copytree(tokenizer_folder, name)
        Path(name, "config.json").write_text(json.dumps({**shape, "eos_token_id": 0}))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [("llama3.1-8b-qlora-12gb", "sft"), ("qwen2.5-1.5b-full-24gb", "ppo")])
def test_an_example_fits_into_the_memory_that_its_name_states(name: str, stage: str, folder: Path) -> None:
    """Two of the examples: a plan of a large model takes a minute."""
    config = EXAMPLES / f"{name}.yaml"
    arguments = common.read_arguments([], config, None, [], None, [])
    plans = {plan.config.stage.component.name: plan for plan in pipeline(*arguments).to_train}
    size = parse_size(config.stem.rsplit("-", 1)[1])
    peak = planning.memory(plans[stage], "cuda", size).peak

    print(f"{config.stem} {stage}: {peak / 2**30:.1f} GiB")
    assert peak <= size


def test_the_models_of_the_examples_have_shapes_here() -> None:
    assert {dict(yaml.load(config))["model"] for config in CONFIGS} == set(SHAPES)
