"""``alignkit compare --checkpoints``: the reward-KL frontier along a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from ppo_runs import GOLD, PROMPTS, ppo
from reported_runs import write_run
from safetensors.torch import load_file

from alignkit.cli import main
from alignkit.errors import ConfigError
from alignkit.evaluation import checkpoints
from alignkit.evaluation.answering import answer
from alignkit.evaluation.checkpoints import Policy
from alignkit.evaluation.comparison import Asked
from alignkit.generation import scorers
from alignkit.models.pretrained import without_repacking
from alignkit.registry import Registry
from alignkit.runs import fingerprints, frontier, lineage, manifest

KEPT = ["ppo.iterations=2", "train.save_total_limit=null", "ppo.keep=last", "train.learning_rate=0.01"]
STAGES_AND_TUNERS = [("ppo", "lora"), ("ppo", "full"), ("ppo", "qlora"), ("dpo", "lora"), ("dpo", "full")]
SHORT = ["--max-new-tokens", "6", "--batch", "4"]


def compare(*arguments: str) -> int:
    return main(["--debug", "compare", *arguments, "--checkpoints", "--trust", *SHORT])


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def plain_base(run: Path) -> Any:
    """The model that a run was trained on, quantized if its tuner quantizes it."""
    tuner, config = lineage.tuner(manifest.read(run))
    model = transformers.AutoModelForCausalLM.from_pretrained("base", **tuner.load(config, torch.float32))
    return without_repacking(model)  # its kernel is less accurate


def plain_policy(run: Path, checkpoint: Path) -> Any:
    """The policy of a checkpoint, put together by hand with Transformers and PEFT."""
    if (checkpoint / "config.json").exists():  # as Transformers saves it
        return transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    model = plain_base(run)
    if (checkpoint / "adapter_config.json").exists():  # as PEFT saves it
        return peft.PeftModel.from_pretrained(model, checkpoint)
    if (run / "adapter_config.json").exists():
        model = peft.PeftModel.from_pretrained(model, run)
    saved = load_file(checkpoint / "trained.safetensors")
    own = dict(model.named_parameters())
    policy = {name.removeprefix("models.0."): tensor for name, tensor in saved.items() if name.startswith("models.0.")}
    policy = {name: tensor for name, tensor in policy.items() if name in own}  # not those of the value's adapter
    assert policy
    model.load_state_dict(policy, strict=False)
    return model


def log_ratios(policy: Any, start: Any, asked: Any) -> list[float]:
    """The KL of each answer, by full logits."""
    ratios = []
    for prompt, ids in zip(asked.prompt_ids, asked.answer_ids, strict=True):
        logps = []
        for model in (policy, start):
            with torch.no_grad():
                tokens = torch.tensor([prompt + ids], device=model.device)
                logits = model.eval()(tokens).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1)[range(len(ids)), ids].sum())
        ratios.append(float(logps[0] - logps[1]))
    return ratios


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize(("stage", "tuner"), STAGES_AND_TUNERS)
def test_each_checkpoint_is_the_policy_of_its_step(folder: Path, stage: str, tuner: str) -> None:
    """Its KL to the start is that of the same weights in plain Transformers and PEFT."""
    if stage == "ppo":
        run = ppo(*GOLD, "--plugin", tuner, *KEPT)
    else:
        rows = [{"prompt": f"p{n}", "chosen": "It is.", "rejected": "No"} for n in range(12)]
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = [
            "--model",
            "base",
            "--data",
            "pairs.jsonl",
            "--output",
            "runs",
            "dpo.policy=base",
            "data.eval_size=4",
        ]
        settings += ["train.use_cpu=true", "train.max_steps=2", "train.save_steps=1", "dpo.eval_prompts=0"]
        settings += ["train.learning_rate=0.01", "train.per_device_train_batch_size=2", "train.bf16=false"]
        assert main(["train", "--plugin", "dpo", "--plugin", tuner, *settings]) == 0
        run = Path("runs/dpo")
    along = checkpoints.policies_of(lineage.named("", str(run), "policy"))
    asked = Asked([[{"role": "user", "content": row["prompt"]}] for row in PROMPTS[:3]], 6, 2, 0)
    first, *others = answer([policy for _, policy in along], asked, lambda count: None)

    assert [step for step, _ in along] == ([0, 2, 4, 4] if stage == "ppo" else [0, 1, 2, 2])
    assert first.kl == [0] * 3
    start = plain_base(run)
    for (_, policy), answered in list(zip(along[1:], others, strict=True))[:-1]:
        assert policy.checkpoint is not None
        torch.testing.assert_close(
            torch.tensor(answered.kl),
            torch.tensor(log_ratios(plain_policy(run, policy.checkpoint), start, answered)),
            rtol=1e-3,
            atol=1e-3,
        )
    assert abs(sum(others[0].kl)) > 0.01
    assert others[0].kl != others[1].kl
    assert others[-1].kl == others[-2].kl  # the last checkpoint is the result


def test_a_run_and_a_gold_reward(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ppo(*GOLD, "--plugin", "lora", *KEPT)
    Path("better.py").write_text("def short(prompts, answers):\n    return [-float(len(a)) for a in answers]\n")
    capsys.readouterr()
    assert compare("runs/ppo", "--reward", "better:short", "-o", "table.jsonl", "-o", "both.svg") == 0
    printed = capsys.readouterr().out
    rows = read(run / "frontier.jsonl")

    assert "4 prompts, held out by the runs; score by gold:letters; score by better:short" in printed
    assert [(row["step"], Path(row["policy"]).name) for row in rows] == [(0, "base"), (2, "checkpoint-2"), (4, "ppo")]
    assert rows[0]["kl"] == 0
    assert rows[0]["score_by"] == "score by gold:letters"
    assert rows[0]["gold_by"] == "score by better:short"
    assert all(row["score"] >= 0 > row["gold"] for row in rows)
    assert frontier.points(run) == [checkpoints.point_of(row) for row in rows]
    assert [{key: row[key] for key in row if key != "run"} for row in read(Path("table.jsonl"))] == rows
    assert {path.name for path in run.glob("frontier.*")} == {"frontier.jsonl", "frontier.png", "frontier.svg"}
    assert "score by better:short" in Path("both.svg").read_text()

    assert compare("runs/ppo", "--judge", "better:short", "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)["runs"]
    wins = [row["gold"] for row in result["policies"]]
    assert wins[0] == 0.5  # every answer ties with itself
    assert all(0 <= win <= 1 for win in wins)

    shutil.copytree(run, "runs/other")
    assert compare("runs/ppo", "runs/other", "--reward", "gold:letters") == 0  # the reward of training: no gold
    assert read(run / "frontier.jsonl")[0]["gold_by"] is None
    assert "runs/other" in Path("runs/frontier.svg").read_text()

    record = manifest.read(Path("runs/other"))
    record["config"]["stages"]["ppo"]["reward"]["call"] = "gold:few"
    manifest.write_json(Path("runs/other/alignkit.json"), record)
    assert compare("runs/ppo", "runs/other") == 2
    assert "these runs were trained on different rewards: name one for all with --reward" in capsys.readouterr().err
    assert compare("runs/ppo", "--reward", "better:short", "--judge", "gold:few") == 2
    assert "--reward and --judge are both the gold curve" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert compare("runs/ppo") == 2
    assert "train.save_total_limit=null keeps every checkpoint" in capsys.readouterr().err


def test_a_gold_reward_is_dropped_only_if_it_scores_as_the_reward_of_training(folder: Path) -> None:
    """Two rewards of one name, such as a sum of other parts, are two curves."""
    parts = [{"name": "function", "call": "gold:letters", "weight": weight} for weight in (1.0, 2.0)]
    runs = [
        lineage.Parent("ppo", folder, {"stage": "ppo", "parents": {}, "config": {"plugins": [], "stages": stages}})
        for stages in ({"ppo": {"reward": {"name": "sum", "parts": [part]}}} for part in parts)
    ]
    registry = Registry()
    same, other = (scorers.named(registry, "--reward", "sum", [f"reward.parts={json.dumps([part])}"]) for part in parts)

    assert [each.name for each in checkpoints.measures_of(runs[:1], same, None, True)[0]] == ["sum"]
    assert [each.name for each in checkpoints.measures_of(runs[:1], other, None, True)[0]] == ["sum of training", "sum"]
    with pytest.raises(ConfigError, match="these runs were trained on different rewards"):
        checkpoints.measures_of(runs, None, None, True)


def test_a_reward_model_is_known_by_its_weights(folder: Path) -> None:
    """Whether it is named as a run or as the reward of training, whose folder is that of the parent."""
    for name in ("rm", "other"):
        (write_run(folder / "runs" / name, "rm", []) / "model.safetensors").write_bytes(name.encode())
    reward = {"ppo": {"reward": {"name": "reward-model", "path": "runs/rm"}}}
    parents = {"reward": {"folder": str(folder / "runs/rm"), "weights": fingerprints.weights(folder / "runs/rm")}}
    record = {"stage": "ppo", "parents": parents, "config": {"plugins": [], "stages": reward}}
    run = lineage.Parent("ppo", folder, record)
    same, other = (scorers.named(Registry(), "--reward", f"runs/{name}") for name in ("rm", "other"))

    assert checkpoints.measures_of([run], same, None, True)[1] == []
    assert len(checkpoints.measures_of([run], same, None, True)[0]) == 1
    assert len(checkpoints.measures_of([run], other, None, True)[0]) == 2


def test_a_start_that_is_gone_or_was_trained_again_is_an_error(
    train: Callable[..., Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The KL would be to another policy than that from which training started."""
    sft = train("train.max_steps=1", output="below")
    run = ppo(f"ppo.policy={sft}", *GOLD[1:], *KEPT, "ppo.iterations=1")
    assert checkpoints.start_of(lineage.named("", str(run), "policy")).run.folder == sft
    moved = folder / "runs" / "sft"
    sft.rename(moved)
    assert checkpoints.start_of(lineage.named("", str(run), "policy")).run.folder == Path("runs/sft")

    (weights,) = moved.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    assert compare(str(run)) == 2
    assert f"{sft}, from which it starts, is gone" not in capsys.readouterr().err
    shutil.rmtree(moved)
    assert compare(str(run)) == 2
    assert f"the KL of {run} to its start cannot be measured: {sft}, from which it starts, is gone" in (
        capsys.readouterr().err
    )


def test_a_gold_reward_that_falls_clearly_is_over_optimization() -> None:
    along: Any = [(step, Policy) for step in (0, 10, 20)]
    measure: Any = checkpoints.Scorer("gold", lambda batch, say: None)  # type: ignore[arg-type, return-value]
    rising, falling = [0.0, 1.0, 0.0, 1.0], [1.0, 2.0, 1.5, 1.5]

    # from step 10 to step 20 the prompts fall by 1, 1, 1.5, .5: 1 ± .204
    note = checkpoints.overoptimization(along, [rising, falling, [0.0, 1.0, 0.0, 1.0]], measure)
    assert note is not None
    assert "score by gold fell by 1.00 ± 0.20 from step 10 to the end" in note
    assert checkpoints.overoptimization(along, [rising, falling, [1.0, 1.0, 1.5, 2.0]], measure) is None
    assert checkpoints.overoptimization(along, [rising, rising, falling], measure) is None
    assert checkpoints.overoptimization(along, [rising, falling, [None, None, None, 1.0]], measure) is None
