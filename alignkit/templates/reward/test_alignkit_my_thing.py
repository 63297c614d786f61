import json

from alignkit_my_thing import Config, build

from alignkit import Answers

PPO = ["ppo.batch_size=4", "ppo.minibatches=1", "ppo.response_length=8"]


def test_the_score_by_hand() -> None:
    answers = Answers(prompts=[[], []], texts=["two words", "one"], prompt_ids=[], answer_ids=[])

    assert build(Config(words=2), None)(answers) == [0, -0.5]


def test_alignkit_finds_no_problem(check_plugin) -> None:
    check_plugin("my-thing")


def test_ppo_trains_on_it(run_stage) -> None:
    folder = run_stage("ppo", "--plugin", "my-thing", "reward.words=5", *PPO)
    manifest = json.loads((folder / "alignkit.json").read_text())

    reward = manifest["config"]["stages"]["ppo"]["reward"]
    assert (reward["name"], reward["words"]) == ("my-thing", 5)
    assert set(manifest["parents"]) == {"policy"}  # no reward model was trained
