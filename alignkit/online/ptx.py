"""PPO-ptx: the gradient of a next-token loss on text is mixed into every step, so that the policy forgets less."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignkit import data
from alignkit.data import held_out
from alignkit.data.chat_template import IGNORE
from alignkit.data.encoding import Fit, encode_rows
from alignkit.data.row_encoders import SequenceEncoder
from alignkit.data.spool import Mapped
from alignkit.errors import AlignkitError, ConfigError
from alignkit.models import Sequences, full_tensor
from alignkit.models.sharded import is_sharded
from alignkit.online.config import OnlineConfig
from alignkit.online.roles_trainer import RolesTrainer
from alignkit.online.seeds import shuffled_passes
from alignkit.protocols import Run
from alignkit.rows import Demonstration, Text


@dataclass(frozen=True)
class PtxText:
    """A text to predict, as token ids up to its last target token."""

    context: list[int]  # before the first target token
    targets: list[int]  # from the first target token on
    target_mask: list[bool]  # which of ``targets`` are trained on


def encode_texts(run: Run) -> Sequence[PtxText]:
    """The texts of ``ptx_data``, or else the demonstrations that the policy was trained on.

    Texts over ``ptx_length`` tokens are split into pieces of that length; longer demonstrations are left out.

    Raises:
        AlignkitError: there are none.
    """
    table, config = run.config.stage.component.name, run.config.stage.config
    if config.ptx_data is None:
        rows = run.parent_rows("policy")
    else:
        source = replace(run.config.data, path=config.ptx_data, format=None, eval_path=None)
        texts_and_demonstrations = data.load(run.registry, source, config.ptx_data, (Text, Demonstration))
        rows = held_out.split(texts_and_demonstrations, 0, source.seed).train
    if not all(isinstance(row, Text | Demonstration) for _, row in rows):
        raise AlignkitError(
            f"{table}.ptx_coef: the policy's training data contains no texts or demonstrations. Set {table}.ptx_data"
        )
    no_text = ConfigError(f"{table}.ptx_coef: there is no text to train on. Set {table}.ptx_data")
    if not rows:
        raise no_text
    encoder = SequenceEncoder(run.tokenizer, run.stop_ids, max_length=sys.maxsize, cut=False)
    encoded = encode_rows(run, rows, encoder, skip=config.ptx_data is None or run.config.data.on_bad_row == "skip")
    fit, parts, too_long = Fit(run), list[tuple[int, int]](), 0  # a part of a sequence: its record, and where it starts
    for record in encoded.good():
        where, row = encoded.located(record)
        ids, labels = encoded.ids("input_ids", record), encoded.ids("labels", record)
        fit.add(where, ids[: config.ptx_length])
        if len(ids) > config.ptx_length and not isinstance(row, Text):
            too_long += 1
            continue
        for start in range(0, len(ids) - 1, config.ptx_length):
            if any(label != IGNORE for label in labels[start + 1 : start + config.ptx_length]):
                parts.append((record, start))
    fit.check()
    if too_long:
        total = len(encoded.good())
        run.say(f"{too_long} of {total} demonstrations are over {table}.ptx_length={config.ptx_length}: left out")
    if not parts:
        raise no_text

    def read(part: tuple[int, int]) -> PtxText:
        record, start = part
        end = start + config.ptx_length
        return _ptx_text(encoded.ids("input_ids", record)[start:end], encoded.ids("labels", record)[start:end])

    return Mapped(read, parts)


def _ptx_text(ids: list[int], labels: list[int]) -> PtxText:
    first = next((i for i, label in enumerate(labels) if i and label != IGNORE), len(ids))
    return PtxText(ids[:first], ids[first:], [label != IGNORE for label in labels[first:]])


class PtxGradient:
    """Adds the gradient of a next-token loss to that of a trainer, once per optimizer step (step 10)."""

    def __init__(self, trainer: RolesTrainer, config: OnlineConfig, texts: Sequence[PtxText], pad: int) -> None:
        self.trainer, self.config, self.texts, self.pad = trainer, config, texts, pad
        self.gradients: dict[str, Tensor] = {}

    def backward(self, model: Any) -> dict[str, float]:
        """Add the gradient of ``ptx_coef`` times the mean loss over the target tokens of this step's texts.

        It comes before the other microbatches of the step, whose backward passes synchronize it with theirs.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        microbatches = list(self._microbatches())
        device = trainer.args.device
        tokens = accelerator.reduce(sum((mask.sum() for _, mask in microbatches), torch.tensor(0.0, device=device)))
        total = torch.tensor(0.0, device=device)
        for sequences, mask in microbatches:
            with accelerator.no_sync(model), trainer.compute_loss_context_manager():
                logps = model(sequences, ("policy",), temperature=1.0)["policy"].logps
                loss = -(logps * mask).sum() / tokens
                accelerator.backward(self.config.ptx_coef * loss * accelerator.num_processes)
            total += loss.detach()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        is_mean = is_sharded(model)  # of all processes, which backward passes of a sharded model compute
        self.gradients = gradients if is_mean else {n: accelerator.reduce(g, "mean") for n, g in gradients.items()}
        return {"ptx_loss": float(accelerator.reduce(total)), "ptx_grad_norm": self._norm(self.gradients.values())}

    def other_norm(self, model: Any) -> float:
        """The norm of what the other microbatches of the step have added since :meth:`backward`."""
        added = [
            p.grad - self.gradients[n] if n in self.gradients else p.grad
            for n, p in model.named_parameters()
            if p.grad is not None
        ]
        self.gradients = {}
        return self._norm(added)

    def _norm(self, gradients: Any) -> float:
        scaler = self.trainer.accelerator.scaler  # of fp16, which scales gradients up
        norm = torch.linalg.vector_norm(torch.stack([full_tensor(g.float().norm()) for g in gradients]))
        return float(norm) / (scaler.get_scale() if scaler is not None else 1.0)

    def _microbatches(self) -> Iterator[tuple[Sequences, Tensor]]:
        """This process's texts of the step, with the mask [B, A] of their target tokens."""
        args, number = self.trainer.args, self.config.ptx_batch_size
        indices = shuffled_passes(len(self.texts), self.trainer.state.global_step * number, number, args.seed)
        of_process = [self.texts[i] for i in indices[args.process_index :: args.world_size]]
        for start in range(0, len(of_process), args.per_device_train_batch_size):
            texts = of_process[start : start + args.per_device_train_batch_size]
            sequences = Sequences.of([t.context for t in texts], [t.targets for t in texts], self.pad, args.device)
            mask = torch.zeros(sequences.mask.shape, device=args.device)
            for row, text in enumerate(texts):
                mask[row, : len(text.target_mask)] = torch.tensor(text.target_mask, device=args.device).float()
            yield sequences, mask
