"""The licenses of models and data, as their own cards on this disk state them. None: unknown. Nothing is guessed."""

from __future__ import annotations

from pathlib import Path

from alignkit import bundled, paths
from alignkit.runs import manifest


def of_model(name: str, folder: Path | None) -> str | None:
    """The license of a base model. ``folder`` has its files; it may be a run, which has the license of its own base."""
    if folder is not None and manifest.is_run(folder):
        license: str | None = manifest.read(folder)["base"].get("license")
        return license
    if name.startswith(bundled.PREFIX):
        return bundled.LICENSE
    return of_card(folder / "README.md") if folder is not None else None


def of_data(path: str) -> str | None:
    """The license of a source of data: bundled, a folder, or a dataset in the hub's cache."""
    if path.startswith(bundled.PREFIX):
        return bundled.LICENSE
    folder = paths.expand(path)
    if folder.exists():
        return of_card(folder / "README.md") if folder.is_dir() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        card = try_to_load_from_cache(path, "README.md", repo_type="dataset")
    except HFValidationError:
        return None
    return of_card(Path(card)) if isinstance(card, str) else None


def of_card(file: Path) -> str | None:
    """The license in the metadata of a card."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError):  # no card, or metadata that cannot be read
        return None
    license = metadata.get("license_name") or metadata.get("license")
    names = license if isinstance(license, list) else [license]
    return ", ".join(str(name) for name in names if name) or None
