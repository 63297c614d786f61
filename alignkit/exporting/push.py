"""Uploads a finished export to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from alignkit.errors import AlignkitError, ConfigError, one_line
from alignkit.exporting import card


def check(repo: str) -> None:
    """Check that a new model repository can be created, before anything is exported.

    Raises:
        ConfigError: the name is invalid or taken, or there is no token that can write.
        AlignkitError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    if "/" not in repo:
        raise ConfigError(f"--push {repo}: name the repository with its owner, such as user/{repo}")
    if get_token() is None:
        raise ConfigError("--push: there is no token for the hub. Log in with `hf auth login`, or set HF_TOKEN")
    with _errors(repo):
        access = HfApi().whoami().get("auth", {}).get("accessToken", {})
        exists = HfApi().repo_exists(repo)
    if access.get("role") == "read":
        raise ConfigError("--push: the token for the hub can only read. Log in with one that can write")
    if exists:
        raise ConfigError(f"--push {repo}: the repository exists already. Choose another name")


def upload(folder: Path, repo: str, public: bool) -> str:
    """Upload an export to a new model repository, and return the address of the repository.

    The repository is private until everything is uploaded, and stays so without ``public``. ``export.json`` is not
    uploaded, because it holds paths of this machine.

    Raises:
        AlignkitError: the upload failed. The repository is deleted again.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    with _errors(repo):
        address = str(hub.create_repo(repo, private=True))
    try:
        with _errors(repo):
            hub.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="Upload model", ignore_patterns=[card.FILE]
            )
            if public:
                hub.update_repo_settings(repo, private=False)
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(Exception):
            hub.delete_repo(repo)
        raise
    return address


@contextlib.contextmanager
def _errors(repo: str) -> Iterator[None]:
    """Errors of the hub and of the connection to it, which share no base class, as one line."""
    try:
        yield
    except Exception as error:
        reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of a file
        raise AlignkitError(f"--push {repo}: {one_line(reason)}") from error
