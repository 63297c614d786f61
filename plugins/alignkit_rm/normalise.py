"""Mean 0 and deviation 1 on the demonstrations, written into the head itself.

InstructGPT adds a bias to the reward so that demonstrations average 0. Transformers' heads for sequence classification
have no bias, and a number kept beside the model would be forgotten by whoever loads it with plain Transformers. So the
shift goes into the weights: in a trunk's last hidden states there is a direction ``u`` with ``u . h`` close to 1 for
every answer (their mean is far from zero), and taking ``mean * u`` off the head lowers every score by about the mean.
On the demonstrations the mean is then exactly 0. What the shift is not exact by elsewhere is measured and recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from alignkit.branches import Branches
    from alignkit_rm.trainer import RewardTrainer

RIDGE = 1e-3  # of the hidden states' mean square


def constant_direction(hidden: Tensor) -> Tensor:
    """``u`` [d] with ``hidden @ u`` close to 1, by ridge regression, and exactly 1 on average; hidden is [N, d]."""
    hidden = hidden.double()
    gram = hidden.T @ hidden / len(hidden)
    ridge = RIDGE * gram.trace() * torch.eye(len(gram), dtype=torch.double, device=hidden.device)
    direction = torch.linalg.solve(gram + ridge, hidden.mean(0))
    return direction / (hidden.mean(0) @ direction)


def normalise(trainer: RewardTrainer, demonstrations: list[Branches]) -> dict[str, Any]:
    """Change the head so that ``demonstrations`` score 0 on average with deviation 1; says what was done."""
    hidden = last_hidden(trainer, demonstrations)
    head = trainable_head(trainer.model)
    weight = head.weight.data[0]
    scores = hidden.double() @ weight.double()
    mean, deviation = scores.mean(), scores.std()
    direction = constant_direction(hidden)
    head.weight.data[0] = ((weight.double() - mean * direction) / deviation).to(weight.dtype)
    trainer.scale *= float(deviation)
    return {
        "mean": float(mean),
        "deviation": float(deviation),
        "answers": len(demonstrations),
        "shift_error": float((mean * (hidden.double() @ direction - 1) / deviation).std()),
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
