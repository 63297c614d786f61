"""Trackers such as TensorBoard (``train.report_to``): Transformers' callbacks, and what a run adds to them.

A run adds its name and its settings, a table of answers at each evaluation, and one tracker run from the first step to
the final evaluation, which ``--resume`` continues.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, integrations

from alignkit import yaml
from alignkit.errors import ConfigError, one_line
from alignkit.protocols import Run
from alignkit.runs import answers, manifest
from alignkit.runs.resume import TRACKERS

SHOWN = 20  # answers in a table of TensorBoard, which shows them as one text


class Session:
    """The name of a tracker run, and what it has got so far: ``trackers.json`` in the run folder."""

    def __init__(self, run: Run, args: TrainingArguments) -> None:
        self.file, self.run = run.folder / TRACKERS, run
        self.name = args.run_name or run.config.stage.component.name
        self.project = run.config.train.get("project") or run.config.folder.absolute().parent.name
        saved = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        self.id: str = saved.get("id") or secrets.token_hex(4)
        self.reported: dict[str, dict[str, int]] = saved.get("reported", {})  # tracker -> kind of log -> last step
        self.settings = {key: value for key, value in run.config.to_dict().items() if key != "stages"}
        self.settings |= run.config.to_dict()["stages"]

    def save(self) -> None:
        """Write the file."""
        manifest.write_json(self.file, {"id": self.id, "reported": self.reported})

    def flat_settings(self) -> dict[str, Any]:
        """The settings by their names on the command line, such as ``ppo.kl_coef``."""
        return dict(flat(self.settings))


class Tracker(TrainerCallback):
    """Transformers' callback of a tracker, which gets every log once, and ends when the run does.

    Trackers that cannot drop what came after a checkpoint do not get the steps again that they have.
    """

    drops = False  # whether it drops what came after the checkpoint of a resumed run

    def __init__(self, name: str, callback: Any, session: Session) -> None:
        self.name, self.callback, self.session = name, callback, session
        self.had = dict(session.reported.get(name, {}))
        self.arguments: dict[str, Any] = {}  # of the callback's events
        self.failed = False

    def open(self, args: TrainingArguments, state: TrainerState) -> None:
        """Start the tracker run, or continue it, before the callback does."""

    def describe(self) -> None:
        """Report the settings, after the callback has begun."""

    def log_answers(self, evaluation: answers.Answers) -> None:
        """Report the answers of an evaluation."""

    def end(self, failed: bool) -> None:
        """End the tracker run, after the callback has."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.arguments = {"args": args, "state": state, "control": control, "model": kwargs.get("model")}
        try:
            self.open(args, state)
            self.callback.on_train_begin(args, state, control, **kwargs)
            self.describe()
        except Exception as error:
            raise ConfigError(f"train.report_to: {self.name}: {one_line(error)}") from error

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        kind = "eval" if any(name.startswith("eval_") for name in logs or {}) else "train"
        if self._is_new(kind, state.global_step):
            with self._survived():
                self.callback.on_log(args, state, control, logs=logs, **kwargs)
                self._report(kind, state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        evaluations = answers.read(self.session.run.folder)
        if evaluations and evaluations[-1].step == state.global_step and self._is_new("answers", state.global_step):
            with self._survived():
                self.log_answers(evaluations[-1])
                self._report("answers", state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        with self._survived():
            self.callback.on_save(args, state, control, **kwargs)

    def close(self, failed: bool) -> None:
        """End the tracker run: after the final evaluation, which comes after training."""
        if self.arguments:
            with self._survived():
                self.callback.on_train_end(**self.arguments)
                self.end(failed)
            self.arguments.clear()

    def _is_new(self, kind: str, step: int) -> bool:
        return not self.failed and (self.drops or step > self.had.get(kind, -1))

    def _report(self, kind: str, step: int) -> None:
        self.session.reported.setdefault(self.name, {})[kind] = step
        self.session.save()

    @contextlib.contextmanager
    def _survived(self) -> Iterator[None]:
        """Report an error of the tracker, once: it must not end the run."""
        try:
            yield
        except Exception as error:
            self.failed = True
            self.session.run.say(f"warning: {self.name} failed, and gets no more metrics: {one_line(error)}")


class TensorBoard(Tracker):
    """Event files in the run folder, or under ``TENSORBOARD_LOGGING_DIR``."""

    drops = True

    def open(self, args: TrainingArguments, state: TrainerState) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            from tensorboardX import SummaryWriter  # type: ignore[no-redef]
        chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
        folder = Path(chosen).expanduser() / self.session.name if chosen else self.session.run.folder / "tensorboard"
        after = {"purge_step": state.global_step + 1} if state.global_step else {}
        self.callback.tb_writer = SummaryWriter(str(folder), **after)

    def describe(self) -> None:
        settings = yaml.dumps(self.session.run.config.to_dict())
        self.callback.tb_writer.add_text("config", f"```yaml\n{settings}```")

    def log_answers(self, evaluation: answers.Answers) -> None:
        self.callback.tb_writer.add_text("eval/answers", markdown(evaluation, SHOWN), evaluation.step)
        self.callback.tb_writer.flush()


class Trackio(Tracker):
    """A SQLite file in ``trackio/`` of the output folder, or the space ``train.trackio_space_id``."""

    def open(self, args: TrainingArguments, state: TrainerState) -> None:
        args.project, args.run_name = self.session.project, f"{self.session.name}-{self.session.id}"

    def describe(self) -> None:
        import trackio

        trackio.config.update(self.session.flat_settings())

    def log_answers(self, evaluation: answers.Answers) -> None:
        import trackio
        from pandas import DataFrame

        table = trackio.Table(dataframe=DataFrame(rows(evaluation)))
        trackio.log({"eval/answers": table, "train/global_step": evaluation.step})


class WandB(Tracker):
    """A run of Weights & Biases, whose files are in the run folder."""

    def open(self, args: TrainingArguments, state: TrainerState) -> None:
        import wandb

        args.run_name = self.session.name
        wandb.init(
            project=os.environ.get("WANDB_PROJECT") or self.session.project,
            name=self.session.name,
            id=self.session.id,
            resume="allow",
            dir=str(self.session.run.folder),
            config=self.session.settings,
        )

    def log_answers(self, evaluation: answers.Answers) -> None:
        import wandb

        table = rows(evaluation)
        cells = [list(row.values()) for row in table]
        wandb.log({"eval/answers": wandb.Table(list(table[0]), cells), "train/global_step": evaluation.step})

    def end(self, failed: bool) -> None:
        import wandb

        wandb.finish(exit_code=int(failed))


KINDS: Mapping[str, tuple[type[Tracker], type[Any]]] = {
    "tensorboard": (TensorBoard, integrations.TensorBoardCallback),
    "trackio": (Trackio, integrations.TrackioCallback),
    "wandb": (WandB, integrations.WandbCallback),
}


@contextlib.contextmanager
def reporting(trainer: transformers.Trainer, run: Run) -> Iterator[None]:
    """Keep the trackers of a trainer open in this context, also for evaluations after training."""
    trackers = list[Tracker]()
    if trainer.is_world_process_zero():
        session = Session(run, trainer.args)
        for name in trainer.args.report_to:
            if name in KINDS and (callback := trainer.pop_callback(KINDS[name][1])) is not None:
                trackers.append(KINDS[name][0](name, callback, session))
                trainer.add_callback(trackers[-1])
    failed = True
    try:
        yield
        failed = False
    finally:
        for tracker in trackers:
            tracker.close(failed)


def set_defaults(report_to: list[str], output: str) -> None:
    """Keep what trackers write in the output folder, and what they would send about their own use, at home.

    Variables of the environment that the user set stay. Called before the libraries are imported, which read them then.
    """
    folder = os.path.abspath(output)
    for tracker, variables in {
        "trackio": {"TRACKIO_DIR": f"{folder}/trackio", "GRADIO_ANALYTICS_ENABLED": "False"},
        "wandb": {"WANDB_ERROR_REPORTING": "false"},
    }.items():
        for name, value in variables.items() if tracker in report_to else ():
            os.environ.setdefault(name, value)


def rows(evaluation: answers.Answers) -> list[dict[str, Any]]:
    """A row for each answer."""
    texts = {"prompt": evaluation.prompts, "answer": evaluation.answers}
    columns: dict[str, list[Any]] = {**texts, **evaluation.columns}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def markdown(evaluation: answers.Answers, limit: int) -> str:
    """The first answers as a table."""
    table = rows(evaluation)[:limit]
    lines = [list(table[0]), ["---"] * len(table[0]), *([_cell(value) for value in row.values()] for row in table)]
    left_out = len(evaluation.answers) - len(table)
    more = f"\n\n{left_out} more are in {answers.FILE}" if left_out else ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + more


def _cell(value: Any) -> str:
    """Text as it is: a policy may write Markdown and HTML."""
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"([\\`*_{}\[\]#|])", r"\\\1", html.escape(text, quote=False)).replace("\n", "<br>")


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
