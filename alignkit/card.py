"""The model card of a run folder."""

from __future__ import annotations

from typing import Any

from alignkit import yaml


def render(manifest: dict[str, Any]) -> str:
    """``README.md`` for a run, from its manifest."""
    stage, tuner, base = manifest["stage"], manifest["tuner"], manifest["base"]["name"]
    adapter = manifest["weights"] == "adapter"
    front = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
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

| metric | value |
|---|---|
{metrics}

Talk to it with `alignkit chat FOLDER`, or load it with plain {"PEFT" if adapter else "Transformers"}:

```python
{_LOAD_ADAPTER if adapter else _LOAD_MODEL}```

The run is made again by `alignkit train -c config.yaml --output ELSEWHERE`. Its settings:

```yaml
{yaml.dumps(config)}```
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
