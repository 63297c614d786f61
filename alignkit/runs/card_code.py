"""Code that loads a run with PEFT or Transformers, for its model card, in which ``FOLDER`` is the run folder."""

from __future__ import annotations

from typing import Any


def usage(record: dict[str, Any]) -> str:
    """Commands and code that use the run whose manifest is ``record``."""
    return _reward(record) if record["role"] == "reward" else _policy(record)


def _policy(record: dict[str, Any]) -> str:
    adapter = record["weights"] == "adapter"
    library = "PEFT" if adapter else "Transformers"
    names = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    code = _LOAD_POLICY.format(package=names[0], model=names[1], stop_ids=record["stop_ids"])
    return f"""Chat with it: `alignkit chat FOLDER`. Or load it with {library}:

```python
{code}```"""


def _reward(record: dict[str, Any]) -> str:
    normalized = record["normalisation"]
    verdict = f"**{record['verdict']}.** " if "verdict" in record else ""
    answers = f"{normalized['answers']} answers ({normalized['over']})"
    command = "L" if "export" in record else "Score rows with `alignkit score FOLDER FILE`, or l"
    code = _LOAD_REWARD.format(pad=record["pad_token_id"], stop_ids=record["stop_ids"])
    return f"""{verdict}Scores have mean 0 and standard deviation 1 on {answers}.

{command}oad it with Transformers:

```python
{code}```"""


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
_LOAD_POLICY = """from {package} import {model}
from transformers import AutoTokenizer

model = {model}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
messages = [{{"role": "user", "content": "..."}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.generate(**prompt, max_new_tokens=128, do_sample=True, eos_token_id={stop_ids})
answer = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
"""
