"""``alignkit plan``: the memory that it computes is the memory that the same run takes."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from alignkit import planning
from alignkit.cli import main
from alignkit.generation import decode, hf_generate
from alignkit.models.trl_internals import head_in_place
from alignkit.online import diagnosis
from alignkit.planning import cuda, estimate, ledger, phantoms, repeated, weightless

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="session")
def small_model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose activations are larger than what else a step takes, with the tokenizer of the tiny ones."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("small")
    config = AutoConfig.from_pretrained(tiny_model("llama"), hidden_size=128, intermediate_size=384, head_dim=32)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """``settings("ppo", "lora", response=8)``: those of a run in the current folder, as in the benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(phantoms, "SMALL", 1 << 10)
    benchmark = importlib.import_module("plan_memory")

    def make(stage: str, tuner: str, **options: Any) -> dict[str, Any]:
        given = {"model": str(small_model), "words": 40, "response": 12, "microbatch": 2, **options}
        made: dict[str, Any] = benchmark.settings_of(stage, tuner, argparse.Namespace(**given))
        return made

    return make


def plan_of(settings: dict[str, Any]) -> Any:
    return importlib.import_module("memory_measured").planned(settings)


@pytest.mark.parametrize(
    ("stage", "tuner"),
    [
        *(("sft", "full"), ("rm", "qlora"), ("dpo", "lora"), ("kto", "lora")),
        *(("ppo", "lora"), ("grpo", "qlora"), ("rahf", "lora")),
    ],
)
def test_the_plan_is_within_15_percent_of_what_the_run_takes(
    settings: Callable[..., dict[str, Any]], stage: str, tuner: str
) -> None:
    given = settings(stage, tuner)

    planned = planning.memory(plan_of(given))
    measured = importlib.import_module("memory_measured").measure(given)
    assert planned.tensors == pytest.approx(measured, rel=0.15), planned.phases


def test_weights_in_4_bits_take_the_bytes_that_are_computed() -> None:
    import bitsandbytes as bnb

    for double in (True, False):
        layer = bnb.nn.Linear4bit(256, 512, bias=False, compress_statistics=double, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            torch.randn(512, 256), requires_grad=False, quant_type="nf4", compress_statistics=double
        )
        layer.to("cpu")
        state = layer.weight.quant_state
        nested = [state.offset, state.state2.absmax, state.state2.code] if double else []

        taken = [layer.weight.data, state.absmax, state.code, *nested]
        assert weightless.nf4_bytes(512 * 256, double) == sum(tensor.nbytes for tensor in taken)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_states_of_optimizers_take_the_bytes_that_are_computed(
    settings: Callable[..., dict[str, Any]], optimizer: str
) -> None:
    import bitsandbytes as bnb
    import peft
    from transformers import AutoModelForCausalLM

    given = {**settings("sft", "lora"), "optimizer": {"name": optimizer}}
    planned = planning.memory(plan_of(given)).phases["training"]["optimizer states"]

    lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(given["model"]), lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cls = torch.optim.AdamW if optimizer == "adamw" else bnb.optim.AdamW8bit
    made = cls(trained, lr=1e-3)
    sum(parameter.sum() for parameter in trained).backward()
    made.step()
    tensors = {id(t): t.nbytes for state in made.state.values() for t in state.values() if isinstance(t, torch.Tensor)}
    assert planned == sum(tensors.values())


def test_settings_that_save_memory_do_so_in_the_plan(settings: Callable[..., dict[str, Any]]) -> None:
    def tensors(**changed: Any) -> int:
        given = settings("ppo", "lora")
        given["train"] |= changed.pop("train", {})
        given["stages"]["ppo"] |= changed
        return planning.memory(plan_of(given)).tensors

    usual = tensors()
    assert tensors(train={"gradient_checkpointing": True}) < usual
    assert tensors(value="head") < usual


def test_a_plan_for_a_gpu_has_the_workspaces_of_cublas(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each thread that multiplies matrices, in every phase, as large as PyTorch documents."""
    with monkeypatch.context() as patched:
        patched.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        patched.setattr(torch.cuda, "is_available", lambda: True)
        for capability, size in (((8, 6), 2 * 4096 + 8 * 16), ((9, 0), 8 * 4096)):
            patched.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
            assert cuda.cublas_workspaces() == 2 * size * 1024
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")

    plan = plan_of(settings("rm", "full"))
    assert "cuBLAS workspaces" not in planning.memory(plan, "cpu").phases["training"]
    for parts in planning.memory(plan, "cuda").phases.values():
        assert parts["cuBLAS workspaces"] == 2 * 16 * 8 * 1024


@pytest.mark.parametrize(
    ("stage", "tuner", "checkpointing"),
    [("sft", "full", True), ("dpo", "lora", False), ("ppo", "lora", False)],
)
def test_equal_layers_take_what_they_take_when_each_is_run(
    settings: Callable[..., dict[str, Any]],
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    tuner: str,
    checkpointing: bool,
) -> None:
    """Measured on one layer, the others count the same: with checkpointing, autocast, caches and what graphs keep."""
    model = tmp_path / "deeper"
    shutil.copytree(small_model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 5}
    (model / "config.json").write_text(json.dumps(config))
    given = settings(stage, tuner, model=str(model))
    given["train"] |= {"gradient_checkpointing": checkpointing, "bf16": True}
    cached, run_layer = [0], LlamaDecoderLayer.forward

    def counted(*arguments: Any, **keywords: Any) -> Any:
        cached[0] += keywords.get("past_key_values") is not None
        return run_layer(*arguments, **keywords)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    monkeypatch.setattr(repeated, "FEW", 5)
    quick = planning.memory(plan_of(given), "cpu").phases
    of_quick, cached[0] = cached[0], 0
    monkeypatch.setattr(repeated, "_key", lambda *call: None)
    whole = planning.memory(plan_of(given), "cpu").phases

    assert (0 < of_quick < 0.8 * cached[0]) == (stage == "ppo")
    assert quick.keys() == whole.keys()
    for phase, parts in whole.items():
        assert quick[phase] == pytest.approx(parts, rel=0.01, abs=20_000)


def test_answers_are_planned_for_as_many_different_prompts_as_the_run_samples_from(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = list[list[Any]]()
    monkeypatch.setattr(estimate, "rehearse", lambda run, *_: prompts.append(run.train_rows) or {"sampling": {}})
    given = settings("ppo", "lora")
    planning.memory(plan_of(given))

    assert len({row.key for _, row in prompts[0]}) == len(prompts[0]) == given["stages"]["ppo"]["batch_size"]


@pytest.mark.parametrize("engine", ["decode", "generate"])
def test_logits_without_data_may_be_any_numbers(
    engine: str, settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run ends at logits that are NaN. Those of a large model without data often are."""
    draw = decode.draw

    def to_nan(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logps = draw(*arguments)
        return tokens, logps * torch.nan

    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError

    monkeypatch.setattr(decode, "draw", to_nan)
    monkeypatch.setattr(hf_generate, "check_finite", refuse)
    monkeypatch.setattr(diagnosis, "check_reference", refuse)
    monkeypatch.setattr(diagnosis, "check_first_step", refuse)
    given = settings("ppo", "lora")
    given["stages"]["ppo"]["rollout"] = {"name": engine}

    assert planning.memory(plan_of(given)).phases["sampling"]


def test_a_plan_shares_prompts_where_the_run_does(settings: Callable[..., dict[str, Any]]) -> None:
    def tensors(shared: bool | None) -> int:
        given = settings("dpo", "lora")
        given["stages"]["dpo"]["shared_prompt"] = shared
        return planning.memory(plan_of(given)).tensors

    assert tensors(None) == tensors(True) < tensors(False)


def test_the_fused_head_takes_one_tile_of_logits_on_a_gpu() -> None:
    """Its Triton kernels work in place; without them, on a CPU, there are several tensors as large as the tile."""
    from trl.kernels import ChunkedLogProbFunction

    def peak(rows: int = 64, vocabulary: int = 4096) -> float:
        hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(vocabulary, 8)
        with ledger.Ledger() as counted, counted.phase("head"):
            ChunkedLogProbFunction.apply(hidden, weight, None, torch.zeros(rows, dtype=torch.long), 1.0, vocabulary)[
                0
            ].sum().backward()
        return counted.phases["head"]["activations"] / (rows * vocabulary * 4)

    assert peak() > 3
    with head_in_place():
        assert peak() == pytest.approx(1, abs=0.2)  # with the weights
    assert peak() > 3


@pytest.mark.parametrize("shared", [True, False])
def test_lora_on_4_bit_weights_keeps_its_input_and_no_copy_on_a_gpu(shared: bool) -> None:
    """PEFT casts the input to the dtype of the adapter, except for 4-bit weights under autocast on a GPU."""
    import peft

    base = torch.nn.Sequential(weightless.Linear4bit(torch.nn.Linear(8, 8, dtype=torch.bfloat16), True))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], r=2))
    if shared:
        cuda.share_inputs(model)
    x, saved = torch.randn(3, 8, dtype=torch.bfloat16), list[torch.Tensor]()
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with keeping, torch.autocast("cpu", torch.bfloat16):
        model(x)

    inputs = {tensor.data_ptr() for tensor in saved if tensor.shape == x.shape}
    assert len(inputs) == 1
    assert (x.data_ptr() in inputs) == shared
    assert model(x).dtype is torch.bfloat16  # as without autocast, when answers are sampled


def test_a_plan_keeps_nothing(settings: Callable[..., dict[str, Any]]) -> None:
    planning.memory(plan_of(settings("sft", "lora")))
    gc.collect()

    assert not [each for each in gc.get_objects() if type(each).__name__ in ("SFTTrainer", "PlannedRun")]


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_no_weights_are_read(settings: Callable[..., dict[str, Any]], tmp_path: Path, tuner: str) -> None:
    """A folder with a config and a tokenizer is enough, also for a run whose parents are not trained yet."""
    given = settings("ppo", tuner)
    folder = tmp_path / "without"
    folder.mkdir()
    for file in Path(given["model"]).iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    del given["stages"]["ppo"]["policy"], given["stages"]["ppo"]["reward"]

    phases = planning.memory(plan_of({**given, "model": str(folder)}), "cuda").phases
    assert list(phases) == ["sampling", "scoring", "training", "optimizer step"]


def test_the_command_prints_a_table_and_the_last_measured_peak(
    settings: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings("sft", "lora")
    words = ["--plugin", "sft", "--plugin", "lora", "--model", given["model"], "--data", "rows.jsonl"]
    words += ["--output", "runs", "train.use_cpu=true", "data.eval_size=2"]
    assert main(["plan", *words]) == 0
    printed = capsys.readouterr().out
    assert "trained weights" in printed
    assert "measured" not in printed

    assert main(["train", *words, "train.max_steps=1"]) == 0
    manifest = Path("runs/sft/alignkit.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "peak_memory": 3 << 30}))
    capsys.readouterr()
    assert main(["plan", *words, "train.max_steps=1"]) == 0
    assert "measured  3.00 GiB of tensors, by runs/sft" in capsys.readouterr().out
    assert main(["plan", *words, "train.max_steps=1", "sft.max_length=512", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["measured"] is None
    assert planned["peak"] == max(sum(parts.values()) for parts in planned["phases"].values())
