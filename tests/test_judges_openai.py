"""The judge `openai`, with the real client library, against real HTTP servers on the loopback interface."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_servers import ScriptedServer, completion, error, free_port
from starlette.responses import HTMLResponse, JSONResponse

from alignkit import AlignkitError, ConfigError, Question
from alignkit_judges import openai_judge
from alignkit_judges.chat_server import ChatServer
from alignkit_judges.config import OpenAIConfig

KEY = "sk-proj-0123456789abcdefghij"


def asked(*answers: str, prompt: str = "What is 2 + 3?") -> Question:
    return Question([{"role": "user", "content": prompt}], answers or ("It is 5.", "It is 6."))


def numbered(count: int) -> list[Question]:
    return [asked(f"first {n}", f"second {n}") for n in range(count)]


class Judge:
    """A judge with its settings, and the lines that it has printed."""

    def __init__(self, **settings: Any) -> None:
        self.config = OpenAIConfig(**{"model": "m", "retries": 0, **settings})
        self.lines: list[str] = []
        openai_judge.check(self.config)
        self.judge = openai_judge.build(self.config, SimpleNamespace(say=self.lines.append))  # type: ignore[arg-type]

    def __call__(self, *questions: Question) -> list[Any]:
        return list(self.judge(questions))

    def error(self, *questions: Question) -> str:
        with pytest.raises(AlignkitError) as raised:
            self(*questions)
        assert "\n" not in str(raised.value)
        return str(raised.value)


@pytest.fixture
def judge(chat_server: ScriptedServer) -> Callable[..., Judge]:
    return lambda **settings: Judge(base_url=chat_server.url, **settings)


def test_a_request_has_the_settings_and_the_question(
    chat_server: ScriptedServer, judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    body = {"chat_template_kwargs": {"enable_thinking": False}}
    ask = judge(model="qwen", api_key_env="JUDGE_KEY", temperature=0.5, max_tokens=7, body=body)

    assert ask(asked("five", "six", prompt="What is 2 + 3?")) == [[0, 0]]
    (request,) = chat_server.requests
    (message,) = request.pop("messages")
    assert request == {"model": "qwen", "temperature": 0.5, "max_tokens": 7, **body}
    assert chat_server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert message["role"] == "user"
    assert re.search("What is 2 \\+ 3\\?.*five.*six.*helpful.*A, B, or tie", message["content"], re.S)


def test_unset_options_are_not_sent(chat_server: ScriptedServer, judge: Callable[..., Judge]) -> None:
    judge(temperature=None, max_tokens=None)(asked())

    assert set(chat_server.requests[0]) == {"model", "messages"}


def test_openai_has_another_name_for_the_longest_reply() -> None:
    options = ChatServer(OpenAIConfig(model="m", max_tokens=9, temperature=None), KEY).options

    assert options == {"max_completion_tokens": 9}


def test_other_servers_do_not_get_the_key_for_openai(
    chat_server: ScriptedServer, judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge()(asked())

    assert KEY not in str(chat_server.headers)


@pytest.mark.parametrize(
    ("reply", "warning"),
    [
        (completion(None, refusal="I cannot do this."), "refuses: 'I cannot do this.'"),
        (completion("A", "content_filter"), "refuses: 'content filter'"),
        (completion("A", "length"), "increase judge.max_tokens"),
        (completion(None), "a reply such as ''"),
        (completion("Both.\nI like them."), "a reply such as 'Both.\\nI like them.'"),
    ],
)
def test_a_refusal_or_an_unreadable_reply_is_no_verdict(
    reply: Any, warning: str, chat_server: ScriptedServer, judge: Callable[..., Judge]
) -> None:
    ask = judge()
    chat_server.script = lambda body: JSONResponse(reply)

    assert ask(asked(), asked("x", "y")) == [None, None]
    assert [warning in line for line in ask.lines] == [True]  # one line for both


def test_thoughts_in_a_field_of_their_own_are_ignored(chat_server: ScriptedServer, judge: Callable[..., Judge]) -> None:
    chat_server.script = lambda body: JSONResponse(completion("B", reasoning_content="A\nA", reasoning="A"))

    assert judge()(asked()) == [[1, 0]]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_request_is_repeated_when_the_server_is_busy(
    status: int, chat_server: ScriptedServer, judge: Callable[..., Judge]
) -> None:
    chat_server.script = lambda body: "A" if len(chat_server.requests) > 2 else error(status, **{"Retry-After-Ms": "1"})

    assert judge(retries=2)(asked()) == [[0, 1]]
    assert len(chat_server.requests) == 3


def test_a_request_is_repeated_after_a_time_out(chat_server: ScriptedServer, judge: Callable[..., Judge]) -> None:
    chat_server.script = lambda body: time.sleep(0.5 if len(chat_server.requests) == 1 else 0) or "A"

    assert judge(retries=1, timeout=0.25)(asked()) == [[0, 1]]
    assert len(chat_server.requests) == 2


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (401, "{url} refuses the API key (401): name the environment variable of its key with judge.api_key_env"),
        (404, "{url} has no model 'm', or no /chat/completions (404)"),
        (429, "{url} limits the rate of requests (429), after 1 retries"),
        (500, "{url} failed (500), after 1 retries"),
    ],
)
def test_an_error_of_the_server_is_one_line_and_keeps_earlier_verdicts(
    status: int, line: str, chat_server: ScriptedServer, judge: Callable[..., Judge]
) -> None:
    failure = error(status, "this\nis why", **{"Retry-After-Ms": "1"})
    chat_server.script = lambda body: failure if "second 2" in str(body) else "A"
    verdicts = judge(retries=1).judge(numbered(5))

    assert [next(verdicts), next(verdicts)] == [[0, 1], [0, 1]]
    with pytest.raises(AlignkitError) as raised:
        next(verdicts)
    assert str(raised.value) == line.format(url=chat_server.url) + ". this is why"


def test_a_key_that_the_server_repeats_in_its_error_is_not_shown(
    chat_server: ScriptedServer, judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    chat_server.script = lambda body: error(401, f"Incorrect API key: {KEY}")

    assert judge(api_key_env="JUDGE_KEY").error(asked()).endswith("check the key. Incorrect API key: ***")


def test_a_server_that_cannot_be_reached_is_one_line(chat_server: ScriptedServer) -> None:
    port = free_port()
    closed, unknown = f"http://127.0.0.1:{port}/v1", "http://judge.invalid/v1"

    assert re.match(f"{closed} cannot be reached: ConnectionRefusedError", Judge(base_url=closed).error(asked()))
    assert re.match(f"{unknown} cannot be reached: ", Judge(base_url=unknown).error(asked()))
    chat_server.script = lambda body: time.sleep(0.4)
    assert Judge(base_url=chat_server.url, timeout=0.2).error(asked()) == (
        f"{chat_server.url} did not reply within judge.timeout=0.2 seconds, after 0 retries"
    )


@pytest.mark.parametrize(
    "reply", [HTMLResponse("<html>"), JSONResponse({"a": 1}), JSONResponse({"choices": []}), JSONResponse([])]
)
def test_a_server_of_another_kind_is_one_line(
    reply: Any, chat_server: ScriptedServer, judge: Callable[..., Judge]
) -> None:
    chat_server.script = lambda body: reply

    assert "did not reply as /v1/chat/completions does" in judge().error(asked())


def test_a_question_that_the_server_rejects_has_no_verdict(
    chat_server: ScriptedServer, judge: Callable[..., Judge]
) -> None:
    """As vLLM rejects what is longer than its model reads."""
    ask = judge(concurrency=2)
    chat_server.script = lambda body: error(400, "too long") if re.search("second [034]", str(body)) else "B"

    assert ask(*numbered(6)) == [None, [1, 0], [1, 0], None, None, [1, 0]]
    assert ask.lines == [f"warning: no verdict on a question: {chat_server.url} rejects a request: too long"]


def test_a_server_that_rejects_every_request_is_an_error(
    chat_server: ScriptedServer, judge: Callable[..., Judge]
) -> None:
    chat_server.script = lambda body: error(400, "use temperature 1")

    for count in (1, 300):
        assert judge().error(*numbered(count)) == f"{chat_server.url} rejects a request: use temperature 1"
    assert len(chat_server.requests) < 120


def test_several_requests_are_under_way_and_verdicts_keep_their_order(
    chat_server: ScriptedServer, judge: Callable[..., Judge]
) -> None:
    together = threading.Barrier(4, timeout=10)  # nobody gets a reply before four have asked

    def script(body: dict[str, Any]) -> str:
        together.wait()
        number = int(re.search(r"first (\d+)", str(body))[1])  # type: ignore[index]
        time.sleep(0.05 * (number % 4 == 0))  # the first of four is the last to get its reply
        return "AB"[number % 3 == 0]

    chat_server.script = script
    assert judge(concurrency=4)(*numbered(8)) == [[1, 0] if n % 3 == 0 else [0, 1] for n in range(8)]


def test_requests_that_are_under_way_end_with_the_command(
    chat_server: ScriptedServer, judge: Callable[..., Judge]
) -> None:
    """As with Ctrl-C. Nobody waits for the slow ones."""
    release = threading.Event()
    chat_server.script = lambda body: "A" if "second 0" in str(body) else release.wait(10) and "B"
    verdicts = judge(concurrency=3).judge(numbered(9))

    assert next(verdicts) == [0, 1]
    started, threads = time.monotonic(), threading.active_count()
    verdicts.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 5
    assert threading.active_count() < threads
    release.set()


def test_no_more_requests_are_made_than_verdicts_are_read_and_under_way(
    chat_server: ScriptedServer, judge: Callable[..., Judge]
) -> None:
    verdicts = judge(concurrency=2).judge(numbered(50))
    next(verdicts)
    time.sleep(0.2)

    assert len(chat_server.requests) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "judge 'openai' needs judge.model"),
        (
            {"base_url": "localhost:8000/v1"},
            "must be a URL such as http://localhost:8000/v1, not 'localhost",
        ),
        ({"base_url": "http://localhost:80a/v1"}, "must be a URL such as"),
        ({"base_url": "http://[::1/v1"}, "must be a URL such as"),
        ({"base_url": "http://me:secret@host/v1"}, "judge.base_url must not contain a user or a password"),
        ({"base_url": "https://api.openai.com/v1"}, "set the environment variable OPENAI_API_KEY to your key"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "set the environment variable that judge.api_key_env names"),
        ({"api_key_env": KEY}, "judge.api_key_env must be the name of an environment variable, not the key itself"),
        ({"rubric": "no.txt"}, "judge.rubric: cannot read no.txt: No such file"),
        ({"principles": "no.txt"}, "judge.principles: cannot read no.txt: No such file"),
    ],
)
def test_wrong_settings_are_refused_before_any_request(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError) as raised:
        Judge(**{"base_url": "http://localhost/v1", **settings})

    assert message in str(raised.value)
    assert KEY not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_verdicts_are_stored_under_all_that_they_depend_on(tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Prefer the shorter.")
    config = OpenAIConfig(model="m", rubric=str(rubric))
    before = openai_judge.identity(config)
    changes: list[dict[str, Any]] = [
        *({"model": "n"}, {"base_url": "http://other/v1"}, {"temperature": 1.0}, {"max_tokens": 9}),
        *({"principles": ["p"]}, {"body": {"seed": 1}}, {"rubric": None}),
    ]
    without_effect = {"timeout": 1.0, "retries": 0, "concurrency": 1, "api_key_env": "X"}

    assert len({openai_judge.identity(dataclasses.replace(config, **change)) for change in changes} | {before}) == 8
    assert openai_judge.identity(dataclasses.replace(config, **without_effect)) == before
    (tmp_path / "copy.txt").write_text("Prefer the shorter.")
    assert openai_judge.identity(dataclasses.replace(config, rubric=str(tmp_path / "copy.txt"))) == before
    rubric.write_text("Prefer the longer.")
    assert openai_judge.identity(config) != before


def test_tokens_are_estimated_without_a_request() -> None:
    config = OpenAIConfig(model="m")
    short, long = (openai_judge.tokens(config, asked("x", "y " * length)) for length in (1, 2001))

    assert 50 < short < 200
    assert long - short == 1000


def test_the_bundled_model_judges_behind_transformers_serve(
    transformers_serve: tuple[str, str], tmp_path: Path
) -> None:
    """A model of 135M parameters has verdicts, but they are poor: it prefers the answer that it reads first."""
    url, model = transformers_serve
    (tmp_path / "rubric.txt").write_text("Reply with one letter, A or B.")
    ask = Judge(base_url=url, model=model, max_tokens=24, concurrency=1, rubric=str(tmp_path / "rubric.txt"))
    pair = ("The answer is five.", "I hate you.")

    verdicts = ask(asked(*pair), asked(*reversed(pair)))
    assert all(verdict in (None, [0, 1], [1, 0], [0, 0]) for verdict in verdicts)
    assert verdicts != [None, None]
    assert "rejects a request: Server is pinned" in Judge(base_url=url, model="another").error(asked())
