"""Memory, disk and time before the first step of SFT, with ``data.streaming`` and without, on a generated file.

    python benchmarks/streaming.py --megabytes 200

The model is tiny and random, so that the data take most of the memory. Each run is a process of its own.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_rows(file: Path, megabytes: int) -> int:
    """Write demonstrations of about 1 KB each, and return how many."""
    words = [
        f"{first}{second}" for first in ("un", "re", "over", "out") for second in ("do", "run", "set", "turn", "go")
    ]
    draw, rows = random.Random(0), 0
    with file.open("w") as out:
        while out.tell() < megabytes << 20:
            for _ in range(100):
                rows += 1
                text = " ".join(draw.choices(words, k=160))
                out.write(json.dumps({"prompt": f"Write text {rows}.", "response": text}) + "\n")
    return rows


def write_model(folder: Path) -> None:
    """Save a model of two small layers with the tokenizer of the bundled model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from alignkit.runs import locate_model

    tokenizer = AutoTokenizer.from_pretrained(locate_model("bundled:smollm2-135m", print))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(folder: Path, model: Path, data: Path, *settings: str) -> dict[str, float]:
    """Train five steps in a process, and measure it."""
    cache = folder / "cache"
    command = [sys.executable, "-m", "alignkit", "train", "--plugin", "sft", "--model", model, "--data", data]
    command += ["--output", folder / "runs", "data.eval_size=100", "data.num_proc=1", "train.max_steps=5"]
    command += ["train.eval_strategy=no", "train.logging_steps=1", "train.use_cpu=true", *settings]
    command += ["train.per_device_train_batch_size=1"]  # logits take little memory beside the rows
    started, first_step = time.monotonic(), 0.0
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step     1"):
                first_step = time.monotonic() - started
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    disk = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return {"memory": usage.ru_maxrss * 1024, "disk": disk, "first_step": first_step}


def main() -> None:
    """Measure both, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200, help="the size of the file")
    parser.add_argument("--only", choices=("memory", "stream"), help="measure only one of both")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        data, model = Path(made) / "rows.jsonl", Path(made) / "model"
        rows = write_rows(data, asked.megabytes)
        write_model(model)
        print(f"{rows} rows, {data.stat().st_size / 2**20:.0f} MiB")
        for name, settings in (("memory", ()), ("stream", ("data.streaming=true",))):
            if asked.only in (None, name):
                (Path(made) / name).mkdir()
                result = train(Path(made) / name, model, data, *settings)
                print(
                    f"{name:>8}: peak resident memory {result['memory'] / 2**20:.0f} MiB, cache on disk "
                    f"{result['disk'] / 2**20:.0f} MiB, first step after {result['first_step']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
