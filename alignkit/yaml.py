"""YAML without surprises: ``3e-4`` is a float, ``no`` is a string, and a duplicate key is an error."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import ConfigError, one_line

LARGEST = 100_000  # values in a document: a few lines with aliases can stand for billions

LONGEST = 10_000_000  # characters of a file: a link to a device such as /dev/zero never ends


class _Loader(yaml.SafeLoader):
    pass


# PyYAML reads YAML 1.1, where 3e-4 is a string and yes/no/on/off are booleans. In YAML 1.2 they are not.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":int", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            problem = f"a key must be a string, not {key!r}"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key}'", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def loads(text: str, source: str) -> Any:
    """Parse a YAML document.

    Raises:
        ConfigError: the text is not valid YAML, or too large. The message names ``source`` and the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > LARGEST:
            raise ConfigError(f"{source} has more than {LARGEST:,} values, with those of its aliases")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise ConfigError(f"{source}: {one_line(error)}") from None


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """The number of values in a node, with those of its aliases; infinite if it contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = itertools.chain(*inner) if isinstance(node, yaml.MappingNode) else inner
        sizes[id(node)] = 1 + sum(_size(each, sizes) for each in inner)
    return sizes[id(node)]


def load(path: Path) -> dict[str, Any]:
    """Read a YAML file whose content is a mapping. An empty file is an empty mapping."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if len(text) > LONGEST:
        raise ConfigError(f"{path} is not a config file: it is longer than {LONGEST:,} characters")
    value = loads(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must be a mapping (key: value), not a {type(value).__name__}")
    return value


def dumps(value: Any) -> str:
    """``value`` as YAML, with keys in their order. :func:`loads` returns an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def dumps_inline(value: Any) -> str:
    """``value`` as YAML on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=100_000)
    return text.removesuffix("\n").removesuffix("...").strip()


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers  # quote what the loader would convert
_Dumper.add_multi_representer(dict, yaml.SafeDumper.represent_dict)
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))
