"""Rollouts from vLLM servers: what they get, what is checked, and what a run does when one fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import yaml
from ppo_runs import GOLD, SMALL, iterations, logs, ppo, trained
from transformers import AutoModelForCausalLM
from vllm_servers import VllmServer

from alignkit import AlignkitError, ConfigError, OffPolicy, Sampling, UnavailableError
from alignkit.cli import main
from alignkit.data.chat_template import load_tokenizer
from alignkit.generation import generate
from alignkit.online.off_policy import importance_weights
from alignkit_rollouts import vllm_check
from alignkit_rollouts.config import VllmConfig
from alignkit_rollouts.vllm_engine import VllmEngine

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
Make = Callable[[], VllmServer]
LORA = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture
def policy(tiny_model: Callable[..., Path]) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32), LORA).eval()


@pytest.fixture
def engine(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., VllmEngine]:
    """``engine([server], temperature=1.0)``: the engine of a run in ``tmp_path``."""

    def make(servers: list[VllmServer], temperature: float = 0.0, length: int = 16, **settings: Any) -> VllmEngine:
        config = VllmConfig(urls=[server.url for server in servers], **{"retry_for": 5.0, **settings})
        table = SimpleNamespace(config=config)
        of_stage = SimpleNamespace(config=SimpleNamespace(max_prompt_length=length))
        of_run = SimpleNamespace(folder=tmp_path / "ppo", rollout=table, stage=of_stage, train={})
        run: Any = SimpleNamespace(
            folder=tmp_path / "ppo.unfinished", config=of_run, base=str(tiny_model()), base_weights=None
        )
        return VllmEngine(config, Sampling(6, temperature, (0,)), run)

    return make


def test_greedy_answers_of_every_version_are_those_of_generate(
    policy: Any, engine: Callable[..., VllmEngine], vllm_server: Make, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    server = vllm_server()
    sample, tokenizer = engine([server]), load_tokenizer(str(tiny_model()), None)
    names = []
    for _ in range(2):
        answers = sample(policy, PROMPTS)
        assert answers == generate(policy, tokenizer, PROMPTS, Sampling(6, 0.0, (0,)))
        for prompt, answer, logps in zip(PROMPTS, answers, answers.logps or [], strict=True):
            logits = policy(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            own = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(logps), own, atol=1e-5, rtol=0)
        sample(policy, PROMPTS)  # the same weights: nothing is sent
        (name,) = server.adapters
        assert [path.name for path in (tmp_path / "ppo.unfinished" / "rollout").iterdir()] == [name.split("-")[2]]
        names.append(name)
        with torch.no_grad():
            for parameter in (p for name, p in policy.named_parameters() if "lora_B" in name):
                parameter.mul_(-1)

    assert [name[:16] for name in names] == ["alignkit-ppo-v1-", "alignkit-ppo-v2-"]
    assert len([path for path, _ in server.requests if path == "/v1/load_lora_adapter"]) == 2


def test_equal_prompts_are_one_request_and_each_request_has_its_seed(
    policy: Any, engine: Callable[..., VllmEngine], vllm_server: Make
) -> None:
    prompts = [PROMPTS[0]] * 3 + PROMPTS[1:] + [PROMPTS[0]]
    one, two = vllm_server(), vllm_server()

    def sampled(*servers: VllmServer) -> Any:
        torch.manual_seed(7)
        return engine(list(servers), temperature=1.3)(policy, prompts)

    answers = sampled(one)
    assert [(body["prompt"], body["n"]) for body in sorted(one.completions, key=lambda body: body["n"])][-1] == (
        PROMPTS[0],
        3,
    )
    assert len({body["seed"] for body in one.completions}) == 4
    assert len({tuple(answer) for answer in (answers[0], answers[1], answers[2], answers[5])}) == 4
    one.requests.clear()
    assert sampled(one, two) == answers  # whichever server answers
    assert [len(server.completions) for server in (one, two)] == [2, 2]


def test_failures_that_pass_are_repeated(policy: Any, engine: Callable[..., VllmEngine], vllm_server: Make) -> None:
    server = vllm_server()
    sample = engine([server], timeout=1.0, concurrency=1)
    expected = sample(policy, PROMPTS)
    server.faults = [500, "close", 503, "hang"]

    assert sample(policy, PROMPTS) == expected
    server.die()
    server.start()  # without the adapter
    assert sample(policy, PROMPTS) == expected


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([500] * 99, r"fails \(500\): EngineCore encountered an issue \(repeated for rollout.retry_for=0.1 seconds\)"),
        (["hang"] * 9, "did not answer within rollout.timeout=1 seconds"),
        ([400], "rejects a request: EngineCore encountered an issue"),
    ],
)
def test_failures_that_stay_are_one_line(
    policy: Any, engine: Callable[..., VllmEngine], vllm_server: Make, faults: list[Any], message: str
) -> None:
    server = vllm_server()
    server.faults = faults
    with pytest.raises(UnavailableError, match=message):
        engine([server], timeout=1.0, retry_for=0.1, concurrency=1)(policy, PROMPTS[:1])


def test_an_answer_that_the_server_cuts_is_an_error(
    policy: Any, engine: Callable[..., VllmEngine], vllm_server: Make
) -> None:
    server = vllm_server()
    sample = engine([server])
    for length, tokens in ((7, 4), (3, 0)):
        server.max_model_len = length  # as vLLM does, it shortens the answers without a word

        with pytest.raises(UnavailableError, match=f"cut an answer after {tokens} tokens: its --max-model-len"):
            sample(policy, PROMPTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda server: server.die(), "cannot be reached: .*`alignkit serve-rollouts` prints the command"),
        (lambda server: setattr(server, "models", lambda body: (404, {})), r"is not a vLLM server.*\(404\)"),
        (lambda server: setattr(server, "max_model_len", 21), "prompts and answers can have 22.*--max-model-len 22"),
        (lambda server: setattr(server, "loads_adapters", False), "without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (
            lambda server: setattr(server, "load", lambda body: (500, {"error": {"message": "LoRA is not enabled"}})),
            "cannot load the policy's adapter: LoRA is not enabled",
        ),
    ],
)
def test_a_server_that_cannot_serve_is_refused_in_one_line(
    policy: Any, engine: Callable[..., VllmEngine], vllm_server: Make, change: Callable[[VllmServer], Any], message: str
) -> None:
    server = vllm_server()
    change(server)
    with pytest.raises(AlignkitError, match=message):
        engine([server])(policy, PROMPTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"r": 1, "rank_pattern": {"q_proj": 513}}, "up to rank 512"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": r".*(q_proj|lm_head)"}, "embeddings or the head"),
        ({"bias": "lora_only"}, "biases"),
    ],
)
def test_adapters_that_vllm_cannot_load_are_refused(
    tiny_model: Callable[..., Path], settings: dict[str, Any], message: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
    with pytest.raises(ConfigError, match=message):
        vllm_check.check_policy(peft.get_peft_model(model, config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--plugin", "full"], "tuner 'full' has none. Use --plugin lora or qlora"),
        (["--plugin", "lora", "tuner.use_dora=true"], "vLLM does not support DoRA"),
        (["--plugin", "lora", "tuner.r=1024"], "up to rank 512, and tuner.r is 1024"),
        (["--plugin", "lora", "tuner.target_modules=[q_proj, lm_head]"], "embeddings or the head (lm_head)"),
        (["--plugin", "lora", "rollout.urls=[localhost]"], "'localhost' is not the address of a server"),
        (["--plugin", "lora", "rollout.urls=[]"], "rollout.urls is empty"),
    ],
)
def test_settings_are_refused_before_a_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert main(["check", "--plugin", "ppo", *SMALL, *GOLD, "rollout.name=vllm", *settings]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_addresses_in_a_file_need_trust(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollout = {"name": "vllm", "urls": ["http://evil:1"]}
    config = {"plugins": ["ppo", "lora"], "stages": {"ppo": {"policy": "base", "rollout": rollout}}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["check", "--config", "config.yaml", *SMALL, *GOLD[1:]]

    assert main(arguments) == 2
    assert "rollout 'vllm': urls=['http://evil:1'] sends prompts to this server" in capsys.readouterr().err
    assert main([*arguments, "--trust"]) == 0
    assert main([*arguments, "rollout.urls=[http://evil:1]"]) == 0


# --- runs ------------------------------------------------------------------------------------------------------------

RUN = [*GOLD, "--plugin", "lora", "rollout.name=vllm", "ppo.iterations=4", "ppo.response_length=4", "ppo.save_every=99"]
RUN += ["ppo.max_prompt_length=64", "ppo.minibatches=1", "train.learning_rate=3e-2", "rollout.retry_for=0.1"]


def urls(*servers: VllmServer) -> str:
    return f"rollout.urls=[{', '.join(server.url for server in servers)}]"


def test_a_run_samples_from_its_servers_and_leaves_nothing(
    folder: Path, vllm_server: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = vllm_server(), vllm_server()
    run = ppo(*RUN, urls(one, two))

    differences = [line["rollout_logps_difference"] for line in iterations(run)]
    assert len(differences) == 4
    assert all(difference < 1e-4 for difference in differences)
    assert "log-probabilities differ by" in capsys.readouterr().out
    assert not any("importance_weight" in line for line in logs(run))
    assert not one.adapters
    assert not (run / "rollout").exists()
    assert len(one.completions) == len(two.completions)
    assert {body["max_tokens"] for body in one.completions} == {4}
    versions = [body["lora_name"] for path, body in one.requests if path == "/v1/load_lora_adapter"]
    assert len(set(versions)) == len(versions) == 5  # before each iteration, and for the last evaluation


def test_a_server_that_keeps_an_old_adapter_stops_the_run(
    folder: Path, vllm_server: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    server = vllm_server()
    server.reloads = False

    assert main(["train", "--plugin", "ppo", *SMALL, *RUN, urls(server), "rollout.max_logps_difference=0.01"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "nats per token from the policy's, more than 0.01: it samples from another model" in message
    assert "add --resume" in message


@pytest.mark.parametrize("completions_before", [4 + 3 * 8, 4 + 2 * 8])
def test_a_run_whose_server_dies_goes_on_with_resume(
    folder: Path, vllm_server: Make, capsys: pytest.CaptureFixture[str], completions_before: int
) -> None:
    """It dies in the sampling of an iteration, or in an evaluation."""
    server = vllm_server()
    whole = ppo(*RUN, "--output", "whole", urls(server))
    order = [body["prompt"] for body in server.completions]
    server.requests.clear()
    server.dies_at = completions_before + 1

    assert main(["train", "--plugin", "ppo", *SMALL, *RUN, urls(server)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "the vLLM server at http://127.0.0.1" in message
    assert "The run has a checkpoint of step" in message
    server.dies_at = None
    server.start()
    resumed = ppo(*RUN, urls(server), "--resume")

    assert len(order) > completions_before
    torch.testing.assert_close(trained(resumed), trained(whole), rtol=0, atol=0)
    assert evaluations(resumed) == evaluations(whole)


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [{k: line[k] for k in ("step", "eval_score", "eval_kl")} for line in logs(run) if "eval_score" in line]


def test_another_base_is_refused(folder: Path, vllm_server: Make, capsys: pytest.CaptureFixture[str]) -> None:
    AutoModelForCausalLM.from_pretrained("base").apply(
        lambda module: module.weight.data.add_(0.1) if isinstance(module, torch.nn.Linear) else None
    ).save_pretrained("other")
    server = vllm_server()
    server.root = str(Path("other").absolute())

    assert main(["train", "--plugin", "ppo", *SMALL, *RUN, urls(server)]) == 2
    assert "has another base model: " in capsys.readouterr().err.splitlines()[-1]


def test_a_quantized_base_gets_truncated_importance_weights(folder: Path, vllm_server: Make) -> None:
    pytest.importorskip("bitsandbytes")
    run = ppo(*RUN, "--plugin", "qlora", urls(vllm_server()), "ppo.iterations=2")

    for line in iterations(run):
        assert 1e-4 < line["rollout_logps_difference"] < 0.5
        assert 0.5 < line["importance_weight"] <= 2
        assert 0 <= line["importance_truncated"] < 1


def test_importance_weights_are_ratios_up_to_the_cap() -> None:
    class Statistics:
        def mean(self, values: torch.Tensor, mask: torch.Tensor) -> float:
            return float(values[mask].mean())

    policy = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -3.0, 0.0]])
    sampled = torch.tensor([[-1.0, -1.5, -3.0], [-1.5, -3.0, -9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    statistics: Any = Statistics()
    weights, metrics = importance_weights(OffPolicy(1.0, 2.0), policy, sampled, mask, statistics)

    expected = torch.tensor([[1.0, 0.60653, 2.0], [1.64872, 1.0, 1.0]])  # e^0, e^-0.5, e^2 over the cap, e^0.5, e^0
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
    assert metrics == pytest.approx(
        {"rollout_logps_difference": 3 / 5, "importance_weight": 6.25525 / 5, "importance_truncated": 1 / 5}, abs=1e-5
    )
    assert importance_weights(OffPolicy(1.0), policy, sampled, mask, statistics)[0] is None
    with pytest.raises(UnavailableError, match=r"differ by 0.6 nats per token from the policy's, more than 0.5"):
        importance_weights(OffPolicy(0.5, 2.0), policy, sampled, mask, statistics)


def test_serve_rollouts_prints_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve-rollouts", "base", "--rank", "20", "--port", "8100", "--", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.split() == [
        *("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "vllm", "serve", str(Path("base").absolute())),
        *("--host", "127.0.0.1", "--port", "8100", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "32"),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--dtype", "float32"),
    ]
    assert main(["serve-rollouts", "base", "--exec", "--program", "no-such-program"]) == 2
    assert "there is no program no-such-program" in capsys.readouterr().err
    assert main(["serve-rollouts", "base", "--rank", "600"]) == 2
    assert "up to rank 512, not 600" in capsys.readouterr().err


def test_the_base_of_a_run_is_served_at_the_rank_of_its_adapter(
    run_stage: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_stage("sft", "--plugin", "lora", "tuner.r=33", "train.bf16=false")
    capsys.readouterr()

    assert main(["serve-rollouts", str(run)]) == 0
    printed = capsys.readouterr().out
    assert json.loads((run / "alignkit.json").read_text())["base"]["located"] in printed
    assert "--max-lora-rank 64" in printed
    assert "--dtype float32" in printed
