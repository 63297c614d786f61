"""LoRA on the model's linear layers, the base in 16 bits. DoRA and rank-stabilized LoRA are settings of it."""

from alignkit import Tuner, hookimpl
from alignkit_lora import lora


@hookimpl
def alignkit_model() -> list[Tuner]:
    return [
        Tuner(
            name="lora",
            summary="train low-rank adapters on a frozen base",
            config=lora.LoraConfig,
            load=lora.load,
            wrap=lora.wrap,
            adapters=True,
            lr_scale=10,
            less_memory=lambda config: [{"name": "qlora"}],
        )
    ]
