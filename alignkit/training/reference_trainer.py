"""The base of stages on TRL's trainers that compare a policy with a reference, such as DPO and KTO.

Batches, loss and metrics are the stage's; what they share is here: the reference in the form that needs least memory, a
loss that is a mean over the rows of a whole step, means of metrics, evaluation, and what is saved.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import transformers
from torch import Tensor

from alignkit.batches import LossOutput, PreferenceLogps
from alignkit.errors import ConfigError
from alignkit.models import (
    Reference,
    adapter_on_head,
    check_base_frozen,
    copy_adapter,
    disable_gradient_checkpointing,
    install_fused_head,
    kept_dtypes,
    reference_of,
    use_adapter,
    uses_fused_head,
    without_dropout,
)
from alignkit.protocols import Run
from alignkit.training.meters import Means, RowMetrics, counted_rows, last_logged

Args = TypeVar("Args", bound=transformers.TrainingArguments)


def reference_arguments(run: Run, cls: type[Args], **own: Any) -> Args:
    """The training arguments of a :class:`ReferenceTrainer`: ``cls`` is one of TRL's, ``own`` are the stage's values.

    Raises:
        ConfigError: the reference is precomputed in several processes.
    """
    if run.config.stage.config.precompute_ref_log_probs and run.processes > 1:
        raise ConfigError(
            f"{run.config.stage.component.name}.precompute_ref_log_probs needs a single process. Set it to false, or "
            "train in one process"
        )
    return run.training_arguments(
        cls,
        max_length=None,  # the stage refuses or leaves out long answers; TRL would truncate them
        precompute_ref_batch_size=run.config.train["per_device_eval_batch_size"],
        remove_unused_columns=False,
        **own,
    )


def load_with_reference(run: Run, args: Any) -> dict[str, Any]:
    """The arguments ``model``, ``ref_model`` and ``reference`` of a :class:`ReferenceTrainer`.

    ``args.precompute_ref_log_probs`` is set so that TRL loads no model of its own.
    """
    policy: Any = without_dropout(run.model("policy"))
    full = not hasattr(policy, "peft_config")
    started = "policy" in run.records and run.records["policy"]["weights"] == "adapter"
    reference = reference_of(run.config, adapters=not full, started=started)
    if reference.kind in ("adapter", "base"):
        check_base_frozen(policy)
    args.precompute_ref_log_probs = reference.precomputed or (full and reference.kind == "none")
    ref_model = copy.deepcopy(policy).requires_grad_(False).eval() if reference.kind == "model" else None
    return {"model": policy, "ref_model": ref_model, "reference": reference}


class ReferenceTrainer(transformers.Trainer):
    """The first base of a trainer whose second base is TRL's: ``class DPOTrainer(ReferenceTrainer, trl.DPOTrainer)``.

    A subclass writes ``compute_loss``, :meth:`answer_batch`, :meth:`answer_logps` and :meth:`held_out_metrics`.
    """

    loss_is_scaled_for_ga = True  # the loss is divided by the rows of the whole optimizer step
    row: ClassVar[str]  # the tensor of a batch with an entry for each row

    def __init__(
        self,
        *,
        run: Run,
        loss: Callable[[Any], LossOutput],
        reference: Reference,
        evaluate_answers: Callable[[Any], dict[str, float]],
        optimizer_cls_and_kwargs: Any,
        **kwargs: Any,
    ) -> None:
        self.loss, self.reference, self.evaluate_answers = loss, reference, evaluate_answers
        self.beta_of_rewards = getattr(run.config.loss.config, "beta", 1.0)
        model = kwargs["model"]
        for each in (model, kwargs["ref_model"]):
            if each is not None:
                install_fused_head(each)
        with adapter_on_head(), kept_dtypes(model) as self._restore_dtypes:
            super().__init__(**kwargs)
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.means = Means(self.accelerator)  # over the rows since the last log
        self.held_out = RowMetrics(self.accelerator)  # the rows of an evaluation
        self.answer_metrics: dict[str, float] = {}  # of the same evaluation
        if "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")  # TRL's copy, which lacks adapters of embeddings
        if reference.kind == "adapter":
            copy_adapter(model, "default", "ref", trained=False)
            without_dropout(model)
        if reference.kind == "model" and not self.is_deepspeed_enabled:
            uses_fused_head(self.ref_model)  # measures it, which a sharded model does not allow

    # --- what a stage writes -----------------------------------------------------------------------------------------

    def answer_batch(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> dict[str, Tensor]:
        """N prompts with an answer each, all token ids, as input of :meth:`answer_logps`."""
        raise NotImplementedError

    def answer_logps(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The log-probability of each answer of a batch, summed over its tokens, [N]."""
        raise NotImplementedError

    def held_out_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """The metrics of an evaluation, from what :attr:`held_out` got of each of its rows."""
        raise NotImplementedError

    def training_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """The metrics to log, from :attr:`means`."""
        return means

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        """The dataset as it is: it holds token ids already."""
        return dataset

    # --- one optimizer step ------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The microbatches of a step, and the number of their rows on all processes: the loss is a mean over rows."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = torch.tensor(sum(len(batch[self.row]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(rows)

    def share_of_step(self, loss: Tensor, rows: int, rows_of_step: Any, aux_loss: Tensor | None) -> Tensor:
        """The mean loss of a microbatch as its share of the step's, with the load-balancing loss of experts."""
        loss = loss * rows / rows_of_step * self.accelerator.num_processes  # DDP averages over processes
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / self.current_gradient_accumulation_steps
        return loss

    def counted(self, batch: PreferenceLogps) -> PreferenceLogps:
        """A batch for the loss: in an evaluation without the rows that are repeated to fill it; at least one."""
        if self.model.training:
            return batch
        of_rows = {name: value for name, value in vars(batch).items() if value is not None and value.dim()}
        rows = max(counted_rows(self.accelerator, len(next(iter(of_rows.values())))), 1)
        return dataclasses.replace(batch, **{name: value[:rows] for name, value in of_rows.items()})

    # --- the reference -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def without_gradients(self) -> Iterator[None]:
        """A context for forward passes whose results need no gradients."""
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            yield

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The model that computes as the reference inside this context, without gradients."""
        with self.without_gradients():
            if self.reference.kind == "model":
                yield self.ref_model
            else:
                adapter = "ref" if self.reference.kind == "adapter" else None
                with use_adapter(self.accelerator.unwrap_model(self.model), adapter):
                    yield self.model

    def log_ratios(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
        """log(policy / reference) of answers as token ids; empty without a reference in memory."""
        if self.reference.kind == "none":
            return []
        policy = self.accelerator.unwrap_model(self.model)
        batch = {name: tensor.to(policy.device) for name, tensor in self.answer_batch(prompts, answers).items()}
        logps = self.answer_logps(policy, batch)
        with self.as_reference() as reference:
            ratios: list[float] = (logps - self.answer_logps(reference, batch)).tolist()
        return ratios

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The dataset with reference log-probabilities, if they are computed ahead. TRL's ``__init__`` calls it."""
        if not self.reference.precomputed:
            return dataset
        self._restore_dtypes()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    # --- evaluation and logging --------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics of the held-out rows, and of answers that the policy samples to their prompts."""
        self.held_out.take()  # leftovers of an evaluation that was interrupted
        self.answer_metrics = self.evaluate_answers(self)
        evaluated: dict[str, float] = super().evaluate(*args, **kwargs)
        return evaluated

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add means over the rows of all microbatches and processes to what the Trainer logs."""
        if any(name.startswith("eval_") for name in logs):
            rows = self.held_out.take()
            logs.update({**self.held_out_metrics(rows), **self.answer_metrics} if rows else {})
        elif "loss" in logs:
            means = self.training_metrics(self.means.take())
            logs.update({**means, "num_tokens": int(means["num_tokens"] + last_logged(self.state, "num_tokens"))})
        super().log(logs, start_time)

    # --- saving ------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the policy only: the reference is the run that it started from."""
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / "ref", ignore_errors=True)


def loss_metrics(output: LossOutput, rows: Tensor) -> dict[str, Tensor]:
    """The loss and the metrics of a loss, which are means over a batch, for each of its ``rows`` [B]."""
    return {name: _for_each(value, rows) for name, value in {"loss": output.loss, **output.metrics}.items()}


def _for_each(value: Tensor | float, rows: Tensor) -> Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().to(rows.device, torch.float32, non_blocking=True).reshape(()).expand(len(rows))
    return torch.full((len(rows),), float(value), device=rows.device)
