"""PPO-ptx: the gradient of a next-token loss on text is mixed into every step, so that the policy forgets less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignkit import AlignkitError, ConfigError, Demonstration, Run, Text, data
from alignkit.data.chat_template import IGNORE, encode
from alignkit.data.encoding import check_fit, encode_each
from alignkit.models import Sequences
from alignkit_ppo.collect import pass_after_pass

if TYPE_CHECKING:
    from alignkit_ppo.config import PPOConfig


@dataclass(frozen=True)
class Example:
    """A text to predict: its ids from the first that is given to the last that is learnt, and which are learnt."""

    given: list[int]
    rest: list[int]
    learnt: list[bool]  # of each of `rest`


def examples(run: Run, config: PPOConfig) -> list[Example]:
    """The texts of ``ppo.ptx_data``, or the demonstrations that the policy was trained on.

    Texts over ``ppo.ptx_length`` tokens are cut into pieces of that length; demonstrations over it are left out.

    Raises:
        AlignkitError: there are none.
    """
    if config.ptx_data is None:
        rows = run.parent_rows("policy")
    else:
        source = replace(run.config.data, path=config.ptx_data, format=None, eval_path=None)
        rows = data.load(run.registry, source, config.ptx_data, (Text, Demonstration)).rows
    if not all(isinstance(row, Text | Demonstration) for _, row in rows):
        raise AlignkitError("ppo.ptx_coef: the policy was trained on no texts: set ppo.ptx_data")
    encoded = encode_each(
        run,
        rows,
        lambda row, notes: encode(run.tokenizer, row, run.stop_ids, notes),
        skip=config.ptx_data is None or run.config.data.on_bad_row == "skip",
    )
    check_fit(run, ((where, ids[: config.ptx_length]) for where, of_row in encoded for ids, _ in of_row))
    texts = {where for where, row in rows if isinstance(row, Text)}
    found, over = [], 0
    for where, of_row in encoded:
        for ids, labels in of_row:
            if where not in texts and len(ids) > config.ptx_length:
                over += 1
                continue
            for start in range(0, len(ids) - 1, config.ptx_length):
                found.append(_example(ids[start:][: config.ptx_length], labels[start:][: config.ptx_length]))
    if over:
        of = sum(len(of_row) for _, of_row in encoded)
        run.say(f"{over} of {of} demonstrations are over ppo.ptx_length={config.ptx_length}: left out")
    found = [example for example in found if any(example.learnt)]
    if not found:
        raise ConfigError("ppo.ptx_coef: there is no text to learn from: set ppo.ptx_data")
    return found


def _example(ids: list[int], labels: list[int]) -> Example:
    first = next((i for i, label in enumerate(labels) if i and label != IGNORE), len(ids))
    return Example(ids[:first], ids[first:], [label != IGNORE for label in labels[first:]])


class Pretraining:
    """Adds its gradient to a trainer's, once an optimizer step."""

    def __init__(self, trainer: Any, texts: list[Example], config: PPOConfig, pad: int) -> None:
        self.trainer, self.texts, self.config, self.pad = trainer, texts, config, pad
        self.gradients: dict[str, Tensor] = {}

    def backward(self, model: Any) -> dict[str, float]:
        """The gradient of ``ptx_coef`` times the mean loss over the target tokens of this step's texts.

        It comes before the other microbatches of the step, whose backward passes synchronise it with theirs.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        microbatches = list(self._microbatches())
        device = trainer.args.device
        tokens = accelerator.reduce(sum((learnt.sum() for _, learnt in microbatches), torch.tensor(0.0, device=device)))
        total = torch.tensor(0.0, device=device)
        for sequences, learnt in microbatches:
            with accelerator.no_sync(model), trainer.compute_loss_context_manager():
                logps = model(sequences, ("policy",), temperature=1.0)["policy"].logps
                loss = -(logps * learnt).sum() / tokens
                accelerator.backward(self.config.ptx_coef * loss * accelerator.num_processes)
            total += loss.detach()
        self.gradients = {
            n: accelerator.reduce(p.grad.clone(), "mean") for n, p in model.named_parameters() if p.grad is not None
        }
        return {"ptx_loss": float(accelerator.reduce(total)), "ptx_grad_norm": self._norm(self.gradients.values())}

    def rest_norm(self, model: Any) -> float:
        """The norm of what the other microbatches have added since."""
        added = [
            p.grad - self.gradients[n] if n in self.gradients else p.grad
            for n, p in model.named_parameters()
            if p.grad is not None
        ]
        self.gradients = {}
        return self._norm(added)

    def _norm(self, gradients: Any) -> float:
        scaler = self.trainer.accelerator.scaler  # of fp16, which scales gradients up
        norm = torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients]))
        return float(norm) / (scaler.get_scale() if scaler is not None else 1.0)

    def _microbatches(self) -> Iterator[tuple[Sequences, Tensor]]:
        args, number = self.trainer.args, self.config.ptx_batch_size
        chosen = pass_after_pass(len(self.texts), self.trainer.state.global_step * number, number, args.seed)
        mine = [self.texts[i] for i in chosen[args.process_index :: args.world_size]]
        for start in range(0, len(mine), args.per_device_train_batch_size):
            some = mine[start : start + args.per_device_train_batch_size]
            sequences = Sequences.of([e.given for e in some], [e.rest for e in some], self.pad, args.device)
            learnt = torch.zeros(sequences.mask.shape, device=args.device)
            for row, example in enumerate(some):
                learnt[row, : len(example.learnt)] = torch.tensor(example.learnt, device=args.device).float()
            yield sequences, learnt
