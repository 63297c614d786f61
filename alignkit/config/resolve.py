"""From YAML, flags and ``key.path=value`` to one typed :class:`RunConfig`.

Four layers, the later wins, table by table: the file's shared tables, the file's table for the stage, the command
line's shared keys, the command line's keys for the stage. Below them are the stage's defaults, and over those, on a
bundled model, what its recipe says. No layer is special to a component: a component's table is
whatever its config dataclass says. One command may train several stages: each is resolved by itself, from the same
layers (see :mod:`alignkit.runs.plan`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignkit import bundled, yaml
from alignkit.components import KINDS, Stage, option
from alignkit.config import layers, training_args
from alignkit.config.settings import Selected as Selected
from alignkit.config.settings import as_table, known_keys, names, plain, typed
from alignkit.config.settings import merge as merge
from alignkit.config.settings import select as select
from alignkit.errors import ConfigError
from alignkit.registry import Registry
from alignkit.registry.plugin import bare


@dataclass(frozen=True)
class DataConfig:
    """The ``data`` table: which rows a stage trains on."""

    path: str | None = option(
        None, "a file (.jsonl .json .csv .parquet), a folder or a hub id; null: the stage's default"
    )
    name: str | None = option(None, "the subset of a hub dataset")
    split: str = option("train", "the split of a hub dataset, or of a folder with files named train, test, ...")
    format: str | dict[str, Any] | None = option(
        None, "the data format: a name, or a table of name and settings; null: detected from the fields of the rows"
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error", "error: stop at a bad row; skip: leave bad rows out and count them"
    )
    special_tokens: Literal["text", "tokens"] = option(
        "text", "special tokens written out in a row, such as <|im_end|>: plain text, or the tokens themselves"
    )
    eval_path: str | None = option(None, "a source of held-out rows; null: hold out training rows")
    eval_split: str | None = option(None, "the split of eval_path, if it has splits; null: the same as split")
    eval_size: float | None = option(
        None, "rows to hold out: a share if below 1, else a count; null: 10 %, at most 200"
    )
    seed: int = option(0, "seed of the choice of held-out rows")


@dataclass(frozen=True)
class TopLevel:
    """The keys of a config file that are not tables of a component."""

    model: str = option(
        "bundled:smollm2-135m", "the base model of every stage: a hub id, a folder, or bundled:smollm2-135m"
    )
    output: str = option("runs", "the folder for run folders: runs/sft, runs/rm, ...", resume="may_change")
    plugins: list[str] = option([], "plugins to activate and use; --plugin adds to these")
    chat_template: str | None = option(None, "a Jinja file; null: the tokenizer's template, else a plain one")


@dataclass(frozen=True)
class RunConfig:
    """Everything that one run of one stage was told. It reproduces the run."""

    stated: dict[str, Any]  # what the user said of this stage, in the shape of `to_dict`; the rest are defaults
    model: str
    output: str
    plugins: list[str]
    chat_template: str | None
    stage: Selected
    tuner: Selected
    optimizer: Selected
    loss: Selected
    data: DataConfig
    train: dict[str, Any]  # over the defaults of TrainingArguments, by its names
    parents: dict[str, str | None]  # where each role that the stage needs comes from: a run folder, "base", or unsaid
    reward: Selected | None = None  # only of a stage that uses one
    rollout: Selected | None = None
    unused: dict[str, str] = dataclasses.field(default_factory=dict)  # shared `train` keys without effect here, and why

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output) / self.stage.component.name

    def to_dict(self) -> dict[str, Any]:
        """As in a config file: resolving it again gives this same config."""
        return {
            "model": self.model,
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
        raise ConfigError(f"'{text}' is not an override: write key.path=value, such as train.max_steps=20")
    *tables, last = path.split(".")
    nested: dict[str, Any] = {last: yaml.loads(value, text) if value else None}
    for table in reversed(tables):
        nested = {table: nested}
    return nested


def asked_stage(registry: Registry, file: Mapping[str, Any], cli: Mapping[str, Any]) -> str:
    """The stage that ``plugins`` name last; activates every plugin that is named.

    Raises:
        ConfigError: none is named.
        PluginError: from the registry.
    """
    named = [*layers.plugins(file), *layers.plugins(cli)]
    registry.activate(*named)
    stages = [name for name in map(bare, named) if registry.has("stage", name)]
    if not stages:
        known = ", ".join(stage.name for stage in registry.all("stage"))
        raise ConfigError(f"no stage was named. Add --plugin NAME; stages: {known}")
    return stages[-1]


def resolve(
    registry: Registry,
    file: Mapping[str, Any],
    cli: Mapping[str, Any],
    stage_name: str | None = None,
    inherited: Mapping[str, Any] | None = None,
    there: bool = False,
) -> RunConfig:
    """The config of a stage: of the one that was asked for, or of ``stage_name``, which comes before it.

    ``file`` is a config file's content, ``cli`` the same shape from flags and overrides (see :func:`parse_override`);
    ``plugins`` in either activates plugins and picks every component of those names. ``inherited`` is what holds where
    neither says anything: the settings of the run that this one goes on from. With ``there`` it is the config of a run
    that may be there already: shared settings on the command line, which are for what is trained now, do not count.

    Raises:
        ConfigError: no stage; an unknown key, with the closest known one; a value of the wrong type; a loss that does
            not fit the stage.
        PluginError: from the registry.
    """
    asked = asked_stage(registry, file, cli)
    stage_name = stage_name or asked
    stage = registry.stage(stage_name)
    all_layers = [
        *layers.layers(registry, file, asked, from_cli=False),
        *layers.layers(registry, cli, asked, from_cli=True),
    ]
    trained = layers.to_train(registry, all_layers, asked)
    for layer in all_layers:  # in a file they may be for another command; here they would do nothing
        for kind in ("reward", "rollout"):
            alone = layer.from_cli and not layer.picks_several
            if alone and kind in layer.shared and not any(kind in each.uses for each in trained):
                raise ConfigError(f"{kind} is for no stage that is trained here: {asked} uses none")

    shared = [*names(TopLevel), "data", "train", *(kind for kind in KINDS if kind not in ("stage", "format"))]
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
        tables += [layers.shared_tables(registry, all_layers, layer, stage, trained, there), of_stage]
    said = merge(*tables)
    of_stage_alone = [key for table in tables[1::2] for key in as_table(table.get("train"), "train")]
    own_path = as_table(said.get("data"), "data").get("path")
    recipe = bundled.recipe(merge(inherited or {}, said).get("model") or TopLevel.model, stage_name, own_path)
    tables[:0] = [{key: value for key, value in recipe.items() if key != "train"}, inherited or {}]
    merged = {key: value for key, value in merge(*tables).items() if key not in unused}

    top = typed(TopLevel, {k: merged.pop(k) for k in names(TopLevel) if k in merged}, "")
    chosen_format = _format(registry, tables)
    data = typed(DataConfig, as_table(merged.pop("data", None), "data"), "data.")
    data = dataclasses.replace(data, path=data.path or stage.data, format=chosen_format)
    if "format" in as_table(said.get("data"), "data"):
        said["data"]["format"] = data.format
    train = training_args.check(as_table(merged.pop("train", None), "train"))
    parents = {role: merged.pop(role, None) for role in stage.needs}
    for role, named in parents.items():
        if named is not None and not isinstance(named, str):
            raise ConfigError(f"{stage_name}.{role} must be a run folder or base, not {named!r}")
    defaults = {"tuner": "lora", "optimizer": "adamw", "loss": stage.loss, **stage.uses}
    chosen = {}
    for kind, default in defaults.items():
        merged.pop(kind, None)
        chosen[kind] = select(registry, kind, default, [as_table(table.get(kind), kind) for table in tables])
    loss, tuner, optimizer = (chosen[kind].component for kind in ("loss", "tuner", "optimizer"))
    if not layers.fits(loss, stage):
        fitting = ", ".join(c.name for c in registry.all("loss") if layers.fits(c, stage))
        raise ConfigError(
            f"loss '{loss.name}' takes {loss.batch.__name__}, but stage '{stage_name}' gives "
            f"{stage.batch.__name__}. Losses that fit: {fitting}"
        )
    for_no_stage = [key for key in train if all(key in each.refuses for each in trained)]
    train, unused_train = training_args.without_unused(
        train, [*of_stage_alone, *for_no_stage], stage.refuses, f"stage '{stage_name}'"
    )
    train, more = training_args.without_unused(train, [], optimizer.refuses, f"optimizer '{optimizer.name}'")
    if "train" in said:
        said["train"] = {key: value for key, value in said["train"].items() if key in train}
    train = _train({**stage.train, **recipe.get("train", {})}, tuner.lr_scale * optimizer.lr_scale, train)
    training_args.check_together(train)
    return RunConfig(
        stated=_stated(stage, said),
        model=top.model,
        output=top.output,
        plugins=[*(name for name in registry.asked if name != stage_name), stage_name],
        chat_template=top.chat_template,
        stage=Selected(stage, typed(stage.config, merged, f"{stage_name}.")),
        data=data,
        train=train,
        unused={**unused_train, **more},
        parents=parents,
        **chosen,
    )


def _stated(stage: Stage, said: Mapping[str, Any]) -> dict[str, Any]:
    """What the user said, in the shape of :meth:`RunConfig.to_dict`."""
    shared = ("model", "chat_template", "tuner", "optimizer")
    of_run: dict[str, Any] = {key: said[key] for key in shared if key in said}
    own = (*names(stage.config), *stage.needs, *stage.uses, "loss", "data", "train")
    of_stage = {key: said[key] for key in own if key in said}
    return {**of_run, "stages": {stage.name: of_stage}}


def _train(defaults: dict[str, Any], lr_scale: float, train: Mapping[str, Any]) -> dict[str, Any]:
    """What the user said over the stage's defaults, key by key."""
    defaults = {"report_to": "none", "save_total_limit": 2, **defaults}
    if "learning_rate" in defaults:  # it is that of full fine-tuning with AdamW
        defaults["learning_rate"] = float(f"{defaults['learning_rate'] * lr_scale:.6g}")
    if train.get("lr_scheduler_type", defaults.get("lr_scheduler_type")) != defaults.get("lr_scheduler_type"):
        defaults.pop("lr_scheduler_kwargs", None)  # they were for the stage's scheduler
    return {**defaults, **train}


def named_format(registry: Registry, written: str | Mapping[str, Any] | None) -> Selected | None:
    """The format that ``data.format`` names, with its settings; None where rows are to be recognised by their fields.

    Raises:
        ConfigError: settings of no format; an unknown one, or one of the wrong type.
        PluginError: no active plugin gives the format.
    """
    table = {"name": written} if isinstance(written, str) else written
    if not table:
        return None
    if not isinstance(name := table.get("name"), str):
        raise ConfigError(f"data.format has settings, but the name of no format (got {name!r}): set data.format.name")
    return select(registry, "format", name, [table])


def _format(registry: Registry, tables: Iterable[Mapping[str, Any]]) -> str | dict[str, Any] | None:
    """``data.format`` of all tables, as the run's config holds it: a name alone where the format has no settings."""
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
