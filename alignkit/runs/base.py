"""The base model of a run: a hub id, a folder, or a bundled model. Functions that need torch import it themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit import bundled, paths
from alignkit.config import model_kwargs
from alignkit.data import hub
from alignkit.errors import AlignkitError, ConfigError, DataError, suggestion
from alignkit.protocols import Limits
from alignkit.runs import fingerprints, manifest
from alignkit.runs.record import loads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignkit.components import Tuner


TRUST = "ALIGNKIT_TRUST_REMOTE_CODE"  # set by --trust-remote-code


def check(name: str, revision: str | None = None) -> None:
    """Check that ``name`` can be a base model, without the network and without loading it.

    Raises:
        ConfigError: no such folder or bundled model, a folder without a decoder-only model, an adapter, or a revision
            of a model that is not on the hub.
    """
    if revision is not None and (name.startswith(bundled.PREFIX) or paths.expand(name).exists()):
        raise ConfigError(f"model_kwargs.revision has no effect: {name} is not a model of the hub")
    if name.startswith(bundled.PREFIX):
        bundled.model(name)
        return
    folder = paths.expand(name) if name.startswith(("~/", "~\\")) else Path(name)
    if folder.is_file():
        raise ConfigError(f"{name} is a file. A model is a folder with a config.json, or a hub id")
    if not folder.exists():
        if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            beside = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise ConfigError(suggestion(f"no model folder {name}", folder.name, beside))
        return  # a hub id
    if (folder / "adapter_config.json").exists():
        raise ConfigError(f"{name} is an adapter, not a full model. Use its base with --model")
    if not (folder / "config.json").exists():
        raise ConfigError(f"{name} is not a model: it has no config.json{_run_inside(folder)}")
    config = _read_config(folder / "config.json")
    architectures = config.get("architectures") or []
    if config.get("is_encoder_decoder") or not any(a.endswith(("CausalLM", "LMHeadModel")) for a in architectures):
        raise ConfigError(
            f"{name} is a {' '.join(architectures) or 'model without an architecture'}, not a decoder-only model"
        )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is not the config of a model: it must be an object")
    return config


def check_kwargs(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The ``model_kwargs`` with which a command opens ``name``, a run or a model, with ``--trust-remote-code``.

    Raises:
        ConfigError: they are wrong, or given for a run, which is loaded as it was trained.
    """
    is_run = manifest.is_run(paths.expand(name))
    if given and is_run:
        raise ConfigError(f"{name} is a run, which is loaded with the model_kwargs that it was trained with")
    trusted = {"trust_remote_code": True} if os.environ.get(TRUST) else {}
    kwargs = model_kwargs.check({**trusted, **given})
    if not is_run:
        check(name, kwargs.get("revision"))
    return kwargs


def check_head(name: str, kwargs: Mapping[str, Any]) -> None:
    """Check that Transformers supports this base with a scalar head, as reward models need. Imports torch.

    Raises:
        ConfigError: it does not.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            locate(name, lambda line: None), **{"trust_remote_code": False, **of_repository(kwargs)}
        )
    except (OSError, ValueError):  # loading the model will report the error
        return
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        kind = config.model_type
        raise ConfigError(f"{name} cannot be a reward model: Transformers has no {kind} for sequence classification")


def check_trainable(name: str, revision: str | None, tuner: Tuner) -> None:
    """Check that a tuner can train this base, without the network and without loading it.

    Raises:
        ConfigError: the base is quantized, and the tuner trains its weights.
    """
    is_bundled = name.startswith(bundled.PREFIX)
    folder = None if is_bundled else folder_of(locate(name, lambda line: None), revision)
    config = folder / "config.json" if folder else None
    if tuner.adapters or config is None or not config.is_file():
        return
    if quantization := _read_config(config).get("quantization_config"):
        raise quantized_error(name, quantization.get("quant_method", "bitsandbytes"), tuner)


def quantized_error(name: str, method: str, tuner: Tuner) -> ConfigError:
    """The error for a quantized base whose weights a tuner would train."""
    return ConfigError(
        f"{name} is quantized ({method}), and tuner '{tuner.name}' would train its weights. Use --plugin lora, or the "
        "model that it was quantized from"
    )


def _run_inside(folder: Path) -> str:
    runs = [str(inside) for inside in sorted(folder.iterdir()) if inside.is_dir() and manifest.is_run(inside)]
    return f". Runs in it: {', '.join(runs)}" if runs else ""


def locate(name: str, say: Callable[[str], None]) -> str:
    """The argument for ``from_pretrained``: a hub id or an absolute path. A bundled model is converted on first use."""
    if name.startswith(bundled.PREFIX):
        return str(bundled.convert(name, say))
    folder = paths.expand(name)
    if folder.exists():
        return os.path.abspath(folder)
    hub.offline_if_unreachable()
    return name


def commit_of(located: str, revision: str | None) -> str | None:
    """The commit of a model of the hub at a revision (a branch, a tag or a commit); None for a folder.

    Downloads its ``config.json``, if it is not in the cache.

    Raises:
        AlignkitError: the model is not on the hub, is not accessible, or has no such revision.
    """
    if Path(located).is_dir():
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(located, "config.json", revision=revision)).parent.name
    except HFValidationError:  # a path that was removed after the run was planned
        raise ConfigError(f"no model folder {located}") from None
    except Exception as error:  # the errors of the hub share no base class
        raise AlignkitError(f"the model could not be loaded: {hub.reason(error, located, revision)}") from error


def of_repository(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments for a model that its config and its tokenizer are loaded with too."""
    return {name: kwargs[name] for name in ("revision", "code_revision", "trust_remote_code") if name in kwargs}


def folder_of(located: str, revision: str | None = None) -> Path | None:
    """The folder with the files of a located base: the folder itself, or the snapshot in the hub's cache.

    Raises:
        ConfigError: the path does not exist.
    """
    if Path(located).is_dir():
        return Path(located)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(located, "config.json", revision=revision)
    except HFValidationError:  # a path that was removed after the run was planned
        raise ConfigError(f"no model folder {located}") from None
    return Path(cached).parent if isinstance(cached, str) else None


def folder_on_disk(name: str, revision: str | None = None) -> Path | None:
    """The folder of a base model; None if it is not on this disk, such as a bundled model before its first use."""
    if not name.startswith(bundled.PREFIX):
        return folder_of(locate(name, print), revision)
    folder = bundled.model(name)
    return folder if folder.is_dir() else None


def stop_ids(located: str, tokenizer: PreTrainedTokenizerBase, revision: str | None = None) -> list[int]:
    """The tokens at which generation stops.

    They are the tokenizer's EOS token, those of the generation config, and the token with which the chat template
    ends a turn.
    """
    from transformers import GenerationConfig

    from alignkit.data.chat_template import turn_end

    try:
        eos = GenerationConfig.from_pretrained(located, revision=revision or "main").eos_token_id
    except OSError:  # a model without a generation config
        eos = None
    more = eos if isinstance(eos, list) else [eos]
    known = [stop for stop in [tokenizer.eos_token_id, *more] if stop is not None]
    end = turn_end(tokenizer, known)
    return list(dict.fromkeys([*known, *([] if end is None else [end])]))


def check_length(model: Any, tokens: int, what: str, instead: str) -> None:
    """Check that a loaded model can read sequences of this many tokens.

    Raises:
        DataError: its position embeddings are fewer. ``what`` names the sequence, ``instead`` the remedy.
    """
    known = limits_of(model.config.to_dict())
    if known.learnt and known.positions is not None and tokens > known.positions:
        raise DataError(
            f"{what}: {tokens} tokens are more than the {known.positions} positions of the model. {instead}"
        )


LEARNT_POSITIONS = ("gpt2", "openai-gpt", "gpt_bigcode", "gpt_neo", "opt", "biogpt")  # model types
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # keys of a config


def limits(located: str, revision: str | None = None) -> Limits:
    """The limits of a located base. Unknown if its config is not on this disk."""
    folder = folder_of(located, revision)
    if folder is None or not (folder / "config.json").exists():
        return Limits(None, None, False)
    return limits_of(_read_config(folder / "config.json"))


def limits_of(config: dict[str, Any]) -> Limits:
    """The limits according to the content of a ``config.json``."""
    text = {**config, **(config.get("text_config") or {})}
    positions = text.get("n_positions", text.get("max_position_embeddings"))
    layers = next((text[name] for name in LAYERS if name in text), None)
    return Limits(text.get("vocab_size"), positions, text.get("model_type") in LEARNT_POSITIONS, layers)


def of_run(record: Mapping[str, Any], folder: Path, say: Callable[[str], None]) -> str:
    """The base model of a finished run: that of its adapter, or the run folder itself if it holds a full model.

    Raises:
        ConfigError: the base of its adapter is gone or has changed since.
    """
    if record["weights"] == "model":
        return os.path.abspath(folder)
    name: str = record["base"]["name"]
    located = str(record["base"]["located"])
    if not os.path.isabs(located) or name.startswith(bundled.PREFIX):
        located = locate(name, say)
    check_unchanged(located, record["base"], f"{folder} is an adapter for")
    return located


def check_of_run(record: Mapping[str, Any], folder: Path) -> None:
    """Check the base of a finished run as :func:`of_run` does, without converting a bundled model."""
    name = record["base"]["name"]
    if not name.startswith(bundled.PREFIX) or bundled.model(name).is_dir():
        of_run(record, folder, lambda line: None)


def check_unchanged(located: str, recorded: Mapping[str, Any], relation: str) -> None:
    """Check that a located model is the one that a manifest records. ``relation`` is how the error begins.

    Raises:
        ConfigError: it is gone, or its weights or its config have changed since.
    """
    if os.path.isabs(located) and not os.path.isdir(located):
        raise ConfigError(f"{relation} the model in {located}, which does not exist. Restore it")
    on_disk = folder_of(located, recorded.get("revision"))
    if on_disk and recorded.get("weights") not in (None, fingerprints.weights(on_disk)):
        raise ConfigError(f"{relation} {located}, whose weights have changed since. Restore them")
    if on_disk and recorded.get("config") not in (None, fingerprints.config(on_disk)):
        raise ConfigError(f"{relation} {located}, whose config.json has changed since. Restore it")


def kwargs_of_run(own: Mapping[str, Any], located: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for ``located``, the base model of a finished run with the manifest ``record``.

    The files and the attributes of the config are those with which the run was trained. How the model computes, and
    how it gets into memory, is taken from ``own``, the ``model_kwargs`` of the run that loads it.
    """
    kept = (*model_kwargs.PLACEMENT, *model_kwargs.COMPUTE, "trust_remote_code")
    kwargs = {key: value for key, value in record["config"].get("model_kwargs", {}).items() if key not in kept}
    kwargs |= {key: value for key, value in own.items() if key in kept}
    if manifest.is_run(Path(located)):
        return {key: value for key, value in kwargs.items() if key not in model_kwargs.FILES}
    if revision := record["base"].get("revision"):
        kwargs["revision"] = revision
    return kwargs


def kwargs_to_open(located: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`kwargs_of_run` outside training: the run computes as in training.

    Raises:
        ConfigError: the base runs code of its repository, which the user did not allow.
    """
    own = dict(record["config"].get("model_kwargs", {}))
    if own.pop("trust_remote_code", False):
        own["trust_remote_code"] = True
        if not os.environ.get(TRUST):
            raise ConfigError(
                f"{record['model']['name']} runs code of its repository, and this run was trained with "
                "model_kwargs.trust_remote_code. If you trust that code, add --trust-remote-code"
            )
    kwargs = kwargs_of_run(own, located, record)
    return {key: value for key, value in kwargs.items() if key not in model_kwargs.PLACEMENT}


def with_commit(kwargs: Mapping[str, Any], located: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` with the commit of a model of the hub in place of a branch or a tag."""
    commit = commit_of(located, kwargs.get("revision"))
    return {**kwargs, "revision": commit} if commit else dict(kwargs)
