"""``alignkit doctor``."""

from __future__ import annotations

import itertools
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

import typer
from packaging.requirements import Requirement

from alignkit import bundled
from alignkit.cli import common
from alignkit.errors import one_line
from alignkit.registry.plugin import installed

GIB = 2**30


class Check(NamedTuple):
    """A line of the report; ``problem`` is what to do, empty if there is nothing to do."""

    name: str
    value: str
    problem: str = ""


def doctor(
    as_json: bool = common.Json,
) -> None:
    """Show versions, extras, device, memory and disk space, and report problems.

    The exit status is 1 if there is a problem.
    """
    checks = [*packages(), *extras(), *plugins(), *device(), *disk()]
    if as_json:
        common.print_json([check._asdict() for check in checks])
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            typer.echo(f"{check.name:>{width}}  {check.value}{f'  <- {check.problem}' if check.problem else ''}")
    if any(check.problem for check in checks):
        raise typer.Exit(1)


def packages() -> Iterator[Check]:
    """Python, alignkit and the packages that it needs, each with a problem if its version is not supported."""
    yield Check("python", f"{platform.python_version()} on {platform.platform(terse=True)}, {sys.executable}")
    yield Check("alignkit", version("alignkit"))
    for requirement in _requirements():
        if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def extras() -> Iterator[Check]:
    """Each extra: its packages, or the command that installs what is missing."""
    by_extra: dict[str, list[Requirement]] = {}
    for requirement in _requirements():
        for name in _extras_of(requirement):
            by_extra.setdefault(name, []).append(requirement)
    for name, needed in sorted(by_extra.items()):
        if name in ("dev", "docs", "examples"):
            continue
        found = [_package(requirement) for requirement in needed]
        if missing := [each.name for each in found if not each.value]:
            yield Check(f"extra {name}", f"not installed: {', '.join(missing)}. pip install 'alignkit[{name}]'")
        else:
            problem = "; ".join(each.problem for each in found if each.problem)
            yield Check(f"extra {name}", ", ".join(f"{each.name} {each.value}" for each in found), problem)


def plugins() -> Iterator[Check]:
    """The plugins of other distributions, each with what it needs and lacks."""
    for plugin in installed():
        if plugin.distribution != "alignkit":
            unmet = "; ".join(plugin.missing)
            yield Check(f"plugin {plugin.name}", plugin.provider, f"needs {unmet}" if unmet else "")


def device() -> Iterator[Check]:
    """The device of a run, its memory and dtype. Imports torch."""
    try:
        import torch

        from alignkit.models import run_device, run_dtype
    except Exception as error:  # such as a shared library that is missing
        yield Check("device", "torch cannot be imported", one_line(error))
        return
    found = run_device({})
    dtype = str(run_dtype({})).removeprefix("torch.")
    if found.type == "cuda":
        free, total = torch.cuda.mem_get_info(found)
        yield Check("device", f"{torch.cuda.get_device_name(found)}, CUDA {torch.version.cuda}")
        yield Check("GPU memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free")
    else:
        yield Check("device", f"{found.type}, {torch.get_num_threads()} threads", _gpu_unused(torch))
    yield Check("dtype", f"{dtype}, unless train.bf16 or train.fp16 is set")
    if memory := _memory():
        yield Check("memory", f"{memory[0] / GIB:.1f} of {memory[1] / GIB:.1f} GiB free")


def disk() -> Iterator[Check]:
    """Free space in this folder and in the caches."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    for name, folder in (
        ("this folder", Path.cwd()),
        ("alignkit's cache", bundled.cache()),
        ("hub cache", HF_HUB_CACHE),
    ):
        existing = next(each for each in (Path(folder), *Path(folder).absolute().parents) if each.exists())
        free = shutil.disk_usage(existing).free
        problem = "less than 1 GiB is free" if free < GIB else ""
        yield Check(name, f"{folder}: {free / GIB:.1f} GiB free", problem)
    yield Check("hub", "offline, by HF_HUB_OFFLINE" if HF_HUB_OFFLINE else "used for hub ids that are not in its cache")


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(line) for line in requires("alignkit") or []]
    except PackageNotFoundError:  # run from a folder without being installed
        return []


def _extras_of(requirement: Requirement) -> Iterable[str]:
    """The extras of alignkit that a requirement belongs to: ``extra == "plot"`` in its marker."""
    if requirement.name == "alignkit" or requirement.marker is None:
        return []
    words = str(requirement.marker).replace("'", '"').split('"')
    return [after for before, after in itertools.pairwise(words) if before.rstrip().endswith("extra ==")]


def _package(requirement: Requirement) -> Check:
    """A package and its version, empty if it is not installed."""
    try:
        present = version(requirement.name)
    except PackageNotFoundError:
        return Check(requirement.name, "", f"{requirement.name} is not installed: alignkit needs {_spec(requirement)}")
    fits = requirement.specifier.contains(present, prereleases=True)
    return Check(requirement.name, present, "" if fits else f"alignkit needs {_spec(requirement)}")


def _spec(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _gpu_unused(torch: Any) -> str:
    """Why an NVIDIA GPU of this machine is not used; empty if there is none."""
    if shutil.which("nvidia-smi") is None or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return "this machine has an NVIDIA GPU, and this torch is built without CUDA: install a CUDA build of torch"
    return "torch cannot use the NVIDIA GPU of this machine: check its driver with nvidia-smi"


def _memory() -> tuple[int, int] | None:
    """Free and total memory in bytes; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
