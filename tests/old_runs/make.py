"""Makes the run folders of earlier versions that ``test_old_runs.py`` opens and resumes.

For each version check the commit out and run this file with its code, with the names of runs::

    git worktree add /tmp/old a30788b
    PYTHONPATH=/tmp/old:/tmp/old/plugins python tests/old_runs/make.py tests/old_runs/a30788b.tar.xz full/sft lora/sft

=============  ========================================================================================================
``a30788b``    before resume, scalar heads and sampling were revised
``472d5fe``    before the core was split into packages
``61ce16d``    with the stages that came later: GRPO, KTO and RAHF
=============  ========================================================================================================

An archive holds a tiny random model, data, and for each of these names of ``COMMANDS`` a finished run under
``finished/`` and one under ``cut/`` that was killed right after the checkpoint of half its steps. Only one finished run
keeps its checkpoint, from which it can be trained on. Text files have the working folder replaced by ``FOLDER``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = "/runs"

TRAIN = ["train.use_cpu=true", "train.bf16=false", "train.learning_rate=0.01", "train.save_total_limit=1"]
STEPS = ["train.max_steps=4", "train.save_steps=2", "train.logging_steps=1", "data.eval_size=4"]
STEPS += ["train.per_device_train_batch_size=2", "train.per_device_eval_batch_size=4"]
ADAPTER = ["--plugin", "lora", "tuner.r=2", "tuner.lora_alpha=4"]
PPO = ["ppo.batch_size=4", "ppo.minibatches=2", "ppo.iterations=2", "ppo.save_every=1", "ppo.response_length=8"]

# name of the run -> arguments of `alignkit train`, without --output
COMMANDS: dict[str, list[str]] = {
    "full/sft": ["--plugin", "sft", "--plugin", "full", "--data", "demonstrations.jsonl", *STEPS],
    "lora/sft": ["--plugin", "sft", *ADAPTER, "tuner.lora_dropout=0.1", "--data", "demonstrations.jsonl", *STEPS],
    "lora/rm": ["--plugin", "rm", *ADAPTER, "--data", "rankings.jsonl", "rm.policy=finished/lora/sft", *STEPS],
    "lora/ppo": [
        *("--plugin", "ppo", *ADAPTER, "--data", "prompts.jsonl", "ppo.policy=finished/lora/sft"),
        *("reward.path=finished/lora/rm", *PPO, "data.eval_size=2"),
    ],
    "lora/dpo": [
        *("--plugin", "dpo", *ADAPTER, "--data", "rankings.jsonl", "dpo.policy=finished/lora/sft", *STEPS),
        "dpo.response_length=8",
    ],
    "lora/grpo": [
        *("--plugin", "grpo", *ADAPTER, "--data", "prompts.jsonl", "grpo.policy=finished/lora/sft"),
        *("reward.path=finished/lora/rm", "grpo.samples_per_prompt=2", "data.eval_size=2"),
        *(setting.replace("ppo.", "grpo.") for setting in PPO),
    ],
    "lora/kto": [
        *("--plugin", "kto", *ADAPTER, "--data", "rankings.jsonl", "kto.policy=finished/lora/sft", *STEPS),
        *("kto.response_length=8", "train.per_device_train_batch_size=4"),
    ],
    "lora/rahf": [
        *("--plugin", "rahf", *ADAPTER, "--data", "rankings.jsonl", "rahf.policy=finished/lora/sft", *STEPS),
        "rahf.response_length=8",
    ],
}

TRAINED_ON = "lora/sft"  # the finished run that keeps its checkpoint

# A run that is killed as soon as its first checkpoint is complete.
KILLED = """
import os, sys
from transformers.trainer_callback import CallbackHandler
on_save = CallbackHandler.on_save

def kill(self, args, state, control):
    on_save(self, args, state, control)
    os._exit(9)

CallbackHandler.on_save = kill
from alignkit.cli import main
sys.exit(main(sys.argv[1:]))
"""


def command(name: str, output: str) -> list[str]:
    """The arguments of ``alignkit`` for a run of ``COMMANDS`` that goes to ``output/NAME``."""
    return ["train", "--model", "model", "--output", f"{output}/{name.split('/')[0]}", *COMMANDS[name], *TRAIN]


def make_inputs() -> None:
    """A two-layer model of random weights, its tokenizer, and rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [(f"What is {n} and one?", f"It is {n + 1}.") for n in range(12)]
    demonstrations = [{"prompt": prompt, "response": answer} for prompt, answer in rows]
    rankings = [
        {"prompt": prompt, "responses": [answer, "No idea.", "No."], "ranks": [0, 1, 1]} for prompt, answer in rows
    ]
    prompts = [{"prompt": prompt} for prompt, _ in rows]
    for name, of in {"demonstrations": demonstrations, "rankings": rankings, "prompts": prompts}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=288, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for row in rows for text in row), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained("model")


def make(archive: Path, names: list[str]) -> None:
    """Train each run twice, once to its end, and pack the folders."""
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        make_inputs()
        for name in names:
            subprocess.run([sys.executable, "-m", "alignkit", *command(name, "finished")], check=True)
            killed = subprocess.run([sys.executable, "-c", KILLED, *command(name, "cut")])
            assert killed.returncode == 9, name
        for name in set(names) - {TRAINED_ON}:
            shutil.rmtree(f"finished/{name}/checkpoints")
        for picture in Path().rglob("curves.*"):
            picture.unlink()
        relocate(Path(), os.getcwd(), FOLDER)
        with tarfile.open(archive, "w:xz", preset=9) as tar:
            for folder in ("model", "finished", "cut", "demonstrations.jsonl", "rankings.jsonl", "prompts.jsonl"):
                tar.add(folder, filter=anonymous)


def relocate(folder: Path, before: str, after: str) -> None:
    """Change the absolute paths that run folders record."""
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".yaml", ".md", ".jsonl"):
            file.write_text(file.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the owner of the files."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute(), sys.argv[2:])
