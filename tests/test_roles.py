"""Every role of every tuner is the model of the folder that it came from, by plain Transformers and PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit import PluginError
from alignkit.models import Roles, Sequences

TUNERS = """
    from alignkit import Tuner, hookimpl

    def tuner(name, kind, **settings):
        def wrap(config, model, role):
            import peft

            head = hasattr(model, "score")
            saved = [*settings.get("modules_to_save", []), *(["score"] if head else [])]
            more = {**settings, "task_type": "SEQ_CLS" if head else "CAUSAL_LM"}
            more.pop("modules_to_save", None)
            if kind != "TrainableTokensConfig":
                more["modules_to_save"] = saved or None
            return peft.get_peft_model(model, getattr(peft, kind)(**more))

        return Tuner(name=name, summary="for a test", load=lambda config, dtype: {}, wrap=wrap, adapters=True)

    PROJECTIONS = ["q_proj", "v_proj"]

    @hookimpl
    def alignkit_model():
        return [
            tuner("saved-head", "LoraConfig", target_modules=PROJECTIONS, modules_to_save=["lm_head"]),
            tuner("saved-norm", "LoraConfig", target_modules=PROJECTIONS, modules_to_save=["embed_tokens", "norm"]),
            tuner("lora-head", "LoraConfig", target_modules=[*PROJECTIONS, "lm_head"]),
            tuner("vera", "VeraConfig", target_modules=PROJECTIONS, r=8),
            tuner("oft", "OFTConfig", target_modules=PROJECTIONS, oft_block_size=16),
            tuner("tokens", "LoraConfig", target_modules=PROJECTIONS, trainable_token_indices=list(range(256))),
            tuner("tokens-alone", "TrainableTokensConfig", token_indices=list(range(256))),
            tuner("biases", "LoraConfig", target_modules=PROJECTIONS, bias="all"),
        ]
"""
THIRD = ["saved-head", "saved-norm", "lora-head", "vera", "oft", "tokens"]
ANSWERS = ([[5, 6, 7], [8, 9]], [[10, 11, 0], [12, 13]])  # prompts and answers as token ids


@pytest.fixture
def runs(install: Callable[..., None], run_stage: Callable[..., Path], tiny_model: Callable[..., Path]) -> Any:
    """``runs("saved-head")``: an SFT and a reward run of that tuner, their folders and the base's."""
    install("tuners", TUNERS)

    def make(tuner: str, reward: bool = True) -> Any:
        plugin = ["--plugin", "tuners" if tuner in THIRD else tuner, f"tuner.name={tuner}"]
        common = ["train.bf16=false", "train.learning_rate=0.02", "train.max_steps=3", "data.eval_size=2"]
        sft = run_stage("sft", *plugin, *common)
        rm = run_stage("rm", *plugin, *common, f"rm.policy={sft}") if reward else None
        return SimpleNamespace(tuner=tuner, plugin=plugin, sft=sft, rm=rm, base=tiny_model())

    return make


@pytest.fixture
def trainer_of(tmp_path: Path, tiny_data: Callable[[str], Path]) -> Callable[..., Any]:
    """``trainer_of("ppo", runs)``: the trainer of a stage on these runs, not yet trained."""
    from alignkit.cli.common import read_arguments
    from alignkit.runs.plan import pipeline
    from alignkit.training.run import Run

    def make(stage: str, of: Any, *settings: str, plugins: tuple[str, ...] = ()) -> Any:
        plugins = (stage, of.plugin[1], *plugins)
        given = [of.plugin[2], f"{stage}.policy={of.sft}", "train.bf16=false", "train.use_cpu=true", *settings]
        given += ["train.per_device_train_batch_size=2", "data.eval_size=2", "train.max_steps=2"]
        given += ["train.learning_rate=0.01"]
        data = tiny_data({"ppo": "prompts", "dpo": "rankings"}[stage])
        asked = read_arguments(list(plugins), None, str(of.base), [str(data)], str(tmp_path / "out"), given)
        run = Run(pipeline(*asked).to_train[-1], print)
        run.folder.mkdir(parents=True)
        return run.config.stage.component.build(run)

    return make


def opened(folder: Path, base: Path, head: bool, tuner: str) -> Any:
    """The model of a run by plain libraries."""
    kind, more = (AutoModelForSequenceClassification, {"num_labels": 1}) if head else (AutoModelForCausalLM, {})
    if not (folder / "adapter_config.json").exists():
        return kind.from_pretrained(folder, dtype=torch.float32).eval()
    if tuner == "qlora":
        from alignkit_lora import qlora

        more |= qlora.load(qlora.QloraConfig(), torch.float32)
    below = kind.from_pretrained(
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"], dtype=torch.float32, **more
    )
    below.config.pad_token_id = None  # rows are single, and the end of an answer is no padding
    for module in below.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return peft.PeftModel.from_pretrained(below, folder).eval()


@torch.no_grad()
def logps_of(model: Any, prompts: Any = ANSWERS[0], answers: Any = ANSWERS[1]) -> torch.Tensor:
    """Log-probabilities of the answers' tokens, one row at a time; 0 where there is none."""
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer], device=model.device)).logits[0, len(prompt) - 1 : -1].cpu()
        rows.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@torch.no_grad()
def scores_of(model: Any, ends: int = 0) -> torch.Tensor:
    """Scores of the prompts with their answers; with ``ends`` before the answer's last tokens."""
    rows = [prompt + answer for prompt, answer in zip(*ANSWERS, strict=True)]
    ids = [torch.tensor([row[: len(row) - ends]], device=model.device) for row in rows]
    return torch.cat([model(each).logits[:, 0] for each in ids]).cpu()


@torch.no_grad()
def said(roles: Roles) -> Any:
    output = roles(Sequences.of(*ANSWERS, pad=0, device="cpu"), ("policy", "reference", "value", "reward"))
    last = torch.tensor([[len(answer) - 1] for answer in ANSWERS[1]])
    return SimpleNamespace(
        policy=output["policy"].logps,
        reference=output["reference"].logps,
        value=output["value"].gather(1, last)[:, 0],  # before the last token
        reward=output["reward"],
    )


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora", *THIRD])
def test_every_role_in_ppo_is_the_model_of_its_folder(
    runs: Any, trainer_of: Callable[..., Any], tuner: str, tmp_path: Path
) -> None:
    made = runs(tuner)
    sft, rm = opened(made.sft, made.base, False, tuner), opened(made.rm, made.base, True, tuner)
    expected = SimpleNamespace(policy=logps_of(sft), reward=scores_of(rm), value=scores_of(rm, 1))
    small = ["ppo.batch_size=4", "ppo.minibatches=2", "ppo.response_length=4", f"reward.path={made.rm}"]
    trainer = trainer_of("ppo", made, *small)
    close = {"rtol": 0, "atol": 1e-4}

    at_first = said(trainer.roles.eval())
    torch.testing.assert_close(at_first.policy, expected.policy, **close)
    torch.testing.assert_close(at_first.reference, expected.policy, **close)
    torch.testing.assert_close(at_first.reward, expected.reward, **close)
    torch.testing.assert_close(at_first.value, expected.value, **close)

    trainer.train()
    at_last = said(trainer.roles.eval())
    torch.testing.assert_close(at_last.reference, expected.policy, **close)
    torch.testing.assert_close(at_last.reward, expected.reward, **close)
    assert (at_last.value - expected.value).abs().max() > 1e-3
    assert (at_last.policy - expected.policy).abs().max() > 1e-3
    trainer.save_model(str(tmp_path / "policy"))
    torch.testing.assert_close(logps_of(opened(tmp_path / "policy", made.base, False, tuner)), at_last.policy, **close)


@pytest.mark.parametrize("tuner", ["full", "qlora", "saved-head", "saved-norm", "lora-head", "oft", "tokens"])
def test_the_reference_of_dpo_is_the_model_of_its_folder(runs: Any, trainer_of: Callable[..., Any], tuner: str) -> None:
    made = runs(tuner, reward=False)
    sft = opened(made.sft, made.base, False, tuner)
    trainer = trainer_of("dpo", made)
    pair = trainer.train_dataset[0]
    batch = trainer.data_collator([pair])
    expected = logps_of(sft, [pair["prompt_ids"]] * 2, [pair["chosen_ids"], pair["rejected_ids"]]).sum(1)

    for train in (lambda: None, trainer.train):
        train()
        with trainer.as_reference() as reference:
            logps = trainer.answer_logps(reference, batch)
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-3)


def test_a_reward_in_another_form_of_the_base_is_loaded_by_itself(
    runs: Any, trainer_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Doubly quantized weights are other weights: an adapter that was trained on them does not fit on the others."""
    made = runs("qlora")
    expected = scores_of(opened(made.rm, made.base, True, "qlora"))
    settings = ["ppo.policy=base", f"reward.path={made.rm}", "tuner.double_quant=false"]
    trainer = trainer_of("ppo", made, "ppo.batch_size=4", "ppo.minibatches=2", "ppo.response_length=4", *settings)

    assert len(trainer.roles.models) == 2
    torch.testing.assert_close(said(trainer.roles.eval()).reward, expected, rtol=0, atol=1e-4)


def test_a_tuner_that_leaves_the_scalar_head_out_is_refused(
    install: Callable[..., None], run_stage: Callable[..., Path]
) -> None:
    install("tuners", TUNERS)
    told = r"plugin tuners \(alignkit-tuners 0.1\): its tuner 'tokens-alone' does not train and save the scalar head"
    with pytest.raises(AssertionError, match=told):
        run_stage("rm", "--plugin", "tuners", "tuner.name=tokens-alone", "rm.policy=base")


@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_a_tuner_that_trains_the_base_as_well_is_refused_where_the_reference_is_on_it(
    install: Callable[..., None], run_stage: Callable[..., Path], tiny_model: Callable[..., Path], stage: str
) -> None:
    install("tuners", TUNERS)
    given = ["--plugin", "tuners", "tuner.name=biases", "--model", str(tiny_model("qwen2")), f"{stage}.policy=base"]
    given += ["reward.name=function", "reward.call=builtins:list"] if stage == "ppo" else []
    with pytest.raises(AssertionError, match="the tuner trains .*bias outside its adapter: the reference would change"):
        run_stage(stage, *given)


def test_plain_peft_opens_a_run_that_was_trained_from_a_relative_path(
    run_stage: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model(), tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    folder = run_stage("sft", "--plugin", "lora", "--model", "base", "train.save_steps=1").absolute()
    monkeypatch.chdir(tmp_path)

    for adapter in (folder, folder / "checkpoints" / "checkpoint-1"):
        named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(named) == tmp_path / "here" / "base"
        peft.AutoPeftModelForCausalLM.from_pretrained(adapter)


LOADS = """
    from alignkit import hookimpl

    @hookimpl
    def alignkit_load_model(run, role, {argument}kwargs):
        import transformers
        head = role in ("value", "reward")
        kind = "AutoModelForSequenceClassification" if head else "AutoModelForCausalLM"
        more = {{"num_labels": 1}} if head else {{}}
        return getattr(transformers, kind).from_pretrained({where}, attn_implementation="eager", **more, **kwargs)
"""


def test_a_plugin_that_loads_models_is_told_from_where_and_is_refused_where_it_does_not_listen(
    runs: Any, trainer_of: Callable[..., Any], install: Callable[..., None], tmp_path: Path
) -> None:
    made = runs("full")
    install("listens", LOADS.format(argument="name_or_path, ", where="name_or_path"))
    install("deaf", LOADS.format(argument="", where="run.base"))
    small = ["ppo.batch_size=4", "ppo.minibatches=2", "ppo.response_length=4", f"reward.path={made.rm}"]

    trainer = trainer_of("ppo", made, *small, plugins=("listens",))
    assert trainer.roles.members["value"].model.config._attn_implementation == "eager"
    expected = scores_of(opened(made.rm, made.base, True, "full"), 1)
    torch.testing.assert_close(said(trainer.roles.eval()).value, expected, rtol=0, atol=1e-4)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(
        PluginError, match=rf"plugin deaf .* returned a Llama.*, expected a model or None, for a value from {made.rm}"
    ):
        trainer_of("ppo", made, *small, plugins=("deaf",))


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_frozen_roles_are_in_the_compute_dtype_with_the_same_results(runs: Any, trainer_of: Any, tuner: str) -> None:
    """What autocast casts in every forward pass is cast once; scalar heads and tied heads are not."""
    made = runs(tuner)
    trainer = trainer_of("ppo", made, f"reward.path={made.rm}", "train.bf16=true")
    roles, reference = trainer.roles, trainer.roles.members["reference"]
    frozen = [
        module.weight.dtype
        for name, module in reference.model.named_modules()
        if type(module) is torch.nn.Linear and (tuner == "full" or "role_reference" in name) and "lm_head" not in name
    ]
    assert len(frozen) >= 14
    assert set(frozen) == {torch.bfloat16}
    assert all(head.weight.dtype is torch.float32 for head in roles.heads.values())
    assert all(p.dtype is torch.float32 for p in roles.parameters() if p.requires_grad)

    sequences = Sequences.of(*ANSWERS, pad=0, device="cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = roles(sequences, ("policy", "reference"))
    assert torch.equal(output["policy"].logps, output["reference"].logps)
