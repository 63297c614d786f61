"""Which run a run goes on from: finding it, and whether it fits. No torch here: a misfit costs half a second."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit import bundled, paths, protocols
from alignkit.config import RunConfig, identity
from alignkit.config.settings import Selected, select
from alignkit.errors import ConfigError, PluginError, did_you_mean
from alignkit.registry import Registry
from alignkit.runs import base, fingerprints, manifest


@dataclass(frozen=True)
class Parent:
    """A run that another one goes on from."""

    stage: str
    folder: Path
    manifest: dict[str, Any] | None  # None: it is yet to be trained, by the same command
    config: RunConfig | None = None  # of one that is yet to be trained

    def describe(self) -> str:
        """``"runs/sft (lora, 44 steps, 2026-11-24)"``."""
        if self.manifest is None:
            return f"{self.folder} (trained first)"
        record = self.manifest
        return f"{self.folder} ({record['tuner']}, {record['steps']} steps, {record['finished'][:10]})"


def named(key: str, path: str, role: str) -> Parent:
    """The run at ``path``, which the config names under ``key`` to be the ``role``.

    Raises:
        ConfigError: no run is there, or its model is for something else.
    """
    folder = paths.expand(path)
    if not manifest.is_run(folder):
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        runs = [str(one) for one in inside if manifest.is_run(one)]
        beside = [one.name for one in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = f" Runs in it: {', '.join(runs)}" if runs else did_you_mean(folder.name, beside)
        raise ConfigError(f"{key}: {path} is no finished run.{hint}")
    record = manifest.read(folder)
    if record["role"] != role:
        raise ConfigError(f"{key}: {path} is a {record['role']} (stage {record['stage']}), not a {role}")
    return Parent(record["stage"], folder, record)


def finished(output: Path, stage: str) -> list[Parent]:
    """The finished runs of a stage in the output folder, the newest first."""
    folders = [folder for folder in output.iterdir() if manifest.is_run(folder)] if output.is_dir() else []
    runs = [
        Parent(stage, folder, record)
        for folder in folders
        if not folder.name.endswith(".unfinished") and (record := manifest.read(folder))["stage"] == stage
    ]
    return sorted(runs, key=lambda run: run.manifest["finished"] if run.manifest else "", reverse=True)


def inherited(parent: Parent) -> dict[str, Any]:
    """What a run takes from the one that it goes on from, where the user says nothing else."""
    config = parent.manifest["config"] if parent.manifest else parent.config.to_dict() if parent.config else {}
    return {key: config[key] for key in ("model", "tuner", "chat_template") if config.get(key) is not None}


def differences(run: Parent, config: RunConfig, data: str | None) -> list[str]:
    """Why a finished run is not the one that ``config`` would make: what the user said, data, model, and ancestors.

    ``data`` is the fingerprint of the data as they are now; None where that is unknown.
    """
    assert run.manifest is not None
    record, wanted = run.manifest, config.to_dict()
    free = {change.path for change in identity.changes(record["config"], config) if change.resume == "may_change"}
    found = [
        f"{'.'.join(path).removeprefix('stages.')} was {_at(record['config'], path)!r}, is {_at(wanted, path)!r}"
        for path in _leaves(config.stated)
        if _at(record["config"], path) != _at(wanted, path) and path[-1] not in config.parents and path not in free
    ]
    if data is not None and record["data"]["fingerprint"] != data and record["data"]["source"] == config.data.path:
        found.append(f"{config.data.path} has changed since")
    found += [f"{config.model} has changed: {what}" for what in _model_differences(config, record)]
    for role, parent in record["parents"].items():
        folder = Path(parent["folder"])
        if manifest.is_run(folder) and fingerprints.weights(folder) != parent["weights"]:
            found.append(f"its {role} {folder} was trained again since")
    return found


def check(config: RunConfig, parent: Parent, key: str) -> None:
    """Whether a run of ``config`` can go on from ``parent``.

    Raises:
        ConfigError: base, tokenizer, chat template, special tokens or the adapter's settings differ; says which.
    """
    record, told = parent.manifest, f"{key}: {parent.folder} does not fit"
    if record is None:
        assert parent.config is not None
        if config.model != parent.config.model:
            raise ConfigError(f"{told}: it will be made from {parent.config.model}, this run is of {config.model}")
        mine, theirs = (c.chat_template and _template(c.chat_template) for c in (config, parent.config))
        if mine != theirs:
            raise ConfigError(f"{told}: its chat template will be another than {config.chat_template}")
        if parent.config.tuner.component.adapters:
            _check_adapter(config, parent.config.to_dict(), told)
        return
    if config.model != record["model"]["name"] and _model_of(config) != _without_name(record["model"]):
        raise ConfigError(f"{told}: it was made from {record['model']['name']}, this run is of {config.model}")
    if found := _model_differences(config, record):
        raise ConfigError(f"{told}: since it was trained, of {config.model} this has changed: {', '.join(found)}")
    now = fingerprints.of(parent.folder)
    if found := fingerprints.differences(record["fingerprints"], now):
        raise ConfigError(f"{told}: since it was trained, this in its folder has changed: {', '.join(found)}")
    if config.chat_template and _template(config.chat_template) != record["fingerprints"]["chat_template"]:
        raise ConfigError(f"{told}: its chat template is another than {config.chat_template}")
    if record["weights"] == "adapter":
        _check_adapter(config, record["config"], told)


def _check_adapter(config: RunConfig, parent: Mapping[str, Any], told: str) -> None:
    mine, theirs = config.to_dict()["tuner"], parent["tuner"]
    common = [name for name in mine if name != "name" and name in theirs and mine[name] != theirs[name]]
    if common:
        what = ", ".join(f"tuner.{name} is {theirs[name]!r} there and {mine[name]!r} here" for name in common)
        raise ConfigError(f"{told}: its adapter is continued as it is, and {what}")


def base_weights(config: protocols.RunConfig, policy: protocols.Parent | None) -> str | None:
    """The fingerprint of what the adapters of a run sit on that goes on from ``policy``."""
    if policy is None or policy.manifest is None:
        model = _model_of(config)
        return model["weights"] if model else None
    whole = policy.manifest["weights"] == "model"
    return fingerprints.weights(policy.folder) if whole else policy.manifest["base"]["weights"]


def shares_base(record: Mapping[str, Any], config: protocols.RunConfig, base: str | None) -> bool:
    """Whether a finished run is an adapter that fits on the base of another run: the same weights in the same form.

    ``record`` is its manifest; ``config`` and ``base`` are the other run's config and the fingerprint of its base. The
    tuner's settings must agree: they may decide the form of the base, and PEFT cannot mix all of them on one.
    """
    return _sits_on(record, config.to_dict()["tuner"], base)


def _sits_on(record: Mapping[str, Any], tuner: Mapping[str, Any], base: str | None) -> bool:
    same = record["config"]["tuner"] == tuner
    return bool(record["weights"] == "adapter" and same and record["base"]["weights"] == base)


def rewards_in(by_role: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the roles that are rewards: ``reward``, and ``reward_2``, ``reward_3``, ... where there are several."""
    return {role: value for role, value in by_role.items() if role.partition("_")[0] == "reward"}


def trunks_of_rewards(
    records: Mapping[str, Mapping[str, Any] | None], config: protocols.RunConfig, base: str | None
) -> dict[str, str]:
    """On whose base each reward is put in memory: ``policy``, or the first reward on that base, which may be itself.

    ``records`` are the manifests of the reward runs by role; None for a run that is yet to be trained, which will have
    the policy's tuner and base. ``config`` and ``base`` are as in :func:`shares_base`.
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
    return _sits_on(record, other["config"]["tuner"], other["base"]["weights"])


def check_same_tokens(a: Parent, b: Parent) -> None:
    """Whether two runs write text in the same tokens.

    Raises:
        ConfigError: the tokenizer, the chat template or the special tokens differ; says which.
    """
    if a.manifest is None or b.manifest is None:
        return
    one, other = a.manifest["fingerprints"], b.manifest["fingerprints"]
    if found := fingerprints.differences({**one, "weights": None}, {**other, "weights": None}):
        raise ConfigError(f"{a.folder} and {b.folder} do not fit together: they differ in {', '.join(found)}")


def check_same_tokens_as_base(config: RunConfig, run: Parent) -> None:
    """:func:`check_same_tokens` of a run and the model that ``config`` names.

    Raises:
        ConfigError: the tokenizer, the chat template or the special tokens differ; says which.
    """
    if run.manifest is None:
        return
    mine, theirs = _model_of(config), _without_name(run.manifest["model"])
    if mine is None or theirs is None:
        return
    template, other = config.chat_template, run.manifest["config"]["chat_template"]
    mine = {**mine, "weights": None, **({"chat_template": _template(template)} if template else {})}
    written = run.manifest["fingerprints"]["chat_template"]
    theirs = {**theirs, "weights": None, **({"chat_template": written} if other else {})}
    if found := fingerprints.differences(mine, theirs):
        raise ConfigError(f"{config.model} and {run.folder} do not fit together: they differ in {', '.join(found)}")


def tuner(record: Mapping[str, Any]) -> Selected:
    """The tuner of a finished run, with its settings; ``record`` is the manifest.

    Raises:
        PluginError: it is not installed; names the distribution that was there when the run was trained.
    """
    registry, name = Registry(), record["tuner"]
    for plugin in record["config"]["plugins"]:
        with contextlib.suppress(PluginError):  # only the tuner matters here
            registry.activate(plugin)
    if not registry.has("tuner", name):
        gone = {d: v for d, v in record["versions"].items() if not manifest.versions([d])}
        if gone:
            had = " and ".join(f"{distribution} {version}" for distribution, version in gone.items())
            raise PluginError(
                f"tuner '{name}' is not installed. The run was trained with {had}: pip install {' '.join(gone)}"
            )
    return select(registry, "tuner", name, [record["config"]["tuner"]])


def _template(path: str) -> str:
    return fingerprints.text(paths.expand(path).read_text(encoding="utf-8"))


def _model_of(config: protocols.RunConfig) -> dict[str, Any] | None:
    """Fingerprints of the model that ``config`` names, where its files are here."""
    if config.model.startswith(bundled.PREFIX):
        folder: Path | None = bundled.model(config.model)
    else:
        folder = base.folder_of(base.locate(config.model, lambda line: None))
    return fingerprints.of(folder) if folder is not None and folder.exists() else None


def _model_differences(config: RunConfig, record: Mapping[str, Any]) -> list[str]:
    now, then = _model_of(config), _without_name(record["model"])
    if now is None or then is None or config.model != record["model"]["name"]:
        return []
    return fingerprints.differences(then, now)


def _without_name(model: Mapping[str, Any]) -> dict[str, Any] | None:
    prints = {key: value for key, value in model.items() if key != "name"}
    return prints or None


def _leaves(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key)


def _at(table: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table
