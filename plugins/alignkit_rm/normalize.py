"""Normalizes the score to mean 0 and standard deviation 1 on the demonstrations, by changing the weights of the head.

InstructGPT adds a bias to the reward, so that demonstrations have mean 0. Transformers' sequence classification heads
have no bias, and a number saved beside the model would be lost when it is loaded with plain Transformers. So the shift
goes into the weights. The last hidden states ``h`` of a language model have a mean far from zero. Therefore there is a
direction ``u`` with ``u . h`` close to 1 for every answer, and subtracting ``mean * u`` from the head's weights lowers
every score by about ``mean``. On the demonstrations the mean is then exactly 0. ``shift_error`` records how much the
shift varies between answers, in standard deviations of the score. The held-out metrics are those of the saved model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignkit import AlignkitError
from alignkit.models import full_tensor, shard_like, whole_weights_of

if TYPE_CHECKING:
    from alignkit.data import Branches
    from alignkit_rm.trainer import RewardTrainer

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # candidates, times the mean square of the hidden states


def constant_direction(hidden: Tensor) -> Tensor:
    """``u`` [d] with ``hidden @ u`` as close to 1 as ridge regression gets; ``hidden`` is [N, d].

    The ridge is chosen by fitting on every other row and comparing the errors on the remaining rows.
    """
    hidden = hidden.double()
    train, validation = hidden[::2], hidden[1::2]
    ridge = min(RIDGES, key=lambda ridge: ((validation @ _fit(train, ridge) - 1) ** 2).mean().item())
    return _fit(hidden, ridge)


def _fit(hidden: Tensor, ridge: float) -> Tensor:
    gram = hidden.T @ hidden / len(hidden)
    penalty = ridge * gram.trace() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    direction: Tensor = torch.linalg.solve(gram + penalty, hidden.mean(0))
    return direction


def normalize(trainer: RewardTrainer, demonstrations: list[Branches], others: list[Branches]) -> dict[str, Any]:
    """Change the head so that the scores of ``demonstrations`` have mean 0 and standard deviation 1.

    ``others`` are good and bad answers. The direction is fitted on them too, so that the shift is the same for both.

    Returns:
        What the manifest records.

    Raises:
        AlignkitError: the demonstrations all have the same score.
    """
    head = trainable_head(trainer.model)
    hidden, other_hidden = last_hidden(trainer, demonstrations).double(), last_hidden(trainer, others).double()
    with whole_weights_of(head):
        weight = full_tensor(head.weight.data)[0].double()
    mean = (hidden @ weight).mean()
    direction = constant_direction(torch.cat([hidden, other_hidden]))
    direction = direction / (hidden.mean(0) @ direction)  # the mean of the demonstrations becomes exactly 0
    shifted = weight - mean * direction
    deviation = (hidden @ shifted).std() if len(demonstrations) > 1 else hidden.new_zeros(())
    if not 1e-5 * (1 + abs(float(mean))) < float(deviation) < math.inf:
        raise AlignkitError(
            f"the score cannot be normalized: it is the same for all {len(demonstrations)} demonstrations. "
            "Normalization needs several with different scores"
        )
    with whole_weights_of(head):
        normalized = (shifted / deviation)[None].to(head.weight.dtype)
        head.weight.data.copy_(shard_like(head.weight, normalized))
    trainer.shift += trainer.scale * float(mean)
    trainer.scale *= float(deviation)
    return {
        "mean": float(mean),
        "deviation": float(deviation),
        "answers": len(demonstrations),
        "shift_error": float((mean * (other_hidden @ direction - 1) / deviation).square().mean().sqrt()),
    }


def last_hidden(trainer: RewardTrainer, answers: list[Branches]) -> Tensor:
    """The input of the head at the last token of each answer, [N, d] in fp32."""
    hidden: list[Tensor] = []
    model = trainer.accelerator.unwrap_model(trainer.model)
    hook = trainable_head(model).register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0].detach().float()))
    model.eval()
    size = trainer.args.per_device_eval_batch_size
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for start in range(0, len(answers), size):
            trainer.score(model, answers[start : start + size])
    hook.remove()
    return torch.cat(hidden)


def trainable_head(model: Any) -> Any:
    """The head that is trained. With PEFT, this is the adapter's copy of it."""
    head = (model.get_base_model() if hasattr(model, "get_base_model") else model).score
    return head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head
