"""The model card of a run folder."""

from __future__ import annotations

from typing import Any

from alignkit import yaml


def render(manifest: dict[str, Any]) -> str:
    """The ``README.md`` of a run, from its manifest."""
    stage, tuner, base = manifest["stage"], manifest["tuner"], manifest["base"]["name"]
    adapter, reward = manifest["weights"] == "adapter", manifest["role"] == "reward"
    front = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if reward else "text-generation",
        "tags": ["alignkit", stage, tuner],
        **({} if base.startswith(("bundled:", ".", "/", "~")) else {"base_model": base}),
    }
    data, config = manifest["data"], manifest["config"]
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in manifest["metrics"].items())
    return f"""---
{yaml.dumps(front)}---

# {base.removeprefix("bundled:").split("/")[-1]}, {stage} with {tuner}

Trained by alignkit from `{base}`: stage `{stage}`, tuner `{tuner}`, loss `{manifest["loss"]}`,
{manifest["steps"]} steps on {data["train_rows"]} rows of `{data["source"]}`, {data["eval_rows"]} rows held out.
{_round(manifest)}

| metric | value |
|---|---|
{metrics}

{_reward(manifest) if reward else _policy(adapter)}

To reproduce this run: `alignkit train -c config.yaml --output OTHER_FOLDER`. Its settings:

```yaml
{yaml.dumps(config)}```
"""


def _round(manifest: dict[str, Any]) -> str:
    """The round of feedback and the runs that it builds on."""
    sampled_from = [origin["model"] for source in manifest["data"]["sources"] for origin in source["sampled_from"]]
    origins = [f"{role} `{parent['folder']}`" for role, parent in manifest["parents"].items()]
    origins += [f"answers sampled from `{model}`" for model in dict.fromkeys(sampled_from)]
    return f"Round {manifest['round']} of feedback{': ' if origins else ''}{', '.join(origins)}."


def _policy(adapter: bool) -> str:
    library, code = ("PEFT", _LOAD_ADAPTER) if adapter else ("Transformers", _LOAD_MODEL)
    return f"""Chat with it: `alignkit chat FOLDER`. Or load it with {library}:

```python
{code}```"""


def _reward(manifest: dict[str, Any]) -> str:
    normalised = manifest["normalisation"]
    verdict = f"**{manifest['verdict']}.** " if "verdict" in manifest else ""
    answers = f"{normalised['answers']} answers ({normalised['over']})"
    return f"""{verdict}Scores have mean 0 and standard deviation 1 on {answers}.

Score rows with `alignkit score FOLDER FILE`, or load it with Transformers:

```python
{_LOAD_REWARD.format(pad=manifest["pad_token_id"], stop_ids=manifest["stop_ids"])}```"""


_LOAD_REWARD = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

# the head, and so the score, is fp32
model = AutoModelForSequenceClassification.from_pretrained(
    "FOLDER", num_labels=1, pad_token_id={pad}, dtype="float32"
)
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
messages = [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]
prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
ids = tokenizer.apply_chat_template(messages, return_dict=False)
end = next(i for i, token in enumerate(ids) if i >= len(prompt) and token in {stop_ids})  # end of the answer
score = model(torch.tensor([ids[: end + 1]])).logits
"""
_LOAD_ADAPTER = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""
_LOAD_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""
