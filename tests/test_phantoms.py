"""Tensors without data: code that looks at data runs on them, and takes as much memory as on real ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from alignkit.models import logit_form
from alignkit.planning.ledger import Ledger
from alignkit.planning.phantoms import SMALL, Copies, Phantoms

LARGE = 2 * SMALL


def test_large_tensors_have_no_data_and_small_ones_and_integers_have() -> None:
    with Phantoms():
        large, small, ids = torch.randn(LARGE), torch.ones(8), torch.arange(LARGE)

        assert isinstance(large, FakeTensor)
        assert not isinstance(small, FakeTensor)
        assert small.sum().item() == 8
        assert ids.sum().item() == LARGE * (LARGE - 1) // 2


def test_equal_computations_have_equal_results() -> None:
    with Phantoms():
        a, b = torch.randn(LARGE, 2), torch.randn(LARGE, 2)

        assert (a - b).abs().max() <= 1e-4 * (1 + b.abs().max())
        assert torch.equal(a, b)
        assert not (a - b).isnan().any()
        assert float((a * b).sum() / b.square().sum()) == 1


@pytest.mark.parametrize(
    "operation",
    [
        *(lambda x: x.detach(), lambda x: x.mT, lambda x: x[1:, ::2], lambda x: x.view(-1, 4, 2)),
        *(lambda x: x.mT.reshape(-1), lambda x: x[None].expand(3, -1, -1), lambda x: x.diagonal()),
        *(lambda x: x.mT.clone(), lambda x: x.mT.contiguous(), lambda x: x.mT.bfloat16(), lambda x: x.to("cpu")),
        *(lambda x: torch.zeros_like(x.mT), lambda x: torch.ones_like(x, dtype=torch.bfloat16)),
        *(lambda x: x.new_zeros(9, LARGE), lambda x: x.new_empty((LARGE,), dtype=torch.float64)),
        *(lambda x: torch.empty_strided((2, LARGE), (1, 2)), lambda x: torch.full((LARGE, 2), 7.0)),
        *(lambda x: x @ torch.ones(8, 3), lambda x: torch.ones(3, LARGE // 4).mT @ torch.ones(3, 7)),
        *(lambda x: x * torch.ones(LARGE, 1), lambda x: x + torch.ones(8).bfloat16(), lambda x: x.sum(1)),
    ],
)
def test_a_result_has_the_shape_and_the_memory_that_it_has_with_data(operation: Callable[[Tensor], Tensor]) -> None:
    def made(ledger: Ledger) -> tuple[object, ...]:
        with ledger:
            x = torch.ones(LARGE, 8)
            before = ledger.now
            y = operation(x)
            assert isinstance(y, FakeTensor) == isinstance(ledger, Phantoms)
            return y.shape, y.stride(), y.storage_offset(), y.dtype, y.device, ledger.now - before

    assert made(Phantoms()) == made(Ledger())


def test_masks_select_as_many_rows_as_they_have() -> None:
    mask = torch.arange(LARGE) % 3 == 0
    with Phantoms():
        states = torch.randn(LARGE, 4)
        states[mask] = 0

        assert states[mask].shape == (int(mask.sum()), 4)
        assert states.argmax(-1).shape == (LARGE,)


def test_a_loop_over_sampled_tokens_ends() -> None:
    with Phantoms():
        logits = torch.randn(4, LARGE)
        tokens = logits.argmax(-1)

        assert tokens.tolist() == [0, 0, 0, 0]
        assert int(torch.multinomial(logits[:1].softmax(-1), 1)) < LARGE


def test_a_small_tensor_that_is_written_from_a_large_one_has_numbers() -> None:
    with Phantoms():
        small = torch.full((4,), float("nan"))
        small.copy_(torch.randn(4, LARGE)[:, 0])

        assert small.tolist() == [1, 1, 1, 1]


def test_an_operation_in_place_changes_the_shape_if_it_is_one_of_those_that_do() -> None:
    with Phantoms():
        large = torch.randn(LARGE, 2)

        assert large.mul_(2) is large
        assert large.t_().shape == large.shape == (2, LARGE)
        assert torch.randn(LARGE).resize_(LARGE // 2, 2).shape == (LARGE // 2, 2)


def test_what_is_counted_is_what_tensors_with_data_take() -> None:
    def step() -> None:
        model = nn.Sequential(nn.Linear(300, 900), nn.GELU(), nn.Linear(900, 300))
        loss = model(torch.randn(500, 300)).square().mean()
        loss.backward()
        torch.optim.AdamW(model.parameters()).step()

    with Ledger() as real, real.phase("step"):
        step()
    with Phantoms() as phantoms, phantoms.phase("step"):
        step()

    assert sum(phantoms.phases["step"].values()) == pytest.approx(sum(real.phases["step"].values()), rel=0.001)
    assert real.now == phantoms.now == 0


def test_memory_that_was_never_written_has_a_value() -> None:
    """It could hold anything, so that the same plan failed now and then. In this mode PyTorch fills it with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        with Phantoms():
            given = torch.zeros(3)
            made = [torch.empty(3), torch.empty_like(given), given.new_empty(3), torch.empty_strided((3,), (1,))]
    finally:
        torch.use_deterministic_algorithms(False)
    assert [each.tolist() for each in made] == [[1.0] * 3] * 4


def test_models_without_data_are_copied() -> None:
    with Phantoms(), Copies():
        model = nn.Linear(SMALL, 3)
        same = copy.deepcopy(model).requires_grad_(False)

        assert isinstance(same.weight, nn.Parameter)
        assert same.weight.untyped_storage()._cdata != model.weight.untyped_storage()._cdata
        assert model.weight.requires_grad
        assert not same.weight.requires_grad


def test_the_logits_of_a_model_without_data_are_those_of_its_head() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    with Phantoms():
        model = AutoModelForCausalLM.from_config(config)

        assert logit_form.measure(model) == logit_form.LogitForm()
