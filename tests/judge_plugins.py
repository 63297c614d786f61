"""Judges for tests, as the code of a plugin: ``install("tests", JUDGES)``."""

JUDGES = """
import os
import random
import time
from dataclasses import dataclass
from alignkit import ConfigError, Judge, hookimpl, option

@dataclass(frozen=True)
class Config:
    seed: int = option(0, "of the errors")
    pause: float = option(0.0, "seconds before each verdict", resume="may_change")

def log(question):
    if file := os.environ.get("ASKED"):
        with open(file, "a") as stream:
            stream.write(repr(question) + "\\n")

def judge(verdict):
    def build(config, run):
        def ask(questions):
            assert questions
            for question in questions:
                log(question)
                time.sleep(config.pause)
                yield verdict(config, question)
        return ask
    return build

def right(config, question):
    return [-len(answer) for answer in question.answers]

def noisy(config, question):
    generator = random.Random(f"{config.seed} {question}")
    wrong = [len(answer) for answer in question.answers]
    return right(config, question) if generator.random() < 0.75 else wrong

def cycle(config, question):
    beats = {("rock", "scissors"), ("scissors", "paper"), ("paper", "rock")}
    return [0, 1] if question.answers in beats else [1, 0]

def picky(config, question):
    return None if "refused" in question.answers else right(config, question)

def letters(config, question):
    return [-answer.count("e") for answer in question.answers]

def no_a(config, question):
    return None if any("a" in answer for answer in question.answers) else letters(config, question)

def failing(config, question):
    if "broken" in question.answers:
        raise ConfigError("no such model")
    return right(config, question)

def graded(config, question):  # 2 for the first place, and the length of the answer
    return [-len(answer) - 2 * (place == 0) for place, answer in enumerate(question.answers)]

@hookimpl
def alignkit_judge():
    def of(name, verdict, **more):
        return Judge(name=name, summary="for a test", config=Config, build=judge(verdict), **more)
    return [
        of("first", lambda config, question: [0, 1]),
        of("right", right, tokens=lambda config, question: sum(map(len, question.answers))),
        of("lister", right, largest=lambda config: None),
        of("by-itself", right, largest=lambda config: None, order_matters=False),
        of("noisy", noisy),
        of("cycle", cycle),
        of("picky", picky),
        of("letters", letters),
        of("no-a", no_a),
        of("silent", lambda config, question: None),
        of("failing", failing),
        of("graded", graded, graded=True),
        Judge(name="empty", summary="for a test", build=lambda config, run: lambda questions: []),
        Judge(name="endless", summary="for a test", build=lambda config, run: lambda asked: iter(lambda: [0, 1], 0)),
        Judge(name="crashes", summary="for a test", build=lambda config, run: lambda questions: [0, 1][2]),
        Judge(name="nothing", summary="for a test", build=lambda config, run: None),
        of("few", lambda config, question: [0]),
        of("words", lambda config, question: "ab"),
        of("unstored", right, identity=lambda config: None),
    ]
"""
