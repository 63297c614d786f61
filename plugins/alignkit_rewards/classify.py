"""Any sequence-classification model as a reward: checking its files, choosing the label, scoring answers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit import (
    AlignkitError,
    Answers,
    ConfigError,
    DataError,
    Demonstration,
    Message,
    Prompt,
    Ranking,
    Run,
    did_you_mean,
    one_line,
)
from alignkit.data import conversation_ids, encode_answer, pad_token, prompt_of, prompt_text, tokenizer_of_run
from alignkit.runs import is_run, locate_model, model_folder, read_manifest

if TYPE_CHECKING:
    from alignkit_rewards.config import ClassifierConfig

HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # the last layers of Transformers' heads


def check(config: ClassifierConfig) -> None:
    """Check the model's ``config.json``, if its files are on this machine. Imports no torch.

    Raises:
        ConfigError: it is a language model without a score head, or the label is unknown or missing.
    """
    if config.model is None:
        raise ConfigError("reward 'classifier' needs reward.model: a sequence-classification model")
    if config.model.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(config.model)):
        raise ConfigError(f"reward.model: no folder {config.model}")
    folder = model_folder(os.path.expanduser(config.model))
    if folder is None or not (folder / "config.json").exists():
        return  # on the hub, or an adapter: checked when it is loaded
    try:
        model_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'} is not valid JSON: {error}") from None
    architectures = model_config.get("architectures") or []
    if architectures and all(name.endswith(("CausalLM", "LMHeadModel")) for name in architectures):
        raise ConfigError(
            f"reward.model: {config.model} is a language model ({architectures[0]}) without a trained score head. "
            "Name a sequence-classification model, or train a reward model with --plugin rm"
        )
    names = model_config.get("id2label") or {
        number: f"LABEL_{number}" for number in range(model_config.get("num_labels", 2))
    }
    label_of(config, [names[number] for number in sorted(names, key=int)])


def label_of(config: ClassifierConfig, names: Sequence[str]) -> int:
    """The index of the label whose logit is the score.

    Raises:
        ConfigError: there is no such label, or none is set and the model has several.
    """
    label, listed = config.label, ", ".join(f"{name} ({number})" for number, name in enumerate(names))
    if label is None:
        if len(names) > 1:
            raise ConfigError(
                f"{config.model} has {len(names)} labels: set reward.label to the one that is the score: {listed}"
            )
        return 0
    if isinstance(label, str):
        if label not in names:
            raise ConfigError(f"{config.model} has no label {label}.{did_you_mean(label, names)} Labels: {listed}")
        return list(names).index(label)
    if not 0 <= label < len(names):
        raise ConfigError(f"{config.model} has no label {label}. Labels: {listed}")
    return label


def load(name: str, run: Run) -> tuple[Any, str]:
    """The model in the number format of its files, and the place of its tokenizer.

    A PEFT adapter is put on its base, with the head that was saved with it.

    Raises:
        ConfigError: weights are missing, which Transformers would initialize at random.
        AlignkitError: the model cannot be loaded.
    """
    from peft import PeftConfig, PeftModel, load_peft_weights
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import find_adapter_config_file

    located, saved = locate_model(name, run.say), dict[str, Any]()  # weights that are saved with an adapter
    try:
        base, kwargs, adapter = located, dict[str, Any](), find_adapter_config_file(located) is not None
        if adapter:
            base = str(PeftConfig.from_pretrained(located).base_model_name_or_path)
            weights = load_peft_weights(located, device="cpu")
            saved = {key.removeprefix("base_model.model."): tensor for key, tensor in weights.items()}
            labels = next((len(saved[key]) for key in HEADS if key in saved), None)
            kwargs = {} if labels is None else {"num_labels": labels}
        model, report = AutoModelForSequenceClassification.from_pretrained(
            base, dtype="auto", output_loading_info=True, trust_remote_code=False, **kwargs
        )
        missing = sorted(set(report["missing_keys"]) - set(saved))
        if missing:
            raise ConfigError(
                f"reward.model: {name} is not a trained classifier: its files lack {', '.join(missing[:3])}"
                f"{' and others' if len(missing) > 3 else ''}"
            )
        scores_in_fp32(model, base)
        if adapter:  # its head takes the dtype of the one that it replaces, fp32
            model = PeftModel.from_pretrained(model, located)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise AlignkitError(f"reward.model: {name} could not be loaded: {one_line(error)}") from error
    return model.eval().to(run.device), base if adapter and not _has_tokenizer(located) else located


def _has_tokenizer(located: str) -> bool:
    folder = model_folder(located)
    return folder is None or (folder / "tokenizer_config.json").exists()


def scores_in_fp32(model: Any, located: str) -> None:
    """Compute everything after the trunk in fp32: bf16 has only 128 different scores between 1 and 2."""
    from alignkit.models import head_in_fp32

    head_in_fp32(model, located)
    for name, module in model.named_children():
        if name != model.base_model_prefix:
            module.register_forward_pre_hook(
                lambda _, inputs: tuple(x.float() if x.is_floating_point() else x for x in inputs)
            )


def build(config: ClassifierConfig, run: Run) -> Callable[[Answers], list[float]]:
    """A function that scores answers as text, with the model's own chat template and tokenizer."""
    import torch
    from transformers import AutoTokenizer

    model, tokenizer_at = load(str(config.model), run)
    label = label_of(config, names := [model.config.id2label[i] for i in sorted(model.config.id2label)])
    of_label = f"logit of label '{names[label]}' ({label})" if len(names) > 1 else "the logit"
    run.say(f"score: {of_label} of {config.model}")
    folder = Path(locate_model(str(config.model), run.say))
    record = read_manifest(folder) if is_run(folder) else None
    if record:
        tokenizer = tokenizer_of_run(folder, record)
    else:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_at, trust_remote_code=False)
    if tokenizer.pad_token is None:  # a decoder-only model, which scores at the last token that is not padding
        tokenizer.pad_token = pad_token(tokenizer)
    batch = config.batch
    if model.config.pad_token_id is None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        batch = 1  # without a pad token, the model scores at the last token of the row
    elif model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or sys.maxsize)

    def encode(prompt: Any, answer: str) -> list[int]:
        if record:  # a run of stage rm, which scores at the token that ends the answer
            return encode_answer(tokenizer, prompt, answer, record["stop_ids"])[0]
        if tokenizer.chat_template is None:
            return list(tokenizer(f"{prompt_text(prompt)}\n{answer}")["input_ids"])
        return conversation_ids(tokenizer, [*prompt, Message(role="assistant", content=answer)])

    check_lengths(run, lambda prompt: len(encode(prompt, "")), longest)

    def score(answers: Answers) -> list[float]:
        encoded = [encode(prompt, text) for prompt, text in zip(answers.prompts, answers.texts, strict=True)]
        for ids, text in zip(encoded, answers.texts, strict=True):
            if len(ids) > longest:
                tokens = f"{len(ids)} tokens with its prompt, over the {longest} of reward 'classifier'"
                raise DataError(f"this answer has {tokens}: {text!r}")
        scores: list[float] = []
        for start in range(0, len(encoded), batch):
            inputs = tokenizer.pad({"input_ids": encoded[start : start + batch]}, return_tensors="pt")
            with torch.no_grad():
                scores += model(**inputs.to(model.device)).logits[:, label].float().tolist()
        return scores

    return score


def check_lengths(run: Run, length: Any, longest: int) -> None:
    """Check that the model can take the longest prompt with an answer. ``length`` counts the tokens of a prompt.

    Raises:
        ConfigError: the longest prompt alone is too long.
    """
    rows = [row for _, row in [*getattr(run, "train_rows", []), *getattr(run, "eval_rows", [])]]
    prompts = [prompt_of(row) for row in rows if isinstance(row, Prompt | Ranking | Demonstration)]
    prompts.sort(key=lambda prompt: sum(len(turn["content"] or "") for turn in prompt))
    most = max(map(length, prompts[-16:]), default=0)  # tokenize only the longest texts
    answer = getattr(run.config.stage.config, "response_length", 0) if prompts else 0
    if most >= longest:
        raise ConfigError(
            f"reward 'classifier' takes up to {longest} tokens, and the longest prompt alone has {most}: remove long "
            "prompts, or use a model with a longer context"
        )
    if most + answer > longest:
        run.say(
            f"warning: reward 'classifier' takes up to {longest} tokens; the longest prompt has {most}, and answers "
            f"have up to {answer}. An answer that is too long is an error"
        )
