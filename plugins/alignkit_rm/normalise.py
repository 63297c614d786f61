"""Mean 0 and deviation 1 on the demonstrations, written into the head itself.

InstructGPT adds a bias to the reward so that demonstrations average 0. Transformers' heads for sequence classification
have no bias, and a number kept beside the model would be forgotten by whoever loads it with plain Transformers. So the
shift goes into the weights: in a trunk's last hidden states there is a direction ``u`` with ``u . h`` close to 1 for
every answer (their mean is far from zero), and taking ``mean * u`` off the head lowers every score by about the mean.
On the demonstrations the mean is then exactly 0. By how much the shift differs from answer to answer is recorded
(``shift_error``, in deviations of the score); the held-out figures are those of the model as it is delivered.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignkit import AlignkitError

if TYPE_CHECKING:
    from alignkit.data import Branches
    from alignkit_rm.trainer import RewardTrainer

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # times the hidden states' mean square; the best is picked


def constant_direction(hidden: Tensor) -> Tensor:
    """``u`` [d] with ``hidden @ u`` as close to 1 as ridge regression gets; ``hidden`` is [N, d].

    The ridge is the one that, fitted on every other row, does best on the rows between.
    """
    hidden = hidden.double()
    fitted, between = hidden[::2], hidden[1::2]
    ridge = min(RIDGES, key=lambda ridge: ((between @ _fit(fitted, ridge) - 1) ** 2).mean().item())
    return _fit(hidden, ridge)


def _fit(hidden: Tensor, ridge: float) -> Tensor:
    gram = hidden.T @ hidden / len(hidden)
    penalty = ridge * gram.trace() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    direction: Tensor = torch.linalg.solve(gram + penalty, hidden.mean(0))
    return direction


def normalise(trainer: RewardTrainer, demonstrations: list[Branches], others: list[Branches]) -> dict[str, Any]:
    """Change the head so that ``demonstrations`` score 0 on average with deviation 1; says what was done.

    ``others`` are answers good and bad, which the shift shall not set against each other.
    """
    head = trainable_head(trainer.model)
    hidden, apart = last_hidden(trainer, demonstrations).double(), last_hidden(trainer, others).double()
    weight = head.weight.data[0].double()
    mean = (hidden @ weight).mean()
    direction = constant_direction(torch.cat([hidden, apart]))
    direction = direction / (hidden.mean(0) @ direction)  # so that the mean is met exactly
    shifted = weight - mean * direction
    deviation = (hidden @ shifted).std() if len(demonstrations) > 1 else hidden.new_zeros(())
    if not 1e-5 * (1 + abs(float(mean))) < float(deviation) < math.inf:
        raise AlignkitError(
            f"the score cannot be normalised: it is the same for all {len(demonstrations)} demonstrations. It takes "
            "several that differ"
        )
    head.weight.data[0] = (shifted / deviation).to(head.weight.dtype)
    trainer.scale *= float(deviation)
    return {
        "mean": float(mean),
        "deviation": float(deviation),
        "answers": len(demonstrations),
        "shift_error": float((mean * (apart @ direction - 1) / deviation).square().mean().sqrt()),
    }


def last_hidden(trainer: RewardTrainer, answers: list[Branches]) -> Tensor:
    """What the head sees at the end of each answer, [N, d] in fp32."""
    seen: list[Tensor] = []
    model = trainer.accelerator.unwrap_model(trainer.model)
    hook = trainable_head(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float()))
    model.eval()
    size = trainer.args.per_device_eval_batch_size
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for start in range(0, len(answers), size):
            trainer.score(model, answers[start : start + size])
    hook.remove()
    return torch.cat(seen)


def trainable_head(model: Any) -> Any:
    """The head that is trained: under PEFT, the adapter's copy of it."""
    head = (model.get_base_model() if hasattr(model, "get_base_model") else model).score
    return head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head
