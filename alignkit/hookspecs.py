"""The whole extension surface of alignkit, on one page.

A plugin is a module (or any object) named by an entry point in the group ``alignkit``. It implements some of these
hooks with ``@alignkit.hookimpl``. Every example below is a complete plugin and runs as it is.

**Declaration hooks** come first. The registry calls each once, when it activates the plugin. They take nothing, return
a list of components and must not import torch: whatever needs torch is imported inside a component's functions.
Components are chosen by name, never by order; two active plugins that give the same name are an error.

**Run hooks** come second. ``alignkit.training`` calls them at fixed points of a run and never inside a training
step, in the order in which the plugins were named (``alignkit_load_model`` from the last to the first, so that the last
wins)::

    alignkit_run_start                     the data are read, nothing is loaded
      alignkit_load_model                  once a role
      alignkit_model_ready                 once a role, after the tuner
      alignkit_callbacks                   before the trainer is built
        ... training ...
    alignkit_run_end                       the run folder is complete
    alignkit_run_failed                    in its place, where an error ended the run
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pluggy

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, TrainerCallback

    from alignkit.components import DataFormat, Loss, Optimizer, Reward, Rollout, Stage, Tuner
    from alignkit.protocols import Result, Run

hookspec = pluggy.HookspecMarker("alignkit")
_hookimpl = pluggy.HookimplMarker("alignkit")


class _Model(Protocol):  # what is known of a model and of a callback where a type checker does not follow torch
    def named_parameters(self) -> Any: ...


class _Callback(Protocol):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...


Hook = TypeVar(
    "Hook",
    bound="Callable[..., Sequence[Stage] | Sequence[Tuner] | Sequence[DataFormat] | Sequence[Loss] | "
    "Sequence[Optimizer] | Sequence[Reward] | Sequence[Rollout] | Sequence[_Callback] | _Model | None]",
)


def hookimpl(function: Hook) -> Hook:
    """Mark a function as the implementation of the hook that has its name; type checkers see what hooks give."""
    return _hookimpl(function)


# --- declaration hooks: called once, on activation -------------------------------------------------------------------


@hookspec
def alignkit_stage() -> list[Stage]:  # type: ignore[empty-body]
    """Declare stages: kinds of training. ``build`` gives a ``transformers.Trainer``; it runs after the data are read.

    ::

        from alignkit import Demonstration, Stage, TokenLogps, hookimpl

        def build(run):
            from alignkit_sft import build as build_sft
            trainer = build_sft(run)
            print("training on", len(run.train_rows), "demonstrations")
            return trainer

        @hookimpl
        def alignkit_stage():
            from alignkit_sft import SFTConfig
            return [Stage(name="loud-sft", summary="SFT that says what it trains on", build=build, config=SFTConfig,
                          rows=(Demonstration,), batch=TokenLogps, loss="nll", data="bundled:demonstrations")]
    """


@hookspec
def alignkit_model() -> list[Tuner]:  # type: ignore[empty-body]
    """Declare tuners: how a model is made trainable. ``load`` and ``wrap`` run when a role's model is loaded.

    ::

        from alignkit import Tuner, hookimpl

        def only_the_last_layer(config, model, role):
            model.requires_grad_(False)
            model.base_model.layers[-1].requires_grad_(True)
            return model

        @hookimpl
        def alignkit_model():
            return [Tuner(name="last-layer", summary="train the last layer only",
                          load=lambda config, dtype: {}, wrap=only_the_last_layer)]
    """


@hookspec
def alignkit_data() -> list[DataFormat]:  # type: ignore[empty-body]
    """Declare data formats. ``fits`` sees a file's first rows; ``convert`` sees every row, before anything loads.

    ``convert`` gives a row, or a list of rows where one raw row means several. A format with a config gets it as the
    second argument: ``convert(row, config)``.

    ::

        from alignkit import DataFormat, Demonstration, fields_of, hookimpl

        def convert(row):
            return Demonstration([{"role": "user", "content": row["question"]},
                                  {"role": "assistant", "content": row["best_answer"]}])

        @hookimpl
        def alignkit_data():
            return [DataFormat(name="quiz", summary="question, best_answer",
                               fits=fields_of("question", "best_answer"), convert=convert)]
    """


@hookspec
def alignkit_loss() -> list[Loss]:  # type: ignore[empty-body]
    """Declare losses: pure functions of a batch type. A loss fits every stage that gives its batch type.

    ::

        from alignkit import Loss, LossOutput, TokenLogps, hookimpl

        def build(config):
            def focal(batch):
                nll = -batch.logps
                return LossOutput(((1 - batch.logps.exp()) * nll * batch.mask).sum() / batch.num_tokens)
            return focal

        @hookimpl
        def alignkit_loss():
            return [Loss(name="focal", summary="hard tokens count more", batch=TokenLogps, build=build)]
    """


@hookspec
def alignkit_optimizer() -> list[Optimizer]:  # type: ignore[empty-body]
    """Declare optimizers. ``build`` runs when the trainer is built; the Trainer makes the parameter groups.

    ::

        from alignkit import Optimizer, hookimpl

        def build(config, args):
            import torch
            return torch.optim.SGD, {"lr": args.learning_rate, "momentum": 0.9}

        @hookimpl
        def alignkit_optimizer():
            return [Optimizer(name="sgd", summary="SGD with momentum", build=build)]
    """


@hookspec
def alignkit_reward() -> list[Reward]:  # type: ignore[empty-body]
    """Declare rewards: functions of prompts and answers. A stage that samples calls them after each sampling.

    ::

        from alignkit import Reward, hookimpl

        def build(config, run):
            def brevity(answers):
                return [-len(text.split()) / 100 for text in answers.texts]
            return brevity

        @hookimpl
        def alignkit_reward():
            return [Reward(name="brevity", summary="shorter is better", build=build)]
    """


@hookspec
def alignkit_rollout() -> list[Rollout]:  # type: ignore[empty-body]
    """Declare rollout engines: how a stage that samples gets answers (token ids) from its policy.

    ::

        from alignkit import Rollout, hookimpl

        def build(config, tokenizer, sampling):
            def one_by_one(policy, prompts):
                from alignkit.generation import sample
                return [answer for ids in prompts for answer in sample(policy, tokenizer, [ids], sampling)]
            return one_by_one

        @hookimpl
        def alignkit_rollout():
            return [Rollout(name="one-by-one", summary="no batching, no padding", build=build)]
    """


# --- run hooks: called by alignkit.training --------------------------------------------------------------------------


@hookspec
def alignkit_run_start(run: Run) -> None:
    """Called once a run, after its data are read and before its model is loaded.

    ::

        from alignkit import hookimpl

        @hookimpl
        def alignkit_run_start(run):
            print("rows:", len(run.train_rows))
    """


@hookspec(firstresult=True)
def alignkit_load_model(run: Run, role: str, name_or_path: str, kwargs: dict[str, Any]) -> PreTrainedModel | None:
    """Load the base model of a role. The last named plugin that returns one wins; else it is ``from_pretrained``.

    ``name_or_path`` is the hub id or the folder that this role starts from: a value may start from another run than the
    policy. ``kwargs`` are those of ``from_pretrained``: the dtype, and what the tuner's ``load`` asked for. The roles
    ``value`` and ``reward`` need a scalar head.

    ::

        from alignkit import hookimpl

        @hookimpl
        def alignkit_load_model(role, name_or_path, kwargs):
            from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
            if role in ("value", "reward"):
                return AutoModelForSequenceClassification.from_pretrained(
                    name_or_path, num_labels=1, attn_implementation="eager", **kwargs)
            return AutoModelForCausalLM.from_pretrained(name_or_path, attn_implementation="eager", **kwargs)
    """


@hookspec
def alignkit_model_ready(run: Run, role: str, model: nn.Module) -> None:
    """Called once a role, when its model is loaded and the tuner has made it trainable.

    ::

        from alignkit import hookimpl

        @hookimpl
        def alignkit_model_ready(run, role, model):
            print(role, sum(p.numel() for p in model.parameters() if p.requires_grad), "trainable parameters")
    """


@hookspec
def alignkit_callbacks(run: Run) -> list[TrainerCallback]:  # type: ignore[empty-body]
    """Called once a run, before its trainer is built: callbacks for ``transformers.Trainer``, in any number.

    ::

        from alignkit import hookimpl

        @hookimpl
        def alignkit_callbacks(run):
            from transformers import EarlyStoppingCallback
            return [EarlyStoppingCallback(early_stopping_patience=3)]
    """


@hookspec
def alignkit_run_end(run: Run, result: Result) -> None:
    """Called once a run, when its folder is complete. Not called when the run was interrupted or failed.

    ::

        from alignkit import hookimpl

        @hookimpl
        def alignkit_run_end(run, result):
            print("held-out loss:", result.metrics.get("eval_loss"), "in", result.folder)
    """


@hookspec
def alignkit_run_failed(run: Run, error: Exception) -> None:
    """Called when an error ends a run, at ``alignkit_run_start`` or later. Not called when the user stops it.

    The error is shown as ever afterwards, and what this hook raises beside it. ``run.folder`` has the checkpoints with
    which ``--resume`` goes on.

    ::

        from alignkit import hookimpl

        @hookimpl
        def alignkit_run_failed(run, error):
            print("run failed:", run.config.stage.component.name, error)
    """
