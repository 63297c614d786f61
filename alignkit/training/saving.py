"""Saves a finished run: its final metrics, the model, the manifest and the model card."""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING, Any

from alignkit.config import named_code
from alignkit.data.reading import Rows
from alignkit.errors import PluginError
from alignkit.protocols import Run
from alignkit.registry import in_memory
from alignkit.runs import base, card, fingerprints, licenses, manifest, rounds
from alignkit.runs.resume import past_extensions
from alignkit.training import measures
from alignkit.training.costs import Costs

if TYPE_CHECKING:
    import transformers


def final_metrics(trainer: transformers.Trainer) -> dict[str, float]:
    """The training loss, and the held-out metrics after training and, as ``first_eval_...``, before it."""
    if trainer.eval_dataset is not None:
        steps = [log["step"] for log in trainer.state.log_history if any(name.startswith("eval_") for name in log)]
        if trainer.state.global_step not in steps or trainer.args.load_best_model_at_end:
            trainer.evaluate()
    metrics: dict[str, float] = {}
    for log in trainer.state.log_history:
        held_out = {name: value for name, value in log.items() if name.startswith("eval_")}
        metrics.update({f"first_{name}": value for name, value in held_out.items() if log["step"] == 0})
        stale = {f"{name}_error" for name in held_out}  # of an earlier evaluation
        metrics = {name: value for name, value in metrics.items() if name not in stale} | held_out
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    if losses:  # the Trainer's own train_loss leaves out the steps before a resume
        metrics["train_loss"] = sum(losses) / len(losses)
    timing = ("_runtime", "_per_second")
    return {name: value for name, value in metrics.items() if not name.endswith(timing)}


def save(
    run: Run,
    source: Rows,
    eval_source: Rows | None,
    trainer: transformers.Trainer,
    metrics: dict[str, float],
    more: dict[str, Any],
    costs: Costs,
) -> None:
    """Write model, tokenizer, manifest and card into the unfinished run folder. ``more`` joins the manifest."""
    if config := getattr(trainer.model, "config", None):
        config.pad_token_id = run.score_pad_token_id  # the Trainer set it to that of the tokenizer
    trainer.save_model(str(run.folder))
    if not trainer.is_world_process_zero():
        return
    if missing := manifest.missing_file(run.folder):
        raise PluginError(
            f"{run.registry.describe(run.config.stage.component)} saved no {missing}. Derive its trainer from "
            "alignkit.online.RolesTrainer, or save with save_pretrained. Then --resume finishes this run"
        )
    if not (run.folder / "tokenizer_config.json").exists():
        run.tokenizer.save_pretrained(str(run.folder))
    (run.folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml has the same settings
    (run.folder / "checkpoints" / "README.md").unlink(missing_ok=True)  # TRL's card; ours is in the run folder
    record = {**manifest_of(run, source, eval_source, metrics, trainer.state.global_step, costs), **more}
    manifest.write_atomically(run.folder / "README.md", card.render(record, run.folder))
    manifest.write_json(run.folder / manifest.FILE, record)
    if run.config.train.get("save_strategy") == "no":
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


def manifest_of(
    run: Run, source: Rows, eval_source: Rows | None, metrics: dict[str, float], steps: int, costs: Costs
) -> dict[str, Any]:
    """The manifest: what was trained, from which runs and data, and with which settings and versions."""
    config = run.config
    base_revision = run.model_kwargs.get("revision")
    model_revision = run.records["policy"]["model"].get("revision") if "policy" in run.records else base_revision
    base_folder = base.folder_of(run.base, base_revision)
    model_folder = base.folder_of(base.locate(config.model, run.say), model_revision)
    parents = {
        role: {"folder": os.path.abspath(folder), "weights": fingerprints.weights(folder)}
        for role, folder in run.parents.items()
    }
    records = dict(run.records)
    if base_folder is not None and manifest.is_run(base_folder) and "policy" not in parents:
        parents["policy"] = {"folder": os.path.abspath(base_folder), "weights": fingerprints.weights(base_folder)}
        records["policy"] = manifest.read(base_folder)
    sampled_from = [origin for each in source.sources for origin in each.sampled_from]
    eval_sources = eval_source.sources if eval_source else []
    components = [config.stage, config.tuner, config.optimizer, config.loss]
    providers = [plugin.distribution for plugin in run.registry.active]
    libraries = ["torch", "transformers", "trl", "peft", "accelerate", "datasets"]
    return {
        "manifest_version": manifest.VERSION,
        "stage": config.stage.component.name,
        "role": config.stage.component.role,
        "tuner": config.tuner.component.name,
        "loss": config.loss.component.name,
        "weights": "adapter" if (run.folder / "adapter_config.json").exists() else "model",
        "model": {
            "name": config.model,
            "revision": model_revision,  # the commit of a model of the hub
            **(fingerprints.of(model_folder) if model_folder else {}),
        },
        "base": {  # what the adapter is for: the model, or a parent without adapters
            "name": config.model if run.base == base.locate(config.model, run.say) else run.base,
            "located": os.path.abspath(run.base) if os.path.isdir(run.base) else run.base,
            "revision": base_revision,
            "weights": fingerprints.weights(base_folder) if base_folder else None,
            "config": fingerprints.config(base_folder) if base_folder else None,
            "license": licenses.of_model(config.model, base_folder),
        },
        "fingerprints": fingerprints.of(run.folder),
        "stop_ids": run.stop_ids,
        "today": run.today,  # the date that chat templates get
        "parents": parents,
        "round": rounds.of(config.stage.component, records, sampled_from),
        "feedback": rounds.uses_feedback(config.stage.component),
        "data": {
            "source": source.path,
            "fingerprint": source.fingerprint,
            "format": source.format,
            "sources": [
                {
                    "path": each.path,
                    "fingerprint": each.fingerprint,
                    "license": licenses.of_data(each.path),
                    "format": each.format,
                    "rows": each.rows,
                    "weight": each.weight,
                    "sampled_from": each.sampled_from,
                }
                for each in source.sources
            ],
            "eval_sources": [{"path": each.path, "fingerprint": each.fingerprint} for each in eval_sources],
            "train_rows": len(run.train_rows) if run.streamed_rows is None else run.streamed_rows,
            "eval_rows": len(run.eval_rows),
            "skipped_rows": run.skipped,
            "lengths": measures.row_lengths(run),
        },
        "metrics": metrics,
        "steps": steps,
        "longer": past_extensions(run.folder),  # the steps at which it was extended, and by which settings
        "seconds": round(costs.seconds, 1),
        "peak_memory": costs.peak_memory,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "dtype": str(run.dtype).removeprefix("torch."),
        "processes": run.processes,
        "versions": manifest.versions(
            ["alignkit", *providers, *libraries, *(r for c in components for r in c.component.requires)]
        ),
        "config": config.to_dict(),
        "code": named_code.fingerprints(config.to_dict()),
        "in_memory": in_memory.sources(run.registry.active),
    }
