"""Resolves YAML, flags and ``key.path=value`` to a typed :class:`RunConfig`.

There are four layers, and later ones take precedence, table by table: the shared tables of the file, the table of the
stage in the file, the shared keys of the command line, and the keys of the stage on the command line. Below them are
the defaults of the stage and, on a bundled model, the settings of its recipe. The table of a component holds the fields
of its config dataclass. A command may train several stages; each is resolved separately from the same layers (see
:mod:`alignkit.runs.plan`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from alignkit import bundled, yaml
from alignkit.components import Stage, option
from alignkit.config import data_sources, layers, model_kwargs, training_args, unused_settings
from alignkit.config.data_sources import DataPath
from alignkit.config.settings import Selected as Selected
from alignkit.config.settings import as_table, known_keys, names, plain, typed
from alignkit.config.settings import merge as merge
from alignkit.config.settings import select as select
from alignkit.config.unused_settings import effective
from alignkit.errors import ConfigError
from alignkit.registry import Registry
from alignkit.registry.plugin import plugin_name


@dataclass(frozen=True)
class DataConfig:
    """The ``data`` table: the rows that a stage trains on."""

    path: DataPath = option(
        None,
        "a file (.jsonl .json .csv .parquet), a folder or a hub id; or a list of them, where {path: FILE, weight: 2} "
        "sets a weight; null: the stage's default",
    )
    name: str | None = option(None, "the subset of a hub dataset")
    split: str = option("train", "the split of a hub dataset, or of a folder with files named train, test, ...")
    format: str | dict[str, Any] | None = option(
        None, "the data format: a name, or a table of name and settings; null: detected from the fields of the rows"
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error", "error: stop at a bad row; skip: skip bad rows and report them", resume="may_change"
    )
    special_tokens: Literal["text", "tokens"] = option(
        "text", "special tokens written out in a row, such as <|im_end|>: plain text, or the tokens themselves"
    )
    eval_path: str | None = option(None, "a source of held-out rows; null: hold out training rows")
    eval_split: str | None = option(None, "the split of eval_path, if it has splits; null: the same as split")
    eval_size: float | None = option(
        None, "rows to hold out: a share if below 1, else a count; null: 10 %, at most 200"
    )
    seed: int = option(0, "random seed of the choice of held-out rows")
    num_proc: Annotated[int, Gt(0)] | None = option(
        None, "processes that tokenize the rows; null: one for each core", resume="may_change"
    )
    streaming: bool = option(False, "read the rows while training, for data larger than memory; needs train.max_steps")
    shuffle_buffer: Annotated[int, Ge(0)] = option(
        10_000, "rows that are read and shuffled together; 0: the order of the files", only_with="streaming"
    )


@dataclass(frozen=True)
class TopLevel:
    """The keys of a config file that are not tables of a component."""

    model: str = option(
        "bundled:smollm2-135m", "the base model of every stage: a hub id, a folder, or bundled:smollm2-135m"
    )
    model_kwargs: dict[str, Any] = option(
        {}, "arguments of from_pretrained for the base model, such as {revision: v2, attn_implementation: eager}"
    )
    output: str = option(
        "runs", "the output folder; stages write subfolders: runs/sft, runs/rm, ...", resume="may_change"
    )
    plugins: list[str] = option([], "plugins to activate and use; --plugin adds to these")
    chat_template: str | None = option(None, "a Jinja file; null: the tokenizer's template, else a plain one")


@dataclass(frozen=True)
class RunConfig:
    """The complete settings of a run. They reproduce it."""

    stated: dict[str, Any]  # the settings that the user gave, in the shape of `to_dict`; the others are defaults
    model: str
    model_kwargs: dict[str, Any]
    output: str
    plugins: list[str]
    chat_template: str | None
    stage: Selected
    tuner: Selected
    optimizer: Selected
    loss: Selected
    data: DataConfig
    train: dict[str, Any]  # overrides of the defaults of TrainingArguments
    parents: dict[str, str | None]  # role -> a run folder, "base", or None if not given
    reward: Selected | None = None  # None if the stage uses none
    rollout: Selected | None = None
    unused: dict[str, str] = dataclasses.field(default_factory=dict)  # shared `train` keys without effect -> why
    kept: list[str] = dataclasses.field(default_factory=list)  # settings that differ from those of a new run, as text

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output) / self.stage.component.name

    def to_dict(self) -> dict[str, Any]:
        """The content of a config file that resolves to this config."""
        return {
            "model": self.model,
            "model_kwargs": self.model_kwargs,
            "output": self.output,
            "plugins": self.plugins,
            "chat_template": self.chat_template,
            "tuner": self.tuner.to_dict(),
            "optimizer": self.optimizer.to_dict(),
            "stages": {
                self.stage.component.name: {
                    **plain(self.stage.config),
                    **self.parents,
                    **{kind: getattr(self, kind).to_dict() for kind in self.stage.component.uses},
                    "loss": self.loss.to_dict(),
                    "data": dataclasses.asdict(self.data),
                    "train": self.train,
                }
            },
        }

    def to_yaml(self) -> str:
        """:meth:`to_dict` as YAML."""
        return yaml.dumps(self.to_dict())


def parse_override(text: str) -> dict[str, Any]:
    """``"a.b=1"`` as ``{"a": {"b": 1}}``."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"'{text}' is not a setting. Write key.path=value, such as train.max_steps=20")
    *tables, last = path.split(".")
    nested: dict[str, Any] = {last: yaml.loads(value, text) if value else None}
    for table in reversed(tables):
        nested = {table: nested}
    return nested


def requested_stage(registry: Registry, file: Mapping[str, Any], cli: Mapping[str, Any]) -> str:
    """Activate the named plugins. The requested stage is the last one among them.

    Raises:
        ConfigError: no stage is named.
        PluginError: from the registry.
    """
    named = [*layers.plugins(file), *layers.plugins(cli)]
    registry.activate(*named)
    stages = [name for name in map(plugin_name, named) if registry.has("stage", name)]
    if not stages:
        known = ", ".join(stage.name for stage in registry.all("stage"))
        raise ConfigError(f"no stage given. Add --plugin STAGE. Stages: {known}")
    return stages[-1]


def resolve(
    registry: Registry,
    file: Mapping[str, Any],
    cli: Mapping[str, Any],
    stage_name: str | None = None,
    inherited: Mapping[str, Any] | None = None,
    may_exist: bool = False,
) -> RunConfig:
    """Resolve the config of the requested stage, or of ``stage_name``, an earlier stage that it needs.

    Args:
        registry: the plugins; those that the sources name are activated.
        file: the content of the config file.
        cli: flags and overrides in the same shape (see :func:`parse_override`).
        stage_name: the stage, if it is not the requested one.
        inherited: settings of the run that this one starts from, which apply unless a source sets them.
        may_exist: resolve the config of a run that may already exist. Shared settings of the command line are meant
            for the runs that are trained now, so they do not apply.

    Raises:
        ConfigError: no stage, an unknown key, a value of the wrong type, or a loss that does not fit the stage.
        PluginError: from the registry.
    """
    requested = requested_stage(registry, file, cli)
    stage_name = stage_name or requested
    stage = registry.stage(stage_name)
    all_layers = [
        *layers.layers(registry, file, requested, from_cli=False),
        *layers.layers(registry, cli, requested, from_cli=True),
    ]
    trained = layers.to_train(registry, all_layers, requested)
    for layer in all_layers:  # in a file they may be meant for another command; here they have no effect
        for kind in ("reward", "rollout"):
            alone = layer.from_cli and not layer.picks_several
            if alone and kind in layer.shared and not any(kind in each.uses for each in trained):
                raise ConfigError(f"{kind} has no effect: {requested} uses no {kind}")

    shared = [*names(TopLevel), "data", "train", *layers.OF_A_RUN]
    unused = [kind for kind in ("reward", "rollout") if kind not in stage.uses]
    own = [*names(stage.config), *stage.needs, *(key for key in shared if key not in ("plugins", *unused))]
    own_data = any("path" in layer.of(stage_name, "data") or "path" in layer.table("data") for layer in all_layers)
    tables: list[Mapping[str, Any]] = []
    for layer in all_layers:
        of_stage = layer.stages.get(stage_name, {})
        known_keys(layer.shared, [*shared, "stages"], "")
        known_keys(of_stage, own, f"{stage_name}.")
        like = layer.of(stage.data_of, "data") if stage.data_of else {}
        if like and not own_data:
            of_stage = merge({"data": like}, of_stage)
        tables += [layers.shared_tables(registry, all_layers, layer, stage, trained, may_exist), of_stage]
    stated = merge(*tables)
    of_stage_alone = [key for table in tables[1::2] for key in as_table(table.get("train"), "train")]
    own_path = as_table(stated.get("data"), "data").get("path")
    recipe = bundled.recipe(merge(inherited or {}, stated).get("model") or TopLevel.model, stage_name, own_path)
    tables[:0] = [{key: value for key, value in recipe.items() if key != "train"}, inherited or {}]
    merged = {key: value for key, value in merge(*tables).items() if key not in unused}

    top = typed(TopLevel, {k: merged.pop(k) for k in names(TopLevel) if k in merged}, "")
    chosen_format = _format(registry, tables)
    data_table = dict(as_table(merged.pop("data", None), "data"))
    data = typed(DataConfig, {**data_table, "path": data_sources.normalized(data_table.get("path"))}, "data.")
    data = dataclasses.replace(data, path=data.path or stage.data, format=chosen_format)
    for key in {"format", "path"} & set(as_table(stated.get("data"), "data")):
        stated["data"][key] = getattr(data, key)
    train = training_args.check(as_table(merged.pop("train", None), "train"))
    parents = {role: merged.pop(role, None) for role in stage.needs}
    for role, named in parents.items():
        if named is not None and not isinstance(named, str):
            raise ConfigError(f"{stage_name}.{role} must be a run folder or 'base', not {named!r}")
    defaults = {"tuner": "lora", "optimizer": "adamw", "loss": stage.loss, **stage.uses}
    chosen: dict[str, Any] = {}
    for kind, default in defaults.items():
        merged.pop(kind, None)
        chosen[kind] = select(registry, kind, default, [as_table(table.get(kind), kind) for table in tables])
    loss, tuner, optimizer = (chosen[kind].component for kind in ("loss", "tuner", "optimizer"))
    if not layers.fits(loss, stage):
        fitting = ", ".join(c.name for c in registry.all("loss") if layers.fits(c, stage))
        raise ConfigError(
            f"loss '{loss.name}' takes {loss.batch.__name__}, but stage '{stage_name}' provides "
            f"{stage.batch.__name__}. Losses for this stage: {fitting}"
        )
    for_no_stage = [key for key in train if all(key in each.refuses for each in trained)]
    train, unused_train = unused_settings.without_unused(
        train, [*of_stage_alone, *for_no_stage, "deepspeed"], stage.refuses, f"stage '{stage_name}'"
    )
    train, more = unused_settings.without_unused(train, [], optimizer.refuses, f"optimizer '{optimizer.name}'")
    if "train" in stated:
        stated["train"] = {key: value for key, value in stated["train"].items() if key in train}
    train = _train({**stage.train, **recipe.get("train", {})}, tuner.lr_scale * optimizer.lr_scale, train)
    training_args.check_together(train)
    return RunConfig(
        stated=_stated(stage, stated),
        model=top.model,
        model_kwargs=model_kwargs.check(top.model_kwargs, bool(train.get("use_cpu"))),
        output=os.path.expanduser(top.output),
        plugins=[*(name for name in registry.requested if name != stage_name), stage_name],
        chat_template=top.chat_template,
        stage=Selected(stage, typed(stage.config, effective(stage.config, merged, stated), f"{stage_name}.")),
        data=data,
        train=train,
        unused={**unused_train, **more},
        parents=parents,
        **chosen,
    )


def _stated(stage: Stage, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the user gave, in the shape of :meth:`RunConfig.to_dict`."""
    shared = ("model", "model_kwargs", "chat_template", "tuner", "optimizer")
    of_run: dict[str, Any] = {key: stated[key] for key in shared if key in stated}
    own = (*names(stage.config), *stage.needs, *stage.uses, "loss", "data", "train")
    of_stage = {key: stated[key] for key in own if key in stated}
    return {**of_run, "stages": {stage.name: of_stage}}


def _train(defaults: dict[str, Any], lr_scale: float, train: Mapping[str, Any]) -> dict[str, Any]:
    """The ``train`` table: the user's settings over the defaults of the stage, key by key."""
    defaults = {"report_to": "none", "save_total_limit": 2, **defaults}
    if "learning_rate" in defaults:  # the default is for full fine-tuning with AdamW
        defaults["learning_rate"] = float(f"{defaults['learning_rate'] * lr_scale:.6g}")
    if train.get("lr_scheduler_type", defaults.get("lr_scheduler_type")) != defaults.get("lr_scheduler_type"):
        defaults.pop("lr_scheduler_kwargs", None)  # these are for the stage's own scheduler
    return {**defaults, **train}


def named_format(registry: Registry, written: str | Mapping[str, Any] | None) -> Selected | None:
    """The format that ``data.format`` selects, with its settings. None: detect the format from the rows.

    Raises:
        ConfigError: the table has no name, or a setting is unknown or of the wrong type.
        PluginError: no active plugin provides the format.
    """
    table = {"name": written} if isinstance(written, str) else written
    if not table:
        return None
    if not isinstance(name := table.get("name"), str):
        raise ConfigError(f"data.format has settings but no name (got {name!r}). Set data.format.name")
    return select(registry, "format", name, [table])


def _format(registry: Registry, tables: Iterable[Mapping[str, Any]]) -> str | dict[str, Any] | None:
    """``data.format``, merged from all tables, as in the config: a name, or a table if the format has settings."""
    written: dict[str, Any] = {}
    for table in tables:
        later = as_table(as_table(table.get("data"), "data").get("format"), "data.format")
        another = {"name"} <= written.keys() & later.keys() and written["name"] != later["name"]
        written = merge({} if another else written, later)
    chosen = named_format(registry, {} if written == {"name": None} else written)
    if chosen is None:
        return None
    named = chosen.to_dict()
    return named if len(named) > 1 else chosen.component.name
