"""The ``model_kwargs`` table: each argument of ``from_pretrained`` is accepted, or refused with what to do instead."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from alignkit import ConfigError
from alignkit.config import model_kwargs, resolve, resume_rules, trust
from alignkit.config.resolve import parse_override
from alignkit.config.settings import merge
from alignkit.registry import Registry
from alignkit.runs import base

UNUSED = {"mirror", "from_pipeline", "from_auto_class", "tqdm_class"}  # of other callers, or without an effect


def resolved(*overrides: str, plugin: str = "sft") -> dict[str, Any]:
    settings = merge({"plugins": [plugin]}, *map(parse_override, overrides))
    return resolve(Registry(), {}, settings).model_kwargs


def test_every_argument_of_from_pretrained_is_accepted_or_refused() -> None:
    """A release of Transformers with another one fails here: decide which it is."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    known = set(model_kwargs.OPTIONS) | set(model_kwargs.REFUSED) | UNUSED
    named = {p.name for p in inspect.signature(PreTrainedModel.from_pretrained).parameters.values()}
    named -= {"pretrained_model_name_or_path", "model_args", "kwargs"}
    for method in (PreTrainedModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        named |= set(re.findall(r'kwargs\.pop\("([a-z]\w+)"', inspect.getsource(method)))

    assert len(named) > 25
    assert named - known == set()
    assert not set(model_kwargs.OPTIONS) & set(model_kwargs.REFUSED)


@pytest.mark.parametrize("name", model_kwargs.REFUSED)
def test_what_alignkit_decides_is_refused_with_what_to_do_instead(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model_kwargs.{name} is not supported: \w.+"):
        resolved(f"model_kwargs.{name}=1")


def test_the_names_of_attention_are_those_of_transformers() -> None:
    from transformers import AttentionInterface

    plain = {name for name in AttentionInterface().keys() if "|" not in name}  # noqa: SIM118
    assert set(model_kwargs.ATTENTION) == plain | {"eager"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["atn_implementation=eager"], "unknown key model_kwargs.atn_implementation. Did you mean 'attn_implementati"),
        (["attn_implementation=fast"], "attn_implementation: 'fast' is not supported. Choose one of sdpa, eager"),
        (["attn_implementation=kernels-community/x"], "is not supported: kernels of the hub are code"),
        (["attn_implementation=flash_attention_2"], "flash_attention_2 needs a package that is not installed"),
        (["trust_remote_code=1"], "trust_remote_code: Input should be a valid boolean"),
        (["revision=1234567"], r"revision: Input should be a valid string \(got 1234567\). Write it in quotes"),
        (["device_map={model: 0, lm_head: 1}"], "device_map: each model is on one device as a whole"),
        (["device_map=balanced"], "device_map: balanced is not supported: each model is on one device as a whole"),
    ],
)
def test_wrong_values_are_errors_before_torch_is_imported(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(*(f"model_kwargs.{setting}" for setting in settings))


def test_flash_attention_on_a_cpu_is_an_error_of_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_kwargs.FLASH, "flash_attention_2", ("json",))  # a package that is installed
    assert resolved("model_kwargs.attn_implementation=flash_attention_2")
    with pytest.raises(ConfigError, match="flash_attention_2 does not work on a CPU"):
        resolved("model_kwargs.attn_implementation=flash_attention_2", "train.use_cpu=true")


def test_the_table_is_merged_key_by_key_and_null_removes_a_key() -> None:
    file = {"model_kwargs": {"revision": "v1", "attn_implementation": "eager"}}
    cli = {"plugins": ["sft"], "model_kwargs": {"revision": None, "rms_norm_eps": 0.1}}

    assert resolve(Registry(), file, cli).model_kwargs == {"attn_implementation": "eager", "rms_norm_eps": 0.1}
    assert resolve(Registry(), {"model_kwargs": None}, {"plugins": ["sft"]}).model_kwargs == {}


def test_a_resume_may_change_where_the_model_is_and_nothing_else() -> None:
    """A run of an earlier version has no such table, which is an empty one."""
    config = resolve(Registry(), {}, {"plugins": ["sft"], "model_kwargs": {"device_map": "auto"}})
    record = config.to_dict()
    del record["model_kwargs"]
    (change,) = resume_rules.changes(record, config)
    assert (change.name, change.allowed) == ("model_kwargs.device_map", True)

    changed = resolve(Registry(), {}, {"plugins": ["sft"], "model_kwargs": {"attn_implementation": "eager"}})
    assert [change.allowed for change in resume_rules.changes(record, changed)] == [False]


def test_a_revision_of_what_is_not_on_the_hub_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="model_kwargs.revision has no effect: .* is not a model of the hub"):
        base.check(str(tmp_path), "v1")
    with pytest.raises(ConfigError, match="model_kwargs.revision has no effect: bundled:smollm2-135m is not a model"):
        base.check("bundled:smollm2-135m", "v1")


def test_only_the_user_can_allow_the_code_of_a_repository() -> None:
    """A run folder may be a stranger's."""
    table = {"trust_remote_code": True, "revision": "v1", "device_map": "auto", "attn_implementation": "eager"}
    assert model_kwargs.inherited(table) == {"revision": "v1", "attn_implementation": "eager"}


def test_a_config_file_cannot_allow_the_code_of_a_repository() -> None:
    setting = {"model_kwargs": {"trust_remote_code": True}}
    config = resolve(Registry(), setting, {"plugins": ["sft"]})
    with pytest.raises(ConfigError, match="runs the code of .*, and it is set in a file. If you trust both, add"):
        trust.check_config(Registry(), config, {"plugins": ["sft"]})
    for written in (setting, {"sft": setting}, {"stages": {"sft": setting}}):
        trust.check_config(Registry(), config, {"plugins": ["sft"], **written})
