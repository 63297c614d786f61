"""Judges: functions that rank answers to the same prompt."""

from typing import Any

from alignkit import Judge, Run, hookimpl
from alignkit_judges import openai_judge
from alignkit_judges.config import LocalConfig, OpenAIConfig, check_local, identity_of_local


def build_local(config: LocalConfig, run: Run) -> Any:
    from alignkit_judges.local import build

    return build(config, run)


@hookimpl
def alignkit_judge() -> list[Judge]:
    return [
        Judge(
            name="openai",
            summary="a language model on a server that speaks /v1/chat/completions: vLLM, Ollama, llama.cpp, OpenAI",
            config=OpenAIConfig,
            requires=("openai",),
            check=openai_judge.check,
            build=openai_judge.build,
            largest=lambda config: config.largest,
            identity=openai_judge.identity,
            tokens=openai_judge.tokens,
        ),
        Judge(
            name="local",
            summary="a language model on this machine: its probabilities of the answers A and B",
            config=LocalConfig,
            check=check_local,
            build=build_local,
            graded=True,
            identity=identity_of_local,
        ),
    ]
