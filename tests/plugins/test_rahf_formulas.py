"""RAHF's formulas by hand, and its losses beside plain PEFT and Transformers on the same pairs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alignkit import HiddenStates
from alignkit.cli.common import read_arguments
from alignkit.data import Branches, Ranked, encode_answer
from alignkit.models import decoder_layers, layer_outputs, use_adapter
from alignkit.runs.plan import pipeline
from alignkit.training.run import Run
from alignkit_rahf.config import RAHFConfig, chosen_layers, contrast_steps
from alignkit_rahf.losses import contrast_loss, distance, right_and_wrong, target
from alignkit_rahf.pairs import both, instructed, pairs_of

ROWS = [
    {"prompt": "One?", "responses": ["It is.", "No", "A longer answer than those."], "ranks": [0, 1, 2]},
    {"prompt": "A much longer prompt than the other?", "responses": ["bad", "good one"], "ranks": [1, 0]},
]


@pytest.fixture(scope="module")
def deep(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of four layers."""
    folder, source = tmp_path_factory.mktemp("deep"), tiny_model()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, num_hidden_layers=4)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture
def trainer_of(deep: Path, tmp_path: Path) -> Callable[..., Any]:
    """``trainer_of("rahf.alpha=2")``: the trainer of a run on ``ROWS``, not yet trained, in fp32."""

    def make(*overrides: str, plugins: tuple[str, ...] = ("rahf", "lora")) -> Any:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        given = ["rahf.policy=base", "data.eval_size=0", "train.use_cpu=true", "train.bf16=false", *overrides]
        data, output = [str(tmp_path / "rows.jsonl")], str(tmp_path / "out")
        asked = read_arguments(list(plugins), None, str(deep), data, output, given)
        run = Run(pipeline(*asked).to_train[-1], print)
        run.folder.mkdir(parents=True, exist_ok=True)
        return run.config.stage.component.build(run)

    return make


def shaken(trainer: Any) -> Any:
    """The trainer with every trained weight moved, so that no adapter is zero and no two roles are the same."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.roles.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return trainer


# --- formulas --------------------------------------------------------------------------------------------------------


def test_the_distance_is_a_mean_of_norms_over_tokens_and_layers() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 5.0], [6.0, 8.0]]], requires_grad=True)  # L=2, N=2, d=2
    loss = distance(HiddenStates(hidden, torch.zeros(2, 2, 2), num_tokens=2)).loss
    loss.backward()

    assert float(loss.detach()) == (5 + 0 + 5 + 10) / 4
    assert hidden.grad is not None
    assert torch.equal(hidden.grad[0], torch.tensor([[3 / 5, 4 / 5], [0.0, 0.0]]) / 4)  # finite where the norm is 0


def test_the_target_is_the_hidden_state_moved_by_alpha_differences() -> None:
    hidden, good, bad = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 3.0]]]), torch.tensor([[[2.0, 5.0]]])

    assert torch.equal(target(hidden, good, bad, 5.0), torch.tensor([[[6.0, -8.0]]]))
    assert torch.equal(target(hidden, good, good, 5.0), hidden)


def test_the_loss_of_one_adapter_with_instructions_by_hand() -> None:
    """Means of -1 and -2 per token: s = e^-1 and e^-2, so the right instruction has 1 / (1 + e^-1) = 0.7310586."""
    right, wrong, lengths = torch.tensor([-2.0]), torch.tensor([-4.0]), torch.tensor([2])
    two, one = torch.tensor(2), torch.tensor(1)

    assert float(contrast_loss(right, None, lengths, 0.2, two, one)) == 1
    assert float(contrast_loss(right, wrong, lengths, 0.0, two, one)) == pytest.approx(1 + 0.3132617)
    assert float(contrast_loss(right, wrong, lengths, 0.2, two, one)) == pytest.approx(
        1 + 0.8 * 0.3132617 + 0.2 * 1.3132617
    )


def test_good_answers_are_right_on_the_good_side() -> None:
    good, bad = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0, 8.0])
    right, wrong = right_and_wrong(good, bad)

    assert right.tolist() == [1, 2, 7, 8]
    assert wrong.tolist() == [5, 6, 3, 4]


@pytest.mark.parametrize(
    ("number", "layers"),
    [(32, [10, 12, 14, 16, 18, 20]), (30, [9, 11, 13, 15, 17, 19]), (4, [1]), (2, [1]), (1, [1])],
)
def test_the_default_layers_are_every_second_one_in_the_middle(number: int, layers: list[int]) -> None:
    assert chosen_layers(RAHFConfig(), number) == layers


def test_both_phases_have_a_step() -> None:
    assert [contrast_steps(RAHFConfig(), steps) for steps in (2, 3, 100)] == [1, 2, 50]
    assert [contrast_steps(RAHFConfig(contrast_share=share), 10) for share in (0.001, 0.999)] == [1, 9]


def test_pairs_are_the_best_and_the_worst_answer() -> None:
    ranked = Ranked([], Branches([1], [[2], [3], [4], [5]]), [2.0, 1.0, 3.0, 3.0])

    assert [pair.branches.answers for pair in pairs_of([ranked])] == [[[3], [4]]]


def test_the_instruction_stands_in_the_last_user_turn() -> None:
    roles = ["system", "user", "assistant", "user"]
    prompt: Any = [{"role": role, "content": str(n)} for n, role in enumerate(roles)]

    assert [turn["content"] for turn in instructed(prompt, "Be good.")] == ["0", "1", "2", "Be good.\n\n3"]
    assert [turn["content"] for turn in instructed(prompt[:1], "Be good.")] == ["Be good.\n\n0"]


# --- hidden states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma2"])
def test_layer_outputs_are_the_hidden_states_of_transformers(
    tiny_model: Callable[..., Path], architecture: str
) -> None:
    """Number 1 is the first layer: 0 are the embeddings. The last one is taken before the norm that follows it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).eval()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        first, last = layer_outputs(model, [1, 2], input_ids=ids)
        (alone,) = layer_outputs(model, [1], input_ids=ids)
    norm = next(m for n, m in model.base_model.named_children() if n in ("norm", "ln_f"))

    assert not torch.equal(states[0], states[1])
    torch.testing.assert_close(first, states[1])
    torch.testing.assert_close(norm(last), states[2])
    assert torch.equal(alone, first)
    assert len(decoder_layers(model)) == 2


def test_layers_above_the_last_are_not_computed(deep: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(deep)
    called: list[int] = []
    for number, layer in enumerate(decoder_layers(model), 1):
        layer.register_forward_hook(lambda *_, number=number: called.append(number))
    layer_outputs(model, [1, 3], input_ids=torch.arange(1, 5)[None])

    assert called == [1, 2, 3]
    assert len(model.model.layers) == 4


# --- losses of the trainer -------------------------------------------------------------------------------------------


def plain_states(model: Any, ids: list[int], start: int, layers: list[int]) -> torch.Tensor:
    """The hidden states of one sequence from ``start``, without padding, from Transformers, [L, N, d]."""
    outputs = model(torch.tensor([ids]), output_hidden_states=True)
    return torch.stack([outputs.hidden_states[layer][0, start:] for layer in layers])


@pytest.mark.parametrize("tuner", ["lora", "full"])
@pytest.mark.parametrize("contrast", ["dual", "single"])
def test_the_fit_is_that_of_plain_peft(trainer_of: Callable[..., Any], contrast: str, tuner: str) -> None:
    """Each answer by itself, without padding, with PEFT's adapters and Transformers' hidden states."""
    trainer = shaken(trainer_of(f"rahf.contrast={contrast}", "rahf.layers=[3,2]", plugins=("rahf", tuner)))
    roles, tokenizer = trainer.roles.eval(), trainer.run.tokenizer
    pairs, num_tokens, distances, shifts = list(trainer.train_dataset), 0, [], []
    rows = [(row, row["responses"][row["ranks"].index(rank(row["ranks"]))]) for rank in (min, max) for row in ROWS]
    for row, answer in rows:
        prompt: Any = [{"role": "user", "content": row["prompt"]}]
        states = {}
        for name, role, text in (
            ("policy", "policy", ""),
            ("start", "reference", ""),
            ("good", *(("good", "") if contrast == "dual" else ("contrast", trainer.config.good_instruction))),
            ("bad", *(("bad", "") if contrast == "dual" else ("contrast", trainer.config.bad_instruction))),
        ):
            asked = [{**prompt[0], "content": f"{text}\n\n{row['prompt']}"}] if text else prompt
            ids, start = encode_answer(tokenizer, asked, answer, trainer.run.stop_ids)
            member = roles.members[role]
            with torch.no_grad(), use_adapter(member.model, member.adapter):
                states[name] = plain_states(member.model, ids, start, [2, 3])
        goal = states["start"] + 5 * (states["good"] - states["bad"])
        distances.append((states["policy"] - goal).norm(dim=-1).mean(0).sum())
        shifts.append((goal - states["start"]).norm(dim=-1).mean(0).sum())
        num_tokens += states["policy"].shape[1]

    with torch.no_grad():
        output, shift = trainer.loss_of_fit(roles, pairs, torch.tensor(num_tokens))
    torch.testing.assert_close(output.loss, sum(distances) / num_tokens, rtol=1e-4, atol=0)
    torch.testing.assert_close(shift, sum(shifts) / num_tokens, rtol=1e-4, atol=0)


@pytest.mark.parametrize("contrast", ["dual", "single"])
def test_the_loss_of_the_contrast_is_that_of_plain_transformers(trainer_of: Callable[..., Any], contrast: str) -> None:
    trainer = shaken(trainer_of(f"rahf.contrast={contrast}"))
    roles, tokenizer, config = trainer.roles.eval(), trainer.run.tokenizer, trainer.config
    nll, terms, num_tokens = 0.0, [], 0
    for rank, side in ((min, "good"), (max, "bad")):
        for row in ROWS:
            answer = row["responses"][row["ranks"].index(rank(row["ranks"]))]
            means = {}
            for asked in ("good", "bad"):
                text = getattr(config, f"{asked}_instruction") + "\n\n" if contrast == "single" else ""
                prompt: Any = [{"role": "user", "content": text + row["prompt"]}]
                ids, start = encode_answer(tokenizer, prompt, answer, trainer.run.stop_ids)
                member = roles.members["contrast" if contrast == "single" else side]
                with torch.no_grad(), use_adapter(member.model, member.adapter):
                    logps = member.model(torch.tensor([ids])).logits[0].log_softmax(-1)
                    of_answer = logps[start - 1 : -1].gather(-1, torch.tensor(ids[start:])[:, None])
                means[asked] = of_answer.mean()
            nll -= of_answer.numel() * means[side]
            num_tokens += of_answer.numel()
            s = {asked: mean.exp() for asked, mean in means.items()}
            other = "bad" if side == "good" else "good"
            total = s["good"] + s["bad"]
            terms.append(-0.8 * (s[side] / total).log() - 0.2 * (s[other] / total).log())

    expected = nll / num_tokens + (sum(terms) / len(terms) if contrast == "single" else 0)
    with torch.no_grad():
        loss = trainer.loss_of_contrast(roles, list(trainer.train_dataset), torch.tensor(num_tokens), torch.tensor(4))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_without_a_difference_or_without_alpha_nothing_is_to_be_moved(
    trainer_of: Callable[..., Any], tuner: str
) -> None:
    """Before training good and bad are the same, and the policy is its start: the loss and its gradient are 0."""
    trainer = trainer_of(plugins=("rahf", tuner))
    pairs = list(trainer.train_dataset)
    output, shift = trainer.loss_of_fit(trainer.roles, pairs, 1)
    output.loss.backward()

    assert (float(output.loss.detach()), float(shift)) == (0, 0)
    gradients = [parameter.grad for _, parameter in trainer.roles.trained("policy")]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    policy = {id(parameter) for _, parameter in trainer.roles.trained("policy")}
    with torch.no_grad():
        for parameter in trainer.roles.parameters():
            if parameter.requires_grad and id(parameter) not in policy:
                parameter.add_(0.05 * torch.randn_like(parameter))
        assert float(trainer.loss_of_fit(trainer.roles, pairs, 1)[0].loss) > 0
        trainer.config = dataclasses.replace(trainer.config, alpha=0.0)
        assert float(trainer.loss_of_fit(trainer.roles, pairs, 1)[0].loss) == 0


def test_padding_changes_nothing(trainer_of: Callable[..., Any]) -> None:
    """Pairs of other lengths in the same batch: the losses of a batch are the sums of those of its pairs."""
    trainer = shaken(trainer_of("rahf.contrast=single"))
    pairs = list(trainer.train_dataset)
    assert len({len(answer) for answer in both(pairs).answers}) > 1
    with torch.no_grad():
        for loss in (
            lambda part: trainer.loss_of_fit(trainer.roles, part, 1)[0].loss,
            lambda part: trainer.loss_of_contrast(trainer.roles, part, torch.tensor(1), torch.tensor(1)),
        ):
            torch.testing.assert_close(loss(pairs), loss(pairs[:1]) + loss(pairs[1:]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("tuner", "trained"), [("lora", {"1", "2"}), ("full", {"1", "2"})])
def test_only_the_layers_up_to_the_last_chosen_are_trained(
    trainer_of: Callable[..., Any], tuner: str, trained: set[str]
) -> None:
    trainer = trainer_of("rahf.layers=[2]", plugins=("rahf", tuner))
    names = [name for name, _ in trainer.roles.trained("policy")]

    assert {str(int(name.split(".layers.")[1].split(".")[0]) + 1) for name in names} == trained


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_recomputed_activations_give_the_same_gradients(trainer_of: Callable[..., Any], tuner: str) -> None:
    trainer = shaken(trainer_of("rahf.layers=[1,3]", plugins=("rahf", tuner)))
    pairs, gradients = list(trainer.train_dataset), []
    for recompute in (False, True):
        if recompute:
            trainer.roles.gradient_checkpointing_enable()
        trainer.roles.zero_grad()
        trainer.roles.train()
        trainer.loss_of_fit(trainer.roles, pairs, 1)[0].loss.backward()
        trainer.loss_of_contrast(trainer.roles, pairs, torch.tensor(1), torch.tensor(1)).backward()
        trained = [parameter for parameter in trainer.roles.parameters() if parameter.requires_grad]
        gradients.append([parameter.grad for parameter in trained])

    assert all(gradient is not None and gradient.any() for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)
