"""What alignkit uses of TRL's internals is still there and behaves as relied on; see ``test_internals.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
import trl
from internals import load, used_by
from torch import nn
from trl.kernels import ChunkedLogProbFunction

from alignkit.models import trl_internals
from alignkit.models.logit_form import LogitForm


@used_by("fused_logps in alignkit/models/fused_head.py")
@pytest.mark.parametrize("form", [LogitForm(), LogitForm(0.3), LogitForm(0.3, 0.8)])
def test_trls_kernel_gives_log_probabilities_and_whether_the_label_is_likeliest(form: LogitForm) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 8), torch.randn(50, 8), torch.randn(50)
    expected = form(nn.functional.linear(hidden, weight, bias)).log_softmax(-1)
    labels = torch.randint(0, 50, (7,))
    labels[:3] = expected[:3].argmax(-1)
    logps, _, _, _, is_top1 = ChunkedLogProbFunction.apply(
        hidden, weight, bias, labels, 1.0, 16, form.cap, form.scale, ("is_top1",)
    )

    torch.testing.assert_close(logps, expected.gather(-1, labels[:, None])[:, 0])
    assert torch.equal(is_top1, labels == expected.argmax(-1))


@used_by("head_in_place in alignkit/models/trl_internals.py")
def test_a_plan_replaces_the_three_steps_in_which_trls_kernel_makes_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set[str]()

    def recorded(name: str) -> Callable[..., Any]:
        step = getattr(trl_internals.chunked_logprob, name)
        return lambda *args, **kwargs: (called.add(name), step(*args, **kwargs))[1]

    def run() -> torch.Tensor:
        hidden = torch.randn(6, 4, requires_grad=True)
        labels = torch.zeros(6, dtype=torch.long)
        logps = ChunkedLogProbFunction.apply(hidden, torch.randn(10, 4), None, labels, 1.0, 5)[0]
        logps.sum().backward()
        return logps

    steps = {"_forward_tile", "_backward_tile", "_addmm_fp32"}
    for name in steps:
        monkeypatch.setattr(trl_internals.chunked_logprob, name, recorded(name))
    run()
    assert called == steps

    called.clear()
    with trl_internals.head_in_place():
        assert run().shape == (6,)
    assert called == set()
    run()
    assert called == steps


@used_by("adapter_on_head in alignkit/models/trl_internals.py")
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_trl_refuses_an_adapter_on_the_head_by_a_name_in_its_modules(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    def build() -> Any:
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
        return trl_trainer(kind, peft.get_peft_model(load(tiny_model), config), tmp_path)

    with pytest.raises(ValueError, match="lm_head"):
        build()
    with trl_internals.adapter_on_head():
        build()
    with pytest.raises(ValueError, match="lm_head"):
        build()


@used_by("kept_dtypes in alignkit/models/trl_internals.py")
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_trl_rounds_the_adapters_of_a_quantized_model(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    def quantized() -> Any:
        torch.manual_seed(0)
        model = peft.get_peft_model(load(tiny_model), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        model.base_model.model.is_loaded_in_4bit = True  # what TRL looks at
        return model

    def adapter(model: Any) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if ".default" in name}

    rounded, kept = quantized(), quantized()
    expected = adapter(kept)
    trl_trainer(kind, rounded, tmp_path)
    assert {weights.dtype for weights in adapter(rounded).values()} == {torch.bfloat16}
    with trl_internals.kept_dtypes(kept) as restore:
        trl_trainer(kind, kept, tmp_path)
        assert {weights.dtype for weights in adapter(kept).values()} == {torch.bfloat16}
        restore()  # as DPO does, whose reference may be computed while the trainer is built
        assert {weights.dtype for weights in adapter(kept).values()} == {torch.float32}
    assert all(torch.equal(weights, expected[name]) for name, weights in adapter(kept).items())


def trl_trainer(kind: str, model: Any, folder: Path) -> Any:
    """One of TRL's trainers on one row of token ids."""
    columns = {"sft": ["input_ids"], "dpo": ["prompt_ids", "chosen_ids", "rejected_ids"], "kto": ["prompt_ids"]}[kind]
    trainer, args = getattr(trl, f"{kind.upper()}Trainer"), getattr(trl, f"{kind.upper()}Config")
    prepared = type("Prepared", (trainer,), {"_prepare_dataset": lambda self, dataset, *args: dataset})
    return prepared(
        model=model,
        args=args(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], max_length=None),
        train_dataset=datasets.Dataset.from_list([{column: [5, 6, 7] for column in columns}]),
        processing_class=transformers.AutoTokenizer.from_pretrained(model.config._name_or_path, pad_token="<eos>"),
    )


@used_by("disable_gradient_checkpointing in alignkit/models/trl_internals.py")
def test_gradient_checkpointing_is_off_for_a_while(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with trl_internals.disable_gradient_checkpointing(model, {"use_reentrant": False}):
        assert not model.is_gradient_checkpointing
    assert model.is_gradient_checkpointing
