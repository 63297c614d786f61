import json

from alignkit_my_thing import build

from alignkit import NoConfig, Sampling

PPO = ["ppo.batch_size=4", "ppo.minibatches=1", "ppo.response_length=8"]
REWARD = ["reward.name=function", "reward.call=alignkit.bundled.guide:score"]


def test_answers_are_in_the_order_of_their_prompts(tiny_model) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (cls.from_pretrained(tiny_model()) for cls in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.pad_token = tokenizer.eos_token
    greedy = Sampling(max_new_tokens=4, temperature=0, stop_ids=(0,), samples=2)
    engine = build(NoConfig(), tokenizer, greedy)
    first, second = engine(model, [[5, 6]]), engine(model, [[7, 8, 9]])

    assert engine(model, [[5, 6], [7, 8, 9]]) == first + second
    assert len(first) == len(second) == 2


def test_alignkit_finds_no_problem(check_plugin) -> None:
    check_plugin("my-thing")


def test_ppo_samples_with_it(run_stage) -> None:
    folder = run_stage("ppo", "--plugin", "my-thing", *PPO, *REWARD)
    config = json.loads((folder / "alignkit.json").read_text())["config"]

    assert config["stages"]["ppo"]["rollout"]["name"] == "my-thing"
