"""Actions that a config file or a run folder needs permission for: to run code, or send prompts or a key to a server.

Either may come from someone else. Settings with such an effect declare it (``option(..., needs_trust="runs this
code")``). They are accepted on the command line, and elsewhere only with ``--trust``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from alignkit.config import reward_parts
from alignkit.config.resolve import RunConfig
from alignkit.config.settings import Selected, texts
from alignkit.errors import ConfigError
from alignkit.registry import Registry


def check_config(registry: Registry, config: RunConfig, command_line: Mapping[str, Any]) -> None:
    """Check that each setting of a run that needs trust is written on the command line.

    Raises:
        ConfigError: one is not. It comes from a config file, or from the run that is resumed.
    """
    stage = config.stage.component.name
    tables = [command_line, command_line.get(stage) or {}, (command_line.get("stages") or {}).get(stage) or {}]
    allowed = any((table.get("model_kwargs") or {}).get("trust_remote_code") for table in tables)
    if config.model_kwargs.get("trust_remote_code") and not allowed:
        raise ConfigError(
            f"model_kwargs.trust_remote_code=true runs the code of {config.model}, and it is set in a file. If you "
            "trust both, add --trust-remote-code"
        )
    selected = [config.stage, config.tuner, config.optimizer, config.loss]
    selected += [config.rollout] if config.rollout else []
    selected += reward_parts.with_judges(registry, config.reward) if config.reward else []
    check(selected, texts(command_line))


def check(selected: Iterable[Selected], written: Iterable[str] = ()) -> None:
    """Check that each setting that needs trust is one of the texts that the user has ``written``.

    Raises:
        ConfigError: one is not.
    """
    for component, config in selected:
        for name, value, effect in _needing_trust(config):
            if not texts(value) <= set(written):
                raise ConfigError(
                    f"{component.kind} '{component.name}': {name}={value} {effect}, and it is set in a file. If you "
                    "trust the file, add --trust, or write the setting on the command line"
                )


def _needing_trust(config: Any) -> Iterator[tuple[str, Any, str]]:
    """The settings of a component that need trust: name, value, effect."""
    for field in dataclasses.fields(config):
        value, effect = getattr(config, field.name), field.metadata.get("needs_trust")
        factory = field.default_factory  # of a list
        default = field.default if factory is dataclasses.MISSING else factory()
        if effect and value != default:
            yield field.name, value, effect
