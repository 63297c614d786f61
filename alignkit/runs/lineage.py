"""Finds the runs that a run starts from, and checks that they fit together. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit import bundled, paths, protocols
from alignkit.config import model_kwargs
from alignkit.config.resolve import RunConfig
from alignkit.config.settings import Selected, select
from alignkit.errors import ConfigError, PluginError, suggestion
from alignkit.registry import Registry
from alignkit.registry.plugin import in_memory
from alignkit.runs import base, fingerprints, manifest

BASE = "base"  # in place of a run folder: start from the bare model


@dataclass(frozen=True)
class Parent:
    """A run that another run starts from."""

    stage: str
    folder: Path
    manifest: dict[str, Any] | None  # None: the same command trains it first
    config: RunConfig | None = None  # of a run that is trained first

    def describe(self) -> str:
        """Such as ``"runs/sft (lora, 44 steps, 2026-11-24)"``."""
        if self.manifest is None:
            return f"{self.folder} (trained first)"
        record = self.manifest
        of_round = f"round {number}, " if (number := record.get("round", 1)) > 1 else ""
        return f"{self.folder} ({record['tuner']}, {record['steps']} steps, {of_round}{record['finished'][:10]})"


def named(key: str, path: str, role: str) -> Parent:
    """The run in the folder ``path``, which the config names under ``key`` as the ``role``.

    Raises:
        ConfigError: the folder is not a finished run, or the run has another role.
    """
    folder = paths.expand(path)
    if not manifest.is_run(folder):
        raise not_a_run(key, path)
    record = manifest.read(folder)
    if record["role"] != role:
        raise ConfigError(f"{key}: {path} is a {record['role']} (stage {record['stage']}), not a {role}")
    return Parent(record["stage"], folder, record)


def not_a_run(key: str, path: str) -> ConfigError:
    """The error for a path under ``key`` that is not a finished run. It lists the runs in the folder."""
    folder = paths.expand(path)
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    runs = [str(child) for child in children if manifest.is_run(child)]
    siblings = [sibling.name for sibling in folder.parent.iterdir()] if folder.parent.is_dir() else []
    message = f"{key}: {path} is not a finished run"
    return ConfigError(
        f"{message}. Runs in it: {', '.join(runs)}" if runs else suggestion(message, folder.name, siblings)
    )


def finished(output: Path, stage: str) -> list[Parent]:
    """The finished runs of a stage in the output folder, newest first."""
    folders = [folder for folder in output.iterdir() if manifest.is_run(folder)] if output.is_dir() else []
    runs = [
        Parent(stage, folder, record)
        for folder in folders
        if not folder.name.endswith(".unfinished") and (record := manifest.read(folder))["stage"] == stage
    ]
    return sorted(runs, key=lambda run: run.manifest["finished"] if run.manifest else "", reverse=True)


def inherited(parent: Parent) -> dict[str, Any]:
    """The settings that a run takes from the run that it starts from, unless the user sets them."""
    config = parent.manifest["config"] if parent.manifest else parent.config.to_dict() if parent.config else {}
    kept = {key: config[key] for key in ("model", "tuner", "chat_template") if config.get(key) is not None}
    return {**kept, "model_kwargs": model_kwargs.inherited(config.get("model_kwargs", {}))}


def check(config: RunConfig, parent: Parent, key: str) -> None:
    """Check that a run of ``config`` can start from ``parent``.

    Raises:
        ConfigError: the base, tokenizer, chat template, special tokens or adapter settings differ.
    """
    record, message = parent.manifest, f"{key}: this run cannot start from {parent.folder}"
    if record is None:
        assert parent.config is not None
        if config.model != parent.config.model:
            raise ConfigError(f"{message}: its base model is {parent.config.model}, not {config.model}")
        _check_model_kwargs(config, parent.config.model_kwargs, message)
        own, other = (c.chat_template and template(c.chat_template) for c in (config, parent.config))
        if own != other:
            raise ConfigError(f"{message}: its chat template is not {config.chat_template}")
        if parent.config.tuner.component.adapters:
            _check_adapter(config, parent.config.to_dict(), message)
        return
    if config.model != record["model"]["name"] and not _is_model_of(config, record):
        raise ConfigError(f"{message}: its base model is {record['model']['name']}, not {config.model}")
    _check_model_kwargs(config, record["config"].get("model_kwargs", {}), message)
    if changed := model_differences(config, record, record["model"].get("revision")):
        raise ConfigError(f"{message}: {config.model} has changed since it was trained ({', '.join(changed)})")
    current = fingerprints.of(parent.folder)
    if changed := fingerprints.differences(record["fingerprints"], current):
        raise ConfigError(f"{message}: its folder has changed since it was trained ({', '.join(changed)})")
    if config.chat_template and template(config.chat_template) != record["fingerprints"]["chat_template"]:
        raise ConfigError(f"{message}: its chat template is not {config.chat_template}")
    if record["weights"] == "adapter":
        _check_adapter(config, record["config"], message)


def _check_model_kwargs(config: RunConfig, parent: Mapping[str, Any], message: str) -> None:
    own, other = model_kwargs.same_base(config.model_kwargs), model_kwargs.same_base(parent)
    for name in dict.fromkeys([*other, *own]):
        if own.get(name) != other.get(name):
            raise ConfigError(
                f"{message}: its base was loaded with model_kwargs.{name}={other.get(name)!r}, not {own.get(name)!r}"
            )
    if parent.get("trust_remote_code") and not config.model_kwargs.get("trust_remote_code"):
        raise ConfigError(f"{message}: its base runs code of its repository. If you trust it, add --trust-remote-code")


def _check_adapter(config: RunConfig, parent: Mapping[str, Any], message: str) -> None:
    if not config.tuner.component.adapters:  # the adapter is merged
        return
    tuner, before = config.to_dict()["tuner"], parent["tuner"]
    differing = [name for name in tuner if name != "name" and name in before and tuner[name] != before[name]]
    if differing:
        settings = ", ".join(f"tuner.{name}={before[name]!r}, not {tuner[name]!r}" for name in differing)
        raise ConfigError(f"{message}: its adapter is trained further and has {settings}")


def base_weights(config: protocols.RunConfig, policy: protocols.Parent | None) -> str | None:
    """The fingerprint of the base weights of a run that starts from ``policy``."""
    if policy is None or policy.manifest is None:
        model = _model_of(config)
        return model["weights"] if model else None
    full = policy.manifest["weights"] == "model"
    return fingerprints.weights(policy.folder) if full else policy.manifest["base"]["weights"]


def shares_base(record: Mapping[str, Any], config: protocols.RunConfig, base: str | None) -> bool:
    """Whether a finished run is an adapter of the same base as another run.

    ``record`` is its manifest. ``config`` and ``base`` are the config and the base fingerprint of the other run. The
    settings of the tuner must agree, because they may change how the base is loaded, and PEFT cannot combine all of
    them on one base. So must those of ``model_kwargs`` that change what the base computes.
    """
    return _is_adapter_of(record, config.to_dict(), base)


def _is_adapter_of(record: Mapping[str, Any], config: Mapping[str, Any], base: str | None) -> bool:
    first, second = (  # without settings that an earlier version did not have
        {name: value for name, value in each["tuner"].items() if value is not None}
        for each in (record["config"], config)
    )
    same = first == second
    own, other = (model_kwargs.same_base(each.get("model_kwargs", {})) for each in (record["config"], config))
    same = same and {**own, "revision": None} == {**other, "revision": None}  # the weights tell revisions apart
    return bool(record["weights"] == "adapter" and same and record["base"]["weights"] == base)


def rewards_in(by_role: Mapping[str, Any]) -> dict[str, Any]:
    """The roles that are rewards: ``reward``, and ``reward_2``, ``reward_3``, ... if there are several."""
    return {role: value for role, value in by_role.items() if role.partition("_")[0] == "reward"}


def trunks_of_rewards(
    records: Mapping[str, Mapping[str, Any] | None], config: protocols.RunConfig, base: str | None
) -> dict[str, str]:
    """The role whose base in memory each reward uses: ``policy``, or the first reward with that base (maybe itself).

    ``records`` are the manifests of the reward runs by role. None is a run that is trained first, with the tuner and
    base of the policy. ``config`` and ``base`` are as in :func:`shares_base`.
    """
    trunks: dict[str, str] = {}
    for role, record in records.items():
        on_policy = record is None or shares_base(record, config, base)
        if config.tuner.component.adapters and on_policy:
            trunks[role] = "policy"
        else:
            others = [other for other, trunk in trunks.items() if other == trunk]
            trunks[role] = next((other for other in others if _on_one_base(record, records[other])), role)
    return trunks


def _on_one_base(record: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    if record is None or other is None or other["weights"] != "adapter":
        return False
    return _is_adapter_of(record, other["config"], other["base"]["weights"])


def check_same_tokens(a: Parent, b: Parent) -> None:
    """Check that two runs tokenize text in the same way.

    Raises:
        ConfigError: the tokenizer, the chat template or the special tokens differ.
    """
    if a.manifest is None or b.manifest is None:
        return
    first, second = a.manifest["fingerprints"], b.manifest["fingerprints"]
    if differing := fingerprints.differences_of_tokens(first, second):
        raise ConfigError(f"{a.folder} and {b.folder} cannot be combined: they differ in {', '.join(differing)}")


def check_same_tokens_as_base(config: RunConfig, run: Parent) -> None:
    """Like :func:`check_same_tokens`, for the model of ``config`` and a run.

    Raises:
        ConfigError: the tokenizer, the chat template or the special tokens differ.
    """
    if run.manifest is None:
        return
    own, other = _model_of(config), _without_name(run.manifest["model"])
    if own is None or other is None:
        return
    own_template, other_template = config.chat_template, run.manifest["config"]["chat_template"]
    own |= {"chat_template": template(own_template)} if own_template else {}
    other |= {"chat_template": run.manifest["fingerprints"]["chat_template"]} if other_template else {}
    if differing := fingerprints.differences_of_tokens(own, other):
        raise ConfigError(f"{config.model} and {run.folder} cannot be combined: they differ in {', '.join(differing)}")


def tuner(record: Mapping[str, Any]) -> Selected:
    """The tuner of a finished run, with its settings. ``record`` is the manifest.

    Raises:
        PluginError: the tuner is not installed. The message names the distribution that provided it.
    """
    registry, name = Registry(), record["tuner"]
    for plugin in record["config"]["plugins"]:
        with contextlib.suppress(PluginError):  # only the tuner matters here
            registry.activate(plugin)
    if not registry.has("tuner", name):
        registry.activate(*(plugin for plugin in record["config"]["plugins"] if in_memory([plugin])))
        missing = {d: v for d, v in record["versions"].items() if not manifest.versions([d])}
        if missing:
            versions = " and ".join(f"{distribution} {version}" for distribution, version in missing.items())
            raise PluginError(
                f"tuner '{name}' is not installed. The run was trained with {versions}: pip install {' '.join(missing)}"
            )
    return select(registry, "tuner", name, [record["config"]["tuner"]])


def template(path: str | None) -> str | None:
    """The fingerprint of the chat template in a file; None if there is none."""
    file = paths.expand(path) if path else None
    return fingerprints.text(file.read_text(encoding="utf-8")) if file and file.is_file() else None


def _model_of(config: protocols.RunConfig, commit: str | None = None) -> dict[str, Any] | None:
    """The fingerprints of the base model of ``config``. None if its files are not on this disk."""
    if config.model.startswith(bundled.PREFIX):
        folder: Path | None = bundled.model(config.model)
    else:
        revision = commit or config.model_kwargs.get("revision")
        folder = base.folder_of(base.locate(config.model, lambda line: None), revision)
    return fingerprints.of(folder) if folder is not None and folder.exists() else None


def model_differences(config: RunConfig, record: Mapping[str, Any], commit: str | None = None) -> list[str]:
    """Changes in the base model of a run since it was trained, if it is that of ``config``. ``record`` is the manifest.

    ``commit`` is that of a model of the hub, if it is known; else it is where ``model_kwargs.revision`` now points to.
    """
    if config.model != record["model"]["name"]:  # do not look for it: it may not be on this disk
        return []
    current, before = _model_of(config, commit), _without_name(record["model"])
    return fingerprints.differences(before, current) if current and before else []


def _is_model_of(config: RunConfig, record: Mapping[str, Any]) -> bool:
    """Whether the model of ``config`` is that of a run, perhaps in another folder."""
    own, other = _model_of(config), _without_name(record["model"])
    return not fingerprints.differences(other, own) if own and other else own == other


def _without_name(model: Mapping[str, Any]) -> dict[str, Any] | None:
    return {key: value for key, value in model.items() if key not in ("name", "revision")} or None
