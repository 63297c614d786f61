"""SFT: the same numbers as TRL where TRL is right, and each setting acts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import datasets
import pytest
import torch
import trl
from conftest import DEMONSTRATIONS
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit import ConfigError, DataError
from alignkit.config import resolve
from alignkit.config.resolve import parse_override
from alignkit.config.settings import merge
from alignkit.data.chat_template import load_tokenizer
from alignkit.evaluation import standard_error
from alignkit.models import install_fused_head
from alignkit.registry import Registry
from alignkit.runs.plan import make
from alignkit.training.run import Run
from alignkit_sft import packing


@pytest.fixture
def trainer(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """``trainer("sft.packing=true")``: the stage's own trainer on a tiny model, as ``execute`` builds it, in fp32."""

    def build(*overrides: str, model: str = "llama") -> Any:
        data = tmp_path / "demos.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
        cli = merge(
            {"plugins": ["sft"], "model": str(tiny_model(model)), "output": str(tmp_path / "runs")},
            {"data": {"path": str(data), "eval_size": 4}, "train": {"bf16": False, "fp16": False, "use_cpu": True}},
            *map(parse_override, overrides),
        )
        registry = Registry()
        plan = make(registry, resolve(registry, {}, cli))
        return plan.config.stage.component.build(Run(plan, print))

    return build


def batch_of(trainer: Any, rows: int = 4) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])


@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen2", "gemma"])
def test_the_loss_is_trls_to_the_last_digit(trainer: Callable[..., Any], model: str) -> None:
    ours = trainer(model=model)
    inputs = batch_of(ours)
    theirs = trl.SFTTrainer.compute_loss(ours, ours.model.eval(), dict(inputs))

    assert torch.equal(ours.compute_loss(ours.model, dict(inputs)), theirs)


def test_the_loss_is_that_of_the_plain_model_on_the_response(trainer: Callable[..., Any]) -> None:
    ours = trainer()
    inputs = batch_of(ours)
    logits = ours.model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())

    torch.testing.assert_close(ours.compute_loss(ours.model, inputs), expected)


def test_trl_on_the_raw_rows_trains_on_the_same_tokens(trainer: Callable[..., Any], tmp_path: Path) -> None:
    """What TRL prepares from messages, but for what its template writes after the end of the answer."""
    ours = trainer("data.eval_size=0")
    folder = ours.model.config._name_or_path
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
        }
        for row in DEMONSTRATIONS
    ]
    theirs = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        trl.SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=load_tokenizer(folder, None),
    )
    for mine, trls in zip(ours.train_dataset, theirs.train_dataset, strict=True):
        length = len(mine["input_ids"])
        assert (mine["input_ids"], mine["labels"]) == (trls["input_ids"][:length], trls["labels"][:length])
        assert ours.processing_class.decode(trls["input_ids"][length:]) == "\n"


def test_the_end_of_the_answer_is_learnt_where_pad_is_eos(trainer: Callable[..., Any]) -> None:
    ours = trainer()
    inputs = batch_of(ours)
    eos = ours.processing_class.eos_token_id
    lengths = inputs["attention_mask"].sum(1)

    assert ours.processing_class.pad_token_id == eos
    assert lengths.min() < lengths.max()  # some are padded
    for labels, length in zip(inputs["labels"], lengths, strict=True):
        assert labels[length - 1] == eos
        assert (labels[length:] == -100).all()


def test_a_packed_row_does_not_see_its_neighbors(trainer: Callable[..., Any]) -> None:
    packed, padded = trainer("sft.packing=true", "sft.max_length=128"), trainer()
    padded.model.load_state_dict(packed.model.state_dict())
    (bin_,) = [row for row in packed.train_dataset if len(row["seq_lengths"]) > 2][:1]
    one = packed.data_collator([bin_])
    rows = [row for row in padded.train_dataset if any(_inside(row["input_ids"], bin_))]
    apart = padded.data_collator(rows)

    assert len(rows) == len(bin_["seq_lengths"])
    torch.testing.assert_close(
        packed.compute_loss(packed.model.eval(), one), padded.compute_loss(padded.model.eval(), apart)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_is_refused_where_rows_would_see_each_other(trainer: Callable[..., Any], dtype: torch.dtype) -> None:
    ours = trainer("sft.packing=true")

    def refused(name: str, **fields: Any) -> bool:
        ours.model = architectures.build(name, **fields).to(dtype)
        install_fused_head(ours.model)
        try:
            packing.check(ours)
        except ConfigError as error:
            return str(error).startswith(f"sft.packing: {type(ours.model).__name__} does not keep")
        return False

    assert [name for name in ("llama", "qwen2", "gpt2", "gemma2", "gpt_neo") if refused(name)] == []
    assert [name for name in ("opt", "bloom", "mamba", "mpt") if not refused(name)] == []
    assert refused("falcon", alibi=False)
    assert refused("falcon", alibi=True)


def _inside(ids: list[int], bin_: dict[str, Any]) -> list[bool]:
    starts = [sum(bin_["seq_lengths"][:i]) for i in range(len(bin_["seq_lengths"]))]
    return [bin_["input_ids"][start : start + len(ids)] == ids for start in starts]


def test_a_step_is_the_same_however_it_is_cut(trainer: Callable[..., Any]) -> None:
    def gradient(*cut: str) -> torch.Tensor:
        ours = trainer(
            "train.max_steps=1", "train.max_grad_norm=0", "optimizer.name=adafactor", "tuner.name=full", *cut
        )
        seen: list[torch.Tensor] = []
        ours.create_optimizer()
        ours.optimizer.register_step_pre_hook(
            lambda *_: seen.append(torch.cat([p.grad.flatten() for p in ours.model.parameters()]))
        )
        ours.train()
        return seen[0]

    whole = gradient("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1")
    parts = gradient("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4")
    torch.testing.assert_close(whole, parts)


def test_the_held_out_loss_is_a_mean_over_tokens(trainer: Callable[..., Any]) -> None:
    one, many = trainer("train.per_device_eval_batch_size=1"), trainer("train.per_device_eval_batch_size=4")
    metrics, others = one.evaluate(), many.evaluate()

    assert metrics["eval_loss"] == pytest.approx(others["eval_loss"], rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(metrics["eval_loss"]).exp().item(), rel=1e-5)


def test_the_error_of_perplexity_is_that_of_independent_rows(trainer: Callable[..., Any]) -> None:
    """Held against the mean of per-row losses, grouped by row, whatever the batches are."""
    one, many = trainer("train.per_device_eval_batch_size=1"), trainer("train.per_device_eval_batch_size=4")
    error, other = (each.evaluate()["eval_perplexity_error"] for each in (one, many))
    nll, rows = list[float](), list[int]()
    for number, row in enumerate(one.eval_dataset):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logps = one.model(input_ids=ids).logits[0].float().log_softmax(-1).detach()
        targets = [at for at in range(1, len(labels)) if labels[at] != -100]
        nll += [-float(logps[at - 1, labels[at]]) for at in targets]
        rows += [number] * len(targets)
    perplexity = math.exp(sum(nll) / len(nll))

    assert error == pytest.approx(perplexity * standard_error(nll, rows), rel=0.01)
    assert other == pytest.approx(error, rel=0.01)


def test_gradient_checkpointing_acts_and_changes_nothing(trainer: Callable[..., Any]) -> None:
    def after_a_step(on: str) -> tuple[bool, torch.Tensor]:
        ours = trainer(f"train.gradient_checkpointing={on}", "train.max_steps=1")
        ours.train()
        base = ours.model.get_base_model()
        return base.model.layers[0].gradient_checkpointing, torch.cat(
            [p.flatten() for p in ours.model.parameters() if p.requires_grad]
        )

    (on, with_it), (off, without) = after_a_step("true"), after_a_step("false")
    assert (on, off) == (True, False)
    torch.testing.assert_close(with_it, without)


def test_the_adapters_of_a_quantized_model_stay_fp32(trainer: Callable[..., Any]) -> None:
    ours = trainer("tuner.name=qlora")

    assert {p.dtype for p in ours.model.parameters() if p.requires_grad} == {torch.float32}


def test_the_trainers_defaults_are_transformers_not_trls(trainer: Callable[..., Any]) -> None:
    args = trainer("train.num_train_epochs=1").args

    assert (args.gradient_checkpointing, args.bf16, args.num_train_epochs) == (False, False, 1)


def test_too_long_rows_are_an_error_that_counts_them(trainer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"\d+ of 12 rows are over 40 tokens, the longest \d+ \(demos.jsonl line \d+\)"):
        trainer("sft.max_length=40")


def test_rows_that_are_too_long_are_skipped_or_truncated_by_setting(
    trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    skipped, cut = (trainer("sft.max_length=40", f"sft.too_long={how}").train_dataset for how in ("skip", "cut"))

    assert len(skipped) < 12
    assert len(cut) == 12
    assert max(len(ids) for ids in cut["input_ids"]) == 40
    assert f"{12 - len(skipped)} skipped, 0 cut" in capsys.readouterr().out


def test_a_setting_that_would_do_nothing_is_refused(trainer: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match="label_smoothing_factor is not supported: the loss is"):
        trainer("train.label_smoothing_factor=0.1")


def test_any_decoder_only_architecture_has_a_tokenizer(tiny_model: Callable[..., Path]) -> None:
    assert AutoTokenizer.from_pretrained(tiny_model("gemma")).eos_token == "<eos>"
