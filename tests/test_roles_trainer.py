"""A third party's stage on one trunk: without a value, with an engine that knows its run, saved and resumed exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignkit.cli import main

Install = Callable[..., None]
RunStage = Callable[..., Path]

# REINFORCE with the mean score of the batch as the baseline
REINFORCE = """
from dataclasses import dataclass
from alignkit import Loss, LossOutput, PolicyBatch, Prompt, Rollout, Sampling, Stage, hookimpl

@dataclass(frozen=True)
class Config:
    pass

class Policy:
    '''The policy gradient, times more with every call in training.'''
    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        loss = -(batch.logps * batch.advantages * batch.mask).sum() / batch.num_tokens
        return LossOutput(loss * (1 + 0.1 * self.calls), {"calls": self.calls})

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]

def build(run):
    import torch, transformers
    from alignkit import Answers
    from alignkit.data.chat_template import prompt_ids
    from alignkit.online import RolesTrainer
    from alignkit.generation.sampling import text
    from alignkit.models import Sequences, assemble

    class Reinforce(RolesTrainer):
        def get_train_dataloader(self):
            while True:
                yield self.rollout()

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            return [next(epoch_iterator)], None

        def rollout(self):
            transformers.set_seed(self.state.global_step)
            with self.roles.using("policy") as policy, torch.no_grad():
                answers = engine(policy, ids, self.roles)
            texts = [text(run.tokenizer, answer) for answer in answers]
            scores = torch.tensor(reward(Answers(prompts, texts, ids, answers), self.roles))
            sequences = Sequences.of(ids, answers, run.tokenizer.pad_token_id, self.args.device)
            return {"sequences": sequences, "advantages": (scores - scores.mean())[:, None] * sequences.mask}

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            mask = inputs["sequences"].mask
            policy = model(inputs["sequences"], ("policy", "reference"))["policy"]
            nothing = torch.zeros_like(policy.logps)
            batch = PolicyBatch(
                logps=policy.logps, old_logps=nothing, advantages=inputs["advantages"], values=nothing,
                old_values=nothing, returns=nothing, entropy=policy.entropy, mask=mask, num_tokens=mask.sum(),
            )
            return loss(batch).loss

        def evaluate(self, *args, **kwargs):
            with torch.no_grad():
                metrics = {"eval_loss": float(self.compute_loss(self.model, self.rollout()))}
            self.log(metrics)
            return metrics

    prompts = [row.prompt for _, row in run.train_rows][:4]
    ids = [prompt_ids(run.tokenizer, prompt) for prompt in prompts]
    loss, reward = run.loss(), run.reward()
    engine = run.rollout(Sampling(max_new_tokens=6, temperature=1.0, stop_ids=tuple(run.stop_ids)))
    args = run.training_arguments(transformers.TrainingArguments, ignore_data_skip=True,
                                  remove_unused_columns=False)
    roles = assemble(run, value=None, temperature=1.0)
    return Reinforce(run=run, model=roles, args=args, eval_dataset=ids, callbacks=run.callbacks(),
                     optimizer_cls_and_kwargs=run.optimizer(args))

def engine(config, tokenizer, sampling, run):
    from alignkit.generation.sampling import sample
    def answers(policy, prompts, roles):
        assert roles.members["policy"].model is policy
        return best_of_two(sample(policy, tokenizer, prompts + prompts, sampling), prompts, roles)

    def best_of_two(answers, prompts, roles):
        from alignkit import Answers
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        scores = run.reward()(Answers([[]] * len(texts), texts, prompts + prompts, answers), roles)
        half = len(prompts)
        return [answers[i] if scores[i] >= scores[half + i] else answers[half + i] for i in range(half)]
    return answers

@hookimpl
def alignkit_stage():
    return [Stage(name="reinforce", summary="REINFORCE", build=build, config=Config, rows=(Prompt,),
                  batch=PolicyBatch, loss="scaled", needs={"policy": "sft"},
                  uses={"reward": "function", "rollout": "aware"}, data="bundled:prompts",
                  train={"learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 2})]

@hookimpl
def alignkit_loss():
    return [Loss(name="scaled", summary="counts its calls", batch=PolicyBatch, build=lambda config: Policy())]

@hookimpl
def alignkit_rollout():
    return [Rollout(name="aware", summary="is given the run", build=engine)]
"""
CARELESS = """
import torch
from alignkit import Demonstration, Stage, TokenLogps, hookimpl

def build(run):
    from alignkit_sft.trainer import build
    trainer = build(run)
    {save}
    return trainer

@hookimpl
def alignkit_stage():
    from alignkit_sft.config import SFTConfig
    return [Stage(name="careless", summary="saves by hand", build=build, config=SFTConfig, rows=(Demonstration,),
                  batch=TokenLogps, loss="nll")]
"""
GIVEN = ("--plugin", "reinforce", "reinforce.reward.call=scores:length", "train.max_steps=4")


@pytest.fixture(autouse=True)
def scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    install("reinforce", REINFORCE)
    (tmp_path / "scores.py").write_text("def length(prompts, answers):\n    return [len(a) / 10 for a in answers]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_its_run_folder_is_what_plain_libraries_open_and_its_resume_is_exact(
    run_stage: RunStage, tmp_path: Path, tuner: str
) -> None:
    """The loss counts its calls in training: neither a resume nor the evaluations in between change the count."""
    once = run_stage("reinforce", *GIVEN, "--plugin", tuner)

    assert (once / "tokenizer_config.json").exists()
    if tuner == "lora":
        from peft import AutoPeftModelForCausalLM

        AutoPeftModelForCausalLM.from_pretrained(once)
        names = load_file(once / "adapter_model.safetensors")
        assert not any("role_" in name or "head" in name for name in names)
    last = json.loads((once / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    assert last["stateful_callbacks"]["LossState"]["attributes"] == {"calls": 4}

    name = "adapter_model.safetensors" if tuner == "lora" else "model.safetensors"
    weights = load_file(once / name)
    unfinished = once.with_name("reinforce.unfinished")
    once.rename(unfinished)
    shutil.rmtree(unfinished / "checkpoints" / "checkpoint-4")  # as if it had been killed after step 2
    for written in ("alignkit.json", "README.md", name):
        (unfinished / written).unlink()

    again = load_file(run_stage("reinforce", *GIVEN, "--plugin", tuner, "--resume") / name)
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_a_stage_that_saves_no_config_is_named(run_stage: RunStage, install: Install, tmp_path: Path) -> None:
    save = "trainer.save_model = lambda folder, **_: torch.save(trainer.model.state_dict(), folder + '/model.bin')"
    install("careless", CARELESS.format(save=save))

    with pytest.raises(
        AssertionError, match=r"plugin careless \(alignkit-careless 0.1\): its stage 'careless' saved no config"
    ):
        run_stage("careless", "train.save_strategy=no")
    assert not (tmp_path / "runs" / "careless").exists()


def test_a_stage_that_saves_no_tokenizer_has_it_saved(run_stage: RunStage, install: Install) -> None:
    save = "trainer.save_model = lambda folder, **_: trainer.model.save_pretrained(folder)"
    install("careless", CARELESS.format(save=save))

    folder = run_stage("careless", "train.save_strategy=no")
    assert main(["chat", str(folder), "--prompt", "Hello?", "--max-new-tokens", "4"]) == 0
