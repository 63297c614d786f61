"""All hooks of alignkit.

A plugin is a module (or any object) that an entry point in the group ``alignkit`` names. It implements some of these
hooks with ``@alignkit.hookimpl``. Every example below is a complete plugin.

**Declaration hooks** come first. The registry calls each of them once, when it activates the plugin. They take no
arguments, return a list of components, and must not import torch; the functions of a component import it inside.
Components are selected by name, never by order. Two active plugins that declare the same name are an error.

**Run hooks** come second. ``alignkit.training`` calls them at fixed points of a run, never inside a training step, in
the order in which the plugins are named. ``alignkit_load_model`` is called in reverse order: the last plugin wins::

    alignkit_run_start                     the data are read, no model is loaded
      alignkit_load_model                  for each model that the stage requests with ``run.model``
      alignkit_model_ready                 for each of them, after the tuner
      alignkit_callbacks                   before the trainer is built
        ... training ...
    alignkit_run_end                       the run folder is complete
    alignkit_run_failed                    instead, if an error ended the run
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pluggy

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, TrainerCallback

    from alignkit.components import DataFormat, Judge, Loss, Optimizer, Reward, Rollout, Stage, Tuner
    from alignkit.protocols import Result, Run

hookspec = pluggy.HookspecMarker("alignkit")
_hookimpl = pluggy.HookimplMarker("alignkit")


# Stand-ins for nn.Module and TrainerCallback, for type checkers that do not follow torch and transformers.
class _Model(Protocol):
    def named_parameters(self) -> Any: ...


class _Callback(Protocol):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...


Hook = TypeVar(
    "Hook",
    bound="Callable[..., Sequence[Stage] | Sequence[Tuner] | Sequence[DataFormat] | Sequence[Loss] | "
    "Sequence[Optimizer] | Sequence[Reward] | Sequence[Judge] | Sequence[Rollout] | Sequence[_Callback] | _Model | "
    "None]",
)


def hookimpl(function: Hook) -> Hook:
    """Mark a function as the implementation of the hook with its name. Type checkers check what it returns."""
    return _hookimpl(function)


# --- declaration hooks: called once, on activation -------------------------------------------------------------------


@hookspec
def alignkit_stage() -> list[Stage]:  # type: ignore[empty-body]
    """Declare stages: kinds of training. ``build`` returns a ``transformers.Trainer``; the data are read before.

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
    """Declare tuners, which make a model trainable. ``load`` and ``wrap`` are called when a role's model is loaded.

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
    """Declare data formats. ``fits`` gets a file's first rows, ``convert`` every row, before a model is loaded.

    ``convert`` returns a row, or a list of rows if a raw row contains several. A format with a config gets it as the
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
    """Declare losses: functions of a batch. A loss fits every stage with its batch type.

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
    """Declare optimizers. ``build`` is called when the trainer is built. The Trainer creates the parameter groups.

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
    """Declare rewards: functions of prompts and answers. A stage that samples calls one after each sampling.

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
def alignkit_judge() -> list[Judge]:  # type: ignore[empty-body]
    """Declare judges, which rank answers to the same prompt: ``rank --by``, ``compare --judge``, the reward ``judge``.

    A judge gets all questions that can be asked at once. It returns the ranks of the answers of each, or None where it
    has no verdict. If it yields them, each is stored as soon as it arrives, and is not asked for again.

    ::

        from alignkit import Judge, hookimpl

        def build(config, run):
            def politest(questions):
                for question in questions:
                    yield [-answer.count("please") for answer in question.answers]
            return politest

        @hookimpl
        def alignkit_judge():
            return [Judge(name="politest", summary="counts each please", build=build, largest=lambda config: None,
                          order_matters=False)]
    """


@hookspec
def alignkit_rollout() -> list[Rollout]:  # type: ignore[empty-body]
    """Declare rollout engines, which sample answers (token ids) from the policy.

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
    """Called once per run, after its data are read and before its model is loaded.

    ::

        from alignkit import hookimpl

        @hookimpl
        def alignkit_run_start(run):
            print("rows:", len(run.train_rows))
    """


@hookspec(firstresult=True)
def alignkit_load_model(run: Run, role: str, name_or_path: str, kwargs: dict[str, Any]) -> PreTrainedModel | None:
    """Load the base model of a role. The last named plugin that returns one wins; the default is ``from_pretrained``.

    Called for each model that a stage requests with ``run.model``. Copies of it, adapters on its base and finished
    reward models are loaded without this hook.

    ``name_or_path`` is the hub id or the folder that this role starts from: a value may start from another run than the
    policy. ``kwargs`` are arguments of ``from_pretrained``: the dtype, and those that the tuner's ``load`` returned. A
    model for the role ``value`` or ``reward`` needs a scalar head.

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
    """Called for each model that a stage requests with ``run.model``, when the tuner has made it trainable.

    ::

        from alignkit import hookimpl

        @hookimpl
        def alignkit_model_ready(run, role, model):
            print(role, sum(p.numel() for p in model.parameters() if p.requires_grad), "trainable parameters")
    """


@hookspec
def alignkit_callbacks(run: Run) -> list[TrainerCallback]:  # type: ignore[empty-body]
    """Called once per run, before its trainer is built. Returns callbacks for ``transformers.Trainer``.

    ::

        from alignkit import hookimpl

        @hookimpl
        def alignkit_callbacks(run):
            from transformers import EarlyStoppingCallback
            return [EarlyStoppingCallback(early_stopping_patience=3)]
    """


@hookspec
def alignkit_run_end(run: Run, result: Result) -> None:
    """Called once per run, when its folder is complete. Not called if the run was interrupted or failed.

    ::

        from alignkit import hookimpl

        @hookimpl
        def alignkit_run_end(run, result):
            print("held-out loss:", result.metrics.get("eval_loss"), "in", result.folder)
    """


@hookspec
def alignkit_run_failed(run: Run, error: Exception) -> None:
    """Called when an error ends a run, at ``alignkit_run_start`` or later. Not called if the user stops it.

    The error is shown afterwards, along with any error that this hook raises. ``--resume`` continues from the
    checkpoints in ``run.folder``.

    ::

        from alignkit import hookimpl

        @hookimpl
        def alignkit_run_failed(run, error):
            print("run failed:", run.config.stage.component.name, error)
    """
