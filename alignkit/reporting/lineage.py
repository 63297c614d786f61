"""The lineage of runs, as boxes and arrows: runs, the models that they start from, and the rewards they use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignkit.errors import AlignkitError
from alignkit.reporting.folders import ReportedRun
from alignkit.runs import manifest

Kind = Literal["run", "model", "outside", "missing"]


@dataclass(eq=False)
class Node:
    """A run of the report, a run outside of it, a run that is gone, or a base model."""

    key: str
    kind: Kind
    title: str
    text: str  # a second line
    run: ReportedRun | None = None
    role: str = "policy"
    depth: int = 0  # the longest way to it from a node without parents
    lane: int = 0  # nodes of one depth are in different lanes


@dataclass(frozen=True, eq=False)
class Edge:
    """``target`` was trained with ``source`` as its ``role``: ``policy``, ``reward`` or ``answers`` to learn from."""

    source: Node
    target: Node
    role: str
    stale: bool = False  # the source was trained again since


@dataclass
class Lineage:
    """A graph without circles, laid out on a grid of depths and lanes."""

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)

    @property
    def depths(self) -> int:
        return max((node.depth for node in self.nodes.values()), default=-1) + 1

    @property
    def lanes(self) -> int:
        return max((node.lane for node in self.nodes.values()), default=-1) + 1

    @property
    def stale(self) -> list[Edge]:
        return [edge for edge in self.edges if edge.stale]


@dataclass(frozen=True)
class Origin:
    """The record of a parent in the manifest of a run."""

    role: str
    folder: Path
    weights: str | None  # their fingerprint


def lineage(runs: Sequence[ReportedRun]) -> Lineage:
    """The lineage of these runs, with ancestors outside of the report."""
    graph = _Graph(runs)
    for run in runs:
        graph.add_run(run)
    result = graph.result
    _set_depths(result)
    _set_lanes(result)
    return result


class _Graph:
    def __init__(self, runs: Sequence[ReportedRun]) -> None:
        self.result = Lineage()
        self.by_folder = {run.folder.resolve(): run for run in runs}
        self.by_weights = {run.record["fingerprints"]["weights"]: run for run in runs if "fingerprints" in run.record}

    def add_run(self, run: ReportedRun) -> Node:
        key = str(run.folder.resolve())
        if key not in self.result.nodes:
            text = f"{run.stage}, {run.record['tuner']}"
            role = str(run.record.get("role", "policy"))
            self.result.nodes[key] = node = Node(key, "run", run.name, text, run, role)
            self._add_parents(node, run.record, origins(run.record) if run.is_finished else planned_origins(run))
        return self.result.nodes[key]

    def _add_parents(self, node: Node, record: dict[str, Any], parents: Iterator[Origin]) -> None:
        roles = set()
        for origin in parents:
            parent, stale = self._origin(origin)
            if parent.key != node.key:
                self.result.edges.append(Edge(parent, node, origin.role, stale))
                roles.add(origin.role)
        if "policy" not in roles:
            name = str(record["model"]["name"])
            base = self.result.nodes.setdefault(name, Node(name, "model", _short(name), "base model"))
            self.result.edges.append(Edge(base, node, "policy"))

    def _origin(self, origin: Origin) -> tuple[Node, bool]:
        """The node of a run's origin, and whether that was trained again since."""
        run = self.by_folder.get(origin.folder.resolve())
        if origin.weights and (run is None or _weights(run.record) != origin.weights):
            run = self.by_weights.get(origin.weights, run)  # a copy of the runs on another machine or in another place
        if run is not None:
            return self.add_run(run), bool(origin.weights) and _weights(run.record) != origin.weights
        return self._outside(origin)

    def _outside(self, origin: Origin) -> tuple[Node, bool]:
        key, title = str(origin.folder.resolve()), _short(str(origin.folder))
        if key in self.result.nodes:
            node = self.result.nodes[key]
            return node, False
        try:
            record = manifest.read(origin.folder)
        except AlignkitError:
            self.result.nodes[key] = node = Node(key, "missing", title, "not found", role=origin.role)
            return node, False
        node = Node(key, "outside", title, f"{record['stage']}, {record['tuner']}; not in this report")
        node.role = str(record["role"])
        self.result.nodes[key] = node
        self._add_parents(node, record, origins(record))
        return node, bool(origin.weights) and _weights(record) != origin.weights


def origins(record: dict[str, Any]) -> Iterator[Origin]:
    """The runs that a manifest names: those that the run starts from, and those whose answers are in its data."""
    for role, parent in record["parents"].items():
        yield Origin(role.partition("_")[0], Path(parent["folder"]), parent["weights"])
    named = {parent["folder"] for parent in record["parents"].values()}
    for source in record["data"].get("sources", []):
        for sampled in source["sampled_from"]:
            folder = os.path.abspath(str(sampled["model"]))
            if folder not in named and manifest.is_run(Path(folder)):
                named.add(folder)
                yield Origin("answers", Path(folder), None)


def planned_origins(run: ReportedRun) -> Iterator[Origin]:
    """The runs that the config of an unfinished run names."""

    def folder(name: str) -> Path:
        named, output = Path(name), run.config["output"]
        if not manifest.is_run(named) and named.is_relative_to(output):  # trained in another working folder
            return run.folder.parent / named.relative_to(output)
        return named

    for role in run.declared.needs if run.declared else ():
        if (name := run.settings.get(role)) not in (None, "base"):
            yield Origin(role, folder(str(name)), None)
    for name in _texts(run.settings.get("reward")):
        if manifest.is_run(folder(name)):
            yield Origin("reward", folder(name), None)


def _texts(value: Any) -> Iterator[str]:
    """All strings in nested tables and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _weights(record: dict[str, Any]) -> str | None:
    return record.get("fingerprints", {}).get("weights")


def _short(name: str) -> str:
    """The last two parts of a path or the name of a model."""
    return "/".join(name.removeprefix("bundled:").split("/")[-2:])


def described(graph: Lineage) -> str:
    """The drawing in words, for screen readers."""
    sentences = [f"{edge.source.title} is the {edge.role} of {edge.target.title}" for edge in graph.edges]
    return f"What was trained from what: {'; '.join(sentences)}."


# --- layout ----------------------------------------------------------------------------------------------------------


def _set_depths(graph: Lineage) -> None:
    """The longest way to each node. Edges that would close a circle, which only foreign files have, are removed."""
    into: dict[str, list[Edge]] = {key: [] for key in graph.nodes}
    for edge in graph.edges:
        into[edge.target.key].append(edge)
    done, on_the_way = set[str](), set[str]()

    def visit(node: Node) -> int:
        if node.key not in done:
            on_the_way.add(node.key)
            for edge in list(into[node.key]):
                if edge.source.key in on_the_way:
                    graph.edges.remove(edge)
                else:
                    node.depth = max(node.depth, visit(edge.source) + 1)
            on_the_way.remove(node.key)
            done.add(node.key)
        return node.depth

    for node in list(graph.nodes.values()):
        visit(node)


def _set_lanes(graph: Lineage) -> None:
    """A policy stays in the lane of the one that it starts from; branches and reward models get lanes of their own."""
    children: dict[str, list[Node]] = {key: [] for key in graph.nodes}
    parent: dict[str, Node] = {}
    for edge in sorted(graph.edges, key=lambda edge: edge.role != "policy"):
        if edge.target.key not in parent:
            parent[edge.target.key] = edge.source
            children[edge.source.key].append(edge.target)
    free = 0

    def place(node: Node, lane: int) -> None:
        nonlocal free
        node.lane, free = lane, max(free, lane + 1)
        policies = [child for child in children[node.key] if child.role == "policy"]
        for child in policies[:1]:
            place(child, lane)
        for child in children[node.key]:
            if child not in policies[:1]:
                place(child, free)

    for node in graph.nodes.values():
        if node.key not in parent:
            place(node, free)
