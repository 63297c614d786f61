"""A stage: fine-tuning on demonstrations with a plain ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from alignkit import Demonstration, Located, Run, Stage, TokenLogps, hookimpl, option

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass(frozen=True)
class Config:
    """The ``my-thing`` table."""

    max_length: Annotated[int, Gt(0)] = option(1024, "maximum tokens of prompt and response; longer rows are truncated")


def build(run: Run) -> Trainer:
    """Build a trainer from what the run offers. The stage does not know which tuner, loss or optimizer is used."""
    import transformers

    from alignkit.data import IGNORE, encode, encode_each

    config: Config = run.config.stage.config
    loss_function = run.loss()

    def tokenize(rows: Sequence[Located]) -> list[dict[str, list[int]]]:
        encoded = encode_each(run, rows, lambda row, notes: encode(run.tokenizer, row, run.stop_ids, notes))
        return [
            {"input_ids": ids[: config.max_length], "labels": labels[: config.max_length]}
            for _, sequences in encoded
            for ids, labels in sequences  # several if the chat template rewrites earlier turns
        ]

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        targets = labels[:, 1:]  # [B, T]
        mask = targets != IGNORE
        logps = outputs.logits[:, :-1].float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        num_tokens = mask.sum() if num_items_in_batch is None else num_items_in_batch  # None in an evaluation
        return loss_function(TokenLogps(logps * mask, mask, num_tokens)).loss

    args = run.training_arguments(transformers.TrainingArguments)
    return transformers.Trainer(
        model=run.model("policy"),
        args=args,
        train_dataset=tokenize(run.train_rows),
        eval_dataset=tokenize(run.eval_rows) or None,
        data_collator=transformers.DataCollatorForSeq2Seq(run.tokenizer),
        processing_class=run.tokenizer,
        compute_loss_func=loss,
        callbacks=run.callbacks(),
        optimizer_cls_and_kwargs=run.optimizer(args),
    )


@hookimpl
def alignkit_stage() -> list[Stage]:
    return [
        Stage(
            name="my-thing",
            summary="fine-tuning on demonstrations",
            config=Config,
            build=build,
            rows=(Demonstration,),
            batch=TokenLogps,
            loss="nll",
            data="bundled:demonstrations",
            train={"learning_rate": 2e-5, "num_train_epochs": 1, "eval_strategy": "epoch", "eval_on_start": True},
        )
    ]
