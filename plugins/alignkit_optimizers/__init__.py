"""The optimizers of ``transformers.Trainer``. Learning rate, betas, epsilon and weight decay are set in ``train``."""

from alignkit import Optimizer, hookimpl
from alignkit_optimizers.build import builder


@hookimpl
def alignkit_optimizer() -> list[Optimizer]:
    return [
        Optimizer(
            name="adamw",
            summary="AdamW, fused if possible",
            build=builder("adamw_torch_fused"),
            less_memory=lambda config: [{"name": "adamw_8bit"}],
        ),
        Optimizer(
            name="adamw_8bit",
            summary="AdamW with 8-bit states: a quarter of the memory",
            build=builder("adamw_8bit"),
            requires=("bitsandbytes",),
        ),
        Optimizer(
            name="paged_adamw_8bit",
            summary="AdamW with 8-bit states, paged to CPU memory when the GPU is full",
            build=builder("paged_adamw_8bit", needs_cuda=True),
            requires=("bitsandbytes",),
        ),
        Optimizer(
            name="paged_adamw_32bit",
            summary="AdamW with 32-bit states, paged to CPU memory when the GPU is full",
            build=builder("paged_adamw_32bit", needs_cuda=True),
            requires=("bitsandbytes",),
        ),
        Optimizer(
            name="adafactor",
            summary="factored second moments: the least memory in 32 bits",
            build=builder("adafactor"),
            refuses=dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), "Adafactor has no such setting"),
        ),
    ]
