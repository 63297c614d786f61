"""Full fine-tuning: every weight is trained."""

from alignkit import Tuner, hookimpl
from alignkit_full import tuner


@hookimpl
def alignkit_model() -> list[Tuner]:
    return [
        Tuner(
            name="full",
            summary="train every weight",
            config=tuner.FullConfig,
            load=tuner.load,
            wrap=tuner.wrap,
            less_memory=lambda config: [{"dtype": "bfloat16"}, {"name": "lora"}, {"name": "qlora"}],
        )
    ]
