"""Base of the trainers of stages that put several roles on one trunk: what is saved, and exact resume.

A stage derives from :class:`RolesTrainer` and writes its own ``compute_loss``. Saving and loading are then done. What
the stage keeps beside the trained weights it hands over in :meth:`RolesTrainer.checkpoint_tensors` and
:meth:`RolesTrainer.checkpoint_state`, and gets back in :meth:`RolesTrainer.load_checkpoint`. Importing this module
imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import transformers
from torch import Tensor

from alignkit.errors import UnavailableError
from alignkit.models import Roles, full_tensor, trained_weights
from alignkit.protocols import Run
from alignkit.runs.resume import TRAINED_WEIGHTS


class RolesTrainer(transformers.Trainer):
    """``transformers.Trainer`` for a model that is a :class:`alignkit.models.Roles`.

    A checkpoint holds every weight that is trained, whatever role it belongs to. The run folder holds the policy alone,
    as plain PEFT or Transformers opens it, and the tokenizer.
    """

    def __init__(self, *, run: Run, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run = run
        self.unavailable: UnavailableError | None = None  # what stopped the run
        self.evaluation_failed = False  # whether it was in an evaluation

    @property
    def roles(self) -> Roles:
        """The module that is trained, unwrapped from DDP and the like."""
        if isinstance(self.model, Roles):  # unwrapping goes through all modules
            return self.model
        unwrapped: Roles = self.accelerator.unwrap_model(self.model)
        return unwrapped

    def checkpoint_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Groups of named tensors to keep in a checkpoint beside the trained weights, such as an average of them."""
        return {}

    def checkpoint_state(self) -> Mapping[str, Any]:
        """Further values to keep in a checkpoint, as JSON."""
        return {}

    def load_checkpoint(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Take back what :meth:`checkpoint_tensors` and :meth:`checkpoint_state` gave; tensors are on the CPU."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as the Trainer does.

        Raises:
            UnavailableError: :meth:`stop_with_checkpoint` was called; the run can be resumed.
        """
        result = super().train(*args, **kwargs)
        if self.unavailable:
            raise UnavailableError(
                f"{self.unavailable}. The run has a checkpoint of step {self.state.global_step}: to continue, add "
                "--resume to the same command"
            )
        return result

    def stop_with_checkpoint(self, error: UnavailableError, evaluating: bool = False) -> None:
        """Save a checkpoint of the last complete step and stop; raise the error if there is no such step.

        With ``evaluating``, a resumed run begins with the evaluation that failed.
        """
        if not (self.is_in_train and self.state.global_step):
            raise error
        self.unavailable, self.evaluation_failed = error, evaluating
        self.control.should_save = self.control.should_training_stop = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint (``_internal_call``, as the Trainer calls it) or the finished policy."""
        groups = {
            group: {name: full_tensor(tensor) for name, tensor in named.items()}
            for group, named in (self.checkpoint_tensors().items() if _internal_call else ())
        }
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if not _internal_call:
            self.roles.save_policy(folder)
            self.run.tokenizer.save_pretrained(folder)
            return
        tensors: dict[str, Tensor] = {n: p for n, p in self.roles.named_parameters() if p.requires_grad}
        for group, named in groups.items():
            tensors |= {f"{group}/{name}": tensor for name, tensor in named.items()}
        saved = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(saved, folder / TRAINED_WEIGHTS)
        state = {**self.checkpoint_state(), "evaluation_failed": self.evaluation_failed}
        (folder / self._state_file).write_text(json.dumps(state), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        groups = trained_weights.read(folder)
        self.roles.load_weights(groups.pop(""))
        state = json.loads((folder / self._state_file).read_text(encoding="utf-8"))
        self.args.eval_on_start = state.get("evaluation_failed", False)
        self.load_checkpoint(groups, state)

    @property
    def _state_file(self) -> str:
        return f"{self.run.config.stage.component.name}.json"
