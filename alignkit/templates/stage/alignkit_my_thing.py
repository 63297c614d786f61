"""A stage: fine-tuning on demonstrations with a plain ``transformers.Trainer``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from alignkit import Demonstration, Stage, TokenLogps, hookimpl, option

if TYPE_CHECKING:
    from transformers import Trainer

    from alignkit.data import Located
    from alignkit.training.run import Run


@dataclass(frozen=True)
class Config:
    """The ``my-thing`` table."""

    max_length: Annotated[int, Gt(0)] = option(1024, "maximum tokens of prompt and response; longer rows are truncated")


def build(run: Run) -> Trainer:
    """A trainer from the run's pieces. Which tuner, loss or optimizer they are made with is not its business."""
    import transformers

    from alignkit.data.chat_template import IGNORE, encode
    from alignkit.data.encoding import encode_each

    config: Config = run.config.stage.config
    loss_of_batch = run.loss()

    def tokens(rows: list[Located]) -> list[dict[str, list[int]]]:
        encoded = encode_each(run, rows, lambda row, notes: encode(run.tokenizer, row, run.stop_ids, notes))
        return [
            {"input_ids": ids[: config.max_length], "labels": labels[: config.max_length]}
            for _, sequences in encoded
            for ids, labels in sequences  # several where the chat template rewrites earlier turns
        ]

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        targets = labels[:, 1:]  # [B, T]
        mask = targets != IGNORE
        logps = outputs.logits[:, :-1].float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        in_step = mask.sum() if num_items_in_batch is None else num_items_in_batch  # None: it evaluates
        return loss_of_batch(TokenLogps(logps * mask, mask, in_step)).loss

    args = run.training_arguments(transformers.TrainingArguments)
    return transformers.Trainer(
        model=run.model("policy"),
        args=args,
        train_dataset=tokens(run.train_rows),
        eval_dataset=tokens(run.eval_rows) or None,
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
