"""Uploads to a stand-in for the hub, with the real client library."""

from __future__ import annotations

from pathlib import Path

import pytest
from upload_server import UploadServer

from alignkit import AlignkitError
from alignkit.exporting import push

# huggingface_hub streams files in a way that its HTTP library no longer likes
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 1000)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "export.json").write_text('{"run": {"folder": "/home/somebody/runs/ppo"}}')
    return tmp_path


def error_of_check(repo: str) -> str:
    with pytest.raises(AlignkitError) as raised:
        push.check(repo)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_folder_becomes_a_private_repository(hub: UploadServer, folder: Path) -> None:
    push.check("me/model")
    assert push.upload(folder, "me/model", public=False) == f"{hub.url}/me/model"

    repository = hub.repositories["me/model"]
    assert repository["private"]
    uploaded = ("model.safetensors", "README.md", "config.json")  # export.json has paths of this machine
    assert repository["files"] == {name: (folder / name).read_bytes() for name in uploaded}


def test_a_public_repository_is_private_until_all_files_are_in_it(hub: UploadServer, folder: Path) -> None:
    push.upload(folder, "me/model", public=True)

    assert not hub.repositories["me/model"]["private"]
    paths = [request.split()[1] for request in hub.requests]
    assert paths.index("/api/models/me/model/settings") > paths.index("/api/models/me/model/commit/main")


@pytest.mark.parametrize("fails", ["/stored/", "/commit/", "/settings"])
def test_a_failed_upload_leaves_no_repository(
    fails: str, hub: UploadServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    hub.fails = fails
    with pytest.raises(AlignkitError, match="^--push me/model: .*") as raised:
        push.upload(folder, "me/model", public=True)

    assert "\n" not in str(raised.value)
    assert hub.repositories == {}


def test_a_taken_name_is_an_error_and_its_repository_is_not_touched(hub: UploadServer, folder: Path) -> None:
    hub.repositories["me/model"] = {"private": False, "files": {"theirs": b""}}

    assert error_of_check("me/model") == "--push me/model: the repository exists already. Choose another name"
    with pytest.raises(AlignkitError, match="409"):
        push.upload(folder, "me/model", public=False)
    assert hub.repositories["me/model"] == {"private": False, "files": {"theirs": b""}}


def test_what_cannot_be_uploaded_to_is_an_error_before_anything_is_exported(
    hub: UploadServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "user/model" in error_of_check("model")
    assert error_of_check("me/a model").startswith("--push me/a model: HFValidationError: ")
    hub.role = "read"
    assert "can only read" in error_of_check("me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "Invalid user token" in error_of_check("me/model")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "hf auth login" in error_of_check("me/model")


def test_a_hub_that_cannot_be_reached_is_an_error(hub: UploadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert error_of_check("me/model").startswith("--push me/model: ")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline" in error_of_check("me/model")
