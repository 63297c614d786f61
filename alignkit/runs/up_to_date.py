"""Whether a finished run is what a config describes, so that it is not trained again. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit import paths
from alignkit.config import named_code, resume_rules
from alignkit.config.resolve import RunConfig
from alignkit.data import sources
from alignkit.registry.plugin import in_memory
from alignkit.runs import fingerprints, lineage, manifest
from alignkit.runs.lineage import BASE, Parent


def is_made_by(config: RunConfig) -> bool:
    """Whether the finished run in the folder of ``config`` is what it describes."""
    record = manifest.read(config.folder)
    if any(change.resume != "may_change" for change in resume_rules.changes(record["config"], config)):
        return False
    return not differences(Parent(record["stage"], config.folder, record), config, sources.fingerprints(config.data))


def differences(run: Parent, config: RunConfig, data: Mapping[str, str]) -> list[str]:
    """Why a finished run differs from the run that ``config`` describes: settings, data, model, code, or ancestors.

    Only settings that the user gave are compared. ``data`` are the current fingerprints of the data, by name.
    """
    assert run.manifest is not None
    record, wanted = run.manifest, config.to_dict()
    ignored = {
        change.path for change in resume_rules.changes(record["config"], config) if change.resume == "may_change"
    }
    ignored |= {("stages", config.stage.component.name, role) for role in config.parents}
    reasons = [
        f"{'.'.join(path).removeprefix('stages.')} was {_at(record['config'], path)!r}, is {_at(wanted, path)!r}"
        for path in _leaves(config.stated)
        if _at(record["config"], path) != _at(wanted, path) and path not in ignored
    ]
    for name, fingerprint in _data_of(record).items():
        if data.get(name, fingerprint) != fingerprint:
            reasons.append(f"{name} has changed")
    if lineage.template(config.chat_template) not in (None, record["fingerprints"]["chat_template"]):
        reasons.append(f"the chat template {config.chat_template} has changed")
    reasons += [f"{config.model} has changed ({part})" for part in lineage.model_differences(config, record)]
    reasons += [
        f"plugin {name} has changed" for name in _changed_in_memory(record["config"]["plugins"], config.plugins)
    ]
    code = named_code.fingerprints(wanted)
    reasons += [f"{call} has changed" for call, file in record.get("code", {}).items() if code.get(call, file) != file]
    return [*reasons, *_changed_parents(run, config)]


def _data_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The recorded fingerprints of the data, by the names of :func:`alignkit.data.sources.fingerprints`."""
    data = record["data"]
    before = [{"path": data["source"], "fingerprint": data["fingerprint"]}]  # runs of one source, without `sources`
    train = {source["path"]: source["fingerprint"] for source in data.get("sources", before)}
    return train | {sources.held_out_name(each["path"]): each["fingerprint"] for each in data.get("eval_sources", [])}


def _changed_in_memory(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """The plugins in memory with the same name and other code."""
    gone = in_memory([name for name in before if name not in now])
    return [name for name in dict.fromkeys(gone) if name in in_memory(now)]


def _changed_parents(run: Parent, config: RunConfig) -> Iterator[str]:
    """Why a run starts from other runs than ``config`` names, or than are now in their folders."""
    assert run.manifest is not None
    record, stage = run.manifest, run.manifest["stage"]
    for role in dict.fromkeys([*config.parents, *record["parents"]]):
        before, now = record["config"]["stages"][stage].get(role), config.parents.get(role)
        parent = record["parents"].get(role)
        if now not in (None, before) and (BASE in (now, before) or not _is_of(paths.expand(now), parent)):
            yield f"{stage}.{role} was {before!r}, is {now!r}"
        elif parent is not None:
            folder = _folder_now(run, parent) if now in (None, BASE) else paths.expand(now)
            if manifest.is_run(folder) and fingerprints.weights(folder) != parent["weights"]:
                yield f"its {role} {folder} was trained again"


def _is_of(folder: Path, parent: Mapping[str, Any] | None) -> bool:
    """Whether a folder is that of a recorded parent, or has the same weights, such as a copy of it."""
    if parent is None:
        return False
    return folder.absolute() == Path(parent["folder"]) or fingerprints.weights(folder) == parent["weights"]


def _folder_now(run: Parent, parent: Mapping[str, Any]) -> Path:
    """The folder of a recorded parent. If it was beside the run, it still is after both were moved or copied."""
    assert run.manifest is not None
    recorded, config = Path(parent["folder"]), run.manifest["config"]
    beside = json.dumps(str(Path(config["output"]) / recorded.name)) in json.dumps(config["stages"])
    sibling = run.folder.parent / recorded.name
    return sibling if beside and manifest.is_run(sibling) else recorded


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
