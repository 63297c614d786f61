import pytest
from safetensors.torch import load_file


def test_alignkit_finds_no_problem(check_plugin) -> None:
    check_plugin("my-thing")


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_only_the_last_layer_is_trained(run_stage, tiny_model, stage) -> None:
    folder = run_stage(stage, "--plugin", "my-thing", "tuner.layers=1", "train.learning_rate=0.01")
    before, after = (load_file(at / "model.safetensors") for at in (tiny_model(), folder))
    changed = {name for name in before.keys() & after if not before[name].equal(after[name])}

    assert changed
    assert all(".layers.1." in name for name in changed)
