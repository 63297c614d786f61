"""The model card of a run folder: results, curves, how to load it, lineage and licenses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignkit import yaml
from alignkit.runs import card_code, curves, fingerprints, manifest
from alignkit.runs import card_results as results

PICTURE = curves.PICTURES[1]  # the hub shows no SVG in cards


def render(record: dict[str, Any], folder: Path) -> str:
    """The ``README.md`` of a run, from its manifest and the curves in its folder."""
    stage, tuner, base = record["stage"], record["tuner"], record["base"]["name"]
    data = record["data"]
    title = f"{base.removeprefix('bundled:').split('/')[-1]}, {stage} with {tuner}"
    sections = [
        f"# {title}",
        f"Trained by alignkit from `{base}`: stage `{stage}`, tuner `{tuner}`, loss `{record['loss']}`,\n"
        f"{record['steps']} steps on {data['train_rows']} rows of `{data['source']}`, {data['eval_rows']} rows held "
        f"out.\n{_round(record)}",
        *([f"## Export\n\n{_export(record['export'])}"] if "export" in record else []),
        f"## Results\n\n{results.table(record['metrics'])}",
        *([f"![The metrics of this run over its steps]({PICTURE})"] if (folder / PICTURE).exists() else []),
        f"## How to use it\n\n{card_code.usage(record)}",
        f"## Lineage\n\n{_lineage(record)}",
        f"## Licenses\n\n{_licenses(record)}",
        f"## How it was made\n\n{_making(record)}",
    ]
    return f"---\n{_metadata(record, title)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(record: dict[str, Any], title: str) -> str:
    """The card's YAML, with the results as the hub's ``model-index``."""
    from huggingface_hub import ModelCardData

    base = record["base"]
    adapter, reward = record["weights"] == "adapter", record["role"] == "reward"
    task = "text-classification" if reward else "text-generation"
    held_out = results.of_hub(record, task)
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        tags=["alignkit", record["stage"], record["tuner"]],
        base_model=None if Path(base["located"]).is_absolute() else base["name"],  # only ids of the hub
        model_name=title if held_out else None,
        eval_results=held_out or None,
    )
    return str(data.to_yaml())


def _export(export: Mapping[str, Any]) -> str:
    """A section on how a model was exported from its run, and how it differs from the run."""
    into = {"run": "its base as it was in training", "original": "the original weights of its base"}[export["base"]]
    adapter = f", with the adapter merged into {into}" if export["adapter"] else ""
    score = export["kl"] is None
    rows = [
        ["KL of the run from this model, nats per token", f"{export['kl']:.2g}"] if not score else [],
        [f"largest difference of a {'score' if score else 'log-probability'}", f"{export['largest']:.2g}"],
        ["positions with the same most likely token", f"{export['greedy_agreement']:.1%}"] if not score else [],
    ]
    return (
        f"Exported from the run `{export['run']}` in {export['dtype']}{adapter}. Compared with the run on "
        f"{export['outputs']} {'scores' if score else 'positions'} of {export['texts']}, both computed in fp32:\n\n"
        + _table(["", ""], [row for row in rows if row])
    )


def _round(record: dict[str, Any]) -> str:
    """The round of feedback and the runs that it builds on."""
    sampled_from = [origin["model"] for source in record["data"]["sources"] for origin in source["sampled_from"]]
    origins = [f"{role} `{parent['folder']}`" for role, parent in record["parents"].items()]
    origins += [f"answers sampled from `{model}`" for model in dict.fromkeys(sampled_from)]
    return f"Round {record['round']} of feedback{': ' if origins else ''}{', '.join(origins)}."


def _lineage(record: dict[str, Any]) -> str:
    """A table of this run, the runs that it builds on, and the base model, with the hashes of data and weights."""
    rows = [_lineage_row("this run", record), *_ancestors(record, set())]
    model = record["model"]
    rows.append([f"`{model['name']}`", "the base model", "", "", _hash(model.get("weights"))])
    return _table(["run", "trained by", "started from", "data", "weights"], rows) + (
        "\n\nHashes are the first twelve digits of the fingerprints in `alignkit.json`."
    )


def _ancestors(record: dict[str, Any], seen: set[str]) -> Iterator[list[str]]:
    for parent in record["parents"].values():
        folder = Path(parent["folder"])
        if parent["folder"] in seen:
            continue
        seen.add(parent["folder"])
        if not manifest.is_run(folder):
            yield [f"`{folder}`", "unknown: its folder is gone", "", "", _hash(parent["weights"])]
        elif fingerprints.weights(folder) != parent["weights"]:
            yield [f"`{folder}`", "unknown: trained again since", "", "", _hash(parent["weights"])]
        else:
            ancestor = manifest.read(folder)
            yield _lineage_row(f"`{folder}`", ancestor)
            yield from _ancestors(ancestor, seen)


def _lineage_row(name: str, record: dict[str, Any]) -> list[str]:
    parents = [f"{role} `{Path(parent['folder']).name}`" for role, parent in record["parents"].items()]
    data = record["data"]
    return [
        name,
        f"{record['stage']} with {record['tuner']}",
        ", ".join(parents) or f"`{record['base']['name']}`",
        f"{data['train_rows']} rows of `{data['source']}`, {_hash(data['fingerprint'])}",
        _hash(record["fingerprints"]["weights"]),
    ]


def _licenses(record: dict[str, Any]) -> str:
    sources = [(source["path"], source.get("license")) for source in record["data"]["sources"]]
    rows = [["base model", f"`{record['base']['name']}`", record["base"].get("license") or "unknown"]]
    rows += [["data", f"`{path}`", license or "unknown"] for path, license in sources]
    return _table(["", "", "license"], rows) + (
        "\n\nThese are the licenses that the cards of the base model and of the data state. Before you share this "
        "model, check those that\nare unknown, and set `license` in the metadata of this card."
    )


def _making(record: dict[str, Any]) -> str:
    plugins = record["config"]["plugins"]
    versions = [[name, version] for name, version in record["versions"].items()]
    named = f"Plugins: {', '.join(f'`{name}`' for name in plugins)}.\n\n" if plugins else ""
    in_memory = record.get("in_memory")
    command = "To reproduce this run: `alignkit train -c config.yaml --output OTHER_FOLDER`."
    again = _in_memory(in_memory) if in_memory else command
    return (
        f"{_table(['package', 'version'], versions)}\n\n{named}{again} Its settings:\n\n"
        f"```yaml\n{yaml.dumps(record['config'])}```"
    )


def _in_memory(plugins: Mapping[str, Mapping[str, str | None]]) -> str:
    """A section on reproducing a run with plugins that a Python session defined, with their source."""
    parts = [
        "No command reproduces this run: it used plugins of a Python session, which no distribution provides. To train "
        'it again, define them\nand pass them to `alignkit.train(config="config.yaml", ...)`.'
    ]
    for name, recorded in plugins.items():
        parts.append(f"`{name}` (fingerprint `{recorded['fingerprint']}`)")
        if recorded["source"]:
            parts[-1] += f":\n\n````python\n{recorded['source'].rstrip()}\n````"
    return "\n\n".join(parts) + "\n\n"


def _hash(fingerprint: str | None) -> str:
    return f"`{fingerprint[:12]}`" if fingerprint else "unknown"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"([|])", r"\\\1", cell) for cell in line) + " |" for line in lines)
