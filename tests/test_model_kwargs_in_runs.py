"""``model_kwargs`` and ``tuner.dtype`` in runs: every model that is loaded from the base gets them, also afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import ppo
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alignkit.cli import main
from alignkit.errors import AlignkitError, ConfigError
from alignkit.models import device_and_dtype, pretrained
from alignkit.runs import base, manifest

ONE_STEP = ["train.max_steps=1", "train.save_strategy=no", "train.eval_strategy=no"]
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments with which Transformers loaded models."""
    seen: list[dict[str, Any]] = []
    load = pretrained.load

    def record(located: str, kwargs: dict[str, Any], head: bool = False) -> Any:
        seen.append({"located": located, "head": head, **kwargs})
        return load(located, kwargs, head)

    monkeypatch.setattr(pretrained, "load", record)
    return seen


def failure(run_stage: Callable[..., Path], *arguments: str) -> str:
    with pytest.raises(AssertionError) as error:
        run_stage("sft", "--overwrite", *ONE_STEP, *arguments)
    assert "This is unexpected" not in str(error.value)
    return str(error.value)


def test_every_model_of_a_run_gets_them_and_commands_that_open_it_later(
    folder: Path,
    run_stage: Callable[..., Path],
    tiny_model: Callable[..., Path],
    tiny_data: Callable[[str], Path],
    loads: list[dict[str, Any]],
) -> None:
    """The reward model is on another base. The value starts from it, and is trained as this run computes."""
    other = str(tiny_model("qwen2"))
    own = ["model_kwargs.attn_implementation=sdpa", "model_kwargs.rms_norm_eps=0.2", "--plugin", "lora", *ONE_STEP]
    reward = run_stage("rm", "--model", other, "rm.policy=base", "--output", "rewards", *own)
    loads.clear()
    eager = ["model_kwargs.attn_implementation=eager", "model_kwargs.rms_norm_eps=0.1", "ppo.policy=base"]
    run = ppo("--plugin", "full", *eager, f"reward.path={reward}", "ppo.iterations=1", "ppo.eval_every=1")
    policy = str(Path("base").absolute())
    assert {(each["located"], each["head"], each["attn_implementation"], each["rms_norm_eps"]) for each in loads} == {
        (policy, False, "eager", 0.1),  # and the reference, a copy
        (other, True, "eager", 0.2),  # the value
        (other, True, "sdpa", 0.2),  # the reward model, as it was trained
    }

    loads.clear()
    words = ["-o", "answers.jsonl", "-k", "2", "--max-new-tokens", "2"]
    assert main(["sample", str(run), "prompts.jsonl", *words]) == 0
    assert main(["evaluate", str(run), "--data", str(tiny_data("demonstrations"))]) == 0  # and its base
    assert {(each["attn_implementation"], each["rms_norm_eps"]) for each in loads} == {("eager", 0.1)}
    assert {each["located"] for each in loads} == {policy, str(run)}
    loads.clear()
    assert main(["rank", "answers.jsonl", "--by", str(reward), "-o", "ranks.jsonl"]) == 0
    assert [(each["attn_implementation"], each["rms_norm_eps"]) for each in loads] == [("sdpa", 0.2)]


def test_an_attribute_of_the_config_is_that_of_the_model_that_was_trained(
    run_stage: Callable[..., Path], tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Held-out loss before training is that of plain Transformers with the same attribute, also of a child."""
    run = run_stage("sft", "--plugin", "lora", "model_kwargs.rms_norm_eps=0.1", "train.max_steps=1", "train.bf16=false")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(), rms_norm_eps=0.1, dtype=torch.float32)
    opened = pretrained.load(str(tiny_model()), {"rms_norm_eps": 0.1, "dtype": torch.float32})
    ids = torch.arange(8)[None]
    assert torch.equal(plain(ids).logits, opened(ids).logits)
    assert manifest.read(run)["config"]["model_kwargs"] == {"rms_norm_eps": 0.1}

    child = ["check", "--plugin", "rm", f"rm.policy={run}", "--output", str(run.parent)]
    assert main(child) == 0
    assert "options  rms_norm_eps=0.1" in capsys.readouterr().out
    assert main([*child, "model_kwargs.rms_norm_eps=0.2"]) == 2
    assert "its base was loaded with model_kwargs.rms_norm_eps=0.1, not 0.2" in capsys.readouterr().err
    assert main([*child, "model_kwargs.attn_implementation=eager"]) == 0


def test_weights_that_the_files_lack_are_an_error(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Transformers would initialize them at random, and say so in a warning that alignkit silences."""
    shutil.copytree(tiny_model(), tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}, file)
    with pytest.raises(
        AlignkitError, match=r"its files lack the weights model.layers.1.mlp.down_proj.weight and 2 oth"
    ):
        pretrained.load(str(tmp_path / "cut"), {})
    with pytest.raises(AlignkitError, match=r"its files lack the weights model.layers.2"):
        pretrained.load(str(tiny_model()), {"num_hidden_layers": 3})
    assert pretrained.load(str(tiny_model()), {}, head=True).score.weight.dtype is torch.float32


def test_what_only_transformers_knows_to_be_wrong_is_one_line(run_stage: Callable[..., Path]) -> None:
    unknown = failure(run_stage, "model_kwargs.nonsense=1")
    assert "unknown key model_kwargs.nonsense: neither an argument of from_pretrained nor of its config" in unknown
    shapes = failure(run_stage, "model_kwargs.hidden_size=32")
    assert "weights in its files have other shapes than its config says, with model_kwargs hidden_size=32" in shapes


def test_the_whole_model_is_on_the_device_of_the_run(run_stage: Callable[..., Path]) -> None:
    assert run_stage("sft", "--plugin", "lora", "model_kwargs.device_map=auto", *ONE_STEP)
    assert "device_map is cuda, and this run computes on cpu" in failure(run_stage, "model_kwargs.device_map=cuda")
    with pytest.raises(ConfigError, match="with several processes, each loads its own models"):
        device_and_dtype.check_loading(
            {"dtype": "float32", "device_map": "auto"}, torch.device("cpu"), torch.float32, processes=2
        )


def test_flash_attention_needs_16_bits_and_is_replaced_where_it_does_not_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    kwargs = {"dtype": torch.float32, "attn_implementation": "flash_attention_2"}
    with pytest.raises(ConfigError, match="flash_attention_2 does not work on a CPU"):
        device_and_dtype.check_loading(kwargs, torch.device("cpu"), torch.bfloat16, 1)
    if device_and_dtype.run_device({}).type == "cpu":
        assert device_and_dtype.usable(kwargs, print) == {"dtype": torch.float32}
        assert "flash_attention_2 does not work on a CPU: using Transformers' default" in capsys.readouterr().out


# --- code of a repository --------------------------------------------------------------------------------------------


@pytest.fixture
def own_code(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with a model whose classes are in the folder."""
    folder = tmp_path / "own"
    shutil.copytree(tiny_model(), folder)
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_repository_runs_only_if_the_user_allows_it_each_time(
    run_stage: Callable[..., Path],
    own_code: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = ["--plugin", "lora", "--model", str(own_code)]
    allow = "model_kwargs.trust_remote_code=true"
    refused = failure(run_stage, *model)
    assert "runs code of its repository. If you trust that code, set model_kwargs.trust_remote_code=true" in refused
    run = run_stage("sft", *model, allow, *ONE_STEP)

    capsys.readouterr()
    monkeypatch.setenv(base.TRUST, "")
    chat = ["chat", str(run), "--prompt", "Hi", "--max-new-tokens", "2"]
    assert main(chat) == 2
    assert "was trained with model_kwargs.trust_remote_code. If you trust" in capsys.readouterr().err
    assert main(["check", "--plugin", "rm", f"rm.policy={run}"]) == 2
    assert "its base runs code of its repository. If you trust it, add --trust-remote-code" in capsys.readouterr().err
    assert main(["chat", str(own_code), "--prompt", "Hi"]) == 2
    assert "runs code of its repository" in capsys.readouterr().err
    assert main([*chat, "--trust-remote-code"]) == 0
    assert main(["check", "--plugin", "rm", f"rm.policy={run}", "--trust-remote-code"]) == 0


# --- tuner.dtype -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base_dtype", "bf16"), [("bfloat16", "false"), ("float32", "true"), ("float16", "true")])
def test_the_number_format_of_the_frozen_base_is_independent_of_training(
    run_stage: Callable[..., Path],
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    base_dtype: str,
    bf16: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    install(
        "formats-of",
        """
        import json
        from alignkit import hookimpl

        @hookimpl
        def alignkit_model_ready(run, role, model):
            formats = {"base": set(), "trained": set()}
            for name, parameter in model.named_parameters():
                formats["trained" if parameter.requires_grad else "base"].add(str(parameter.dtype))
            with open("formats.json", "w") as file:
                json.dump({name: sorted(each) for name, each in formats.items()}, file)
        """,
    )
    more = ["--plugin", "lora", "--plugin", "formats-of", "train.learning_rate=1e-3", "train.save_strategy=no"]
    run = run_stage("sft", *more, f"tuner.dtype={base_dtype}", f"train.bf16={bf16}", "--output", "one")
    formats = json.loads(Path("formats.json").read_text())
    plain = run_stage("sft", *more, "train.bf16=false", "--output", "two")

    assert formats == {"base": [f"torch.{base_dtype}"], "trained": ["torch.float32"]}
    metrics, expected = manifest.read(run)["metrics"], manifest.read(plain)["metrics"]
    assert metrics["first_eval_loss"] == pytest.approx(expected["first_eval_loss"], abs=0.05)
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], abs=0.05)
    assert metrics["eval_loss"] < metrics["first_eval_loss"]


def test_a_base_in_fp16_is_refused_where_training_has_no_loss_scaling(run_stage: Callable[..., Path]) -> None:
    refused = failure(run_stage, "--plugin", "lora", "tuner.dtype=float16", "train.bf16=false")
    assert "tuner.dtype=float16: this run trains in fp32, without the loss scaling" in refused
