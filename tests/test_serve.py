"""``alignkit serve``, with the real ``openai`` client and the real ``transformers serve``; vLLM is a stand-in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from chat_servers import free_port

from alignkit.cli import main
from alignkit.exporting import cached, serving
from alignkit.labeling.serve import listen

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ 'Be kind.' + eos_token }}{% endif %}"
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ASKED = [{"role": "user", "content": "What is 1 and one?"}]


@pytest.fixture(scope="module")
def run(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny model that has learned to answer "Yes." and to end there."""
    folder = tmp_path_factory.mktemp("served")
    rows = [{"prompt": f"What is {n} and one?", "response": "Yes."} for n in range(16)]
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "template.jinja").write_text(TEMPLATE)
    given = ["--model", str(tiny_model()), "--data", str(folder / "demos.jsonl"), "--output", str(folder / "runs")]
    given += [f"chat_template={folder / 'template.jinja'}", "train.learning_rate=0.01"]
    given += ["train.max_steps=30", "train.per_device_train_batch_size=4", "data.eval_size=2", "train.use_cpu=true"]
    assert main(["train", "--plugin", "sft", "--plugin", "full", *given]) == 0
    return folder / "runs" / "sft"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that the tests of this module share, so that the run is exported once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ALIGNKIT_CACHE", str(folder))
        yield folder


class Serving:
    """``alignkit serve`` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        words = [sys.executable, "-m", "alignkit", "serve", *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "ALIGNKIT_DEBUG": ""}
        self.process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def until(self, word: str) -> str:
        """The line with this word."""
        assert self.process.stdout
        line = next((line for line in self.process.stdout if word in line), None)
        assert line is not None, self.process.communicate()
        return line

    def stop(self, number: int) -> int:
        """Send a signal, check that no process is left, and return the exit status."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        assert children
        self.process.send_signal(number)
        status = self.process.wait(30)
        assert not [child for child in children if child.is_running()]
        self.process.communicate()
        return status


def test_a_client_of_openai_gets_the_answers_of_the_run(run: Path, cache: Path) -> None:
    import openai

    from alignkit.data.chat_template import prompt_ids, tokenizer_of_run
    from alignkit.runs import manifest

    port = free_port()
    serving_run = Serving(str(run), "--port", str(port), "--dtype", "float32")
    try:
        assert f"model 'sft' on http://127.0.0.1:{port}/v1" in serving_run.until("serving ")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

        def ask(messages: Any = ASKED, **settings: Any) -> Any:
            given = {"model": "sft", "temperature": 0, "max_tokens": 12, **settings}
            return client.chat.completions.create(messages=messages, **given)

        reply = ask()
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("Yes.", "stop")
        pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True)]
        assert len([piece for piece in pieces if piece]) > 1
        assert "".join(pieces) == "Yes."
        assert ask(max_tokens=1).choices[0].finish_reason == "length"

        tokenizer = tokenizer_of_run(run, manifest.read(run))
        longer: Any = [{"role": "system", "content": "Be brief."}, *ASKED, {"role": "assistant", "content": "Yes."}]
        for messages in (ASKED, [*longer, *ASKED]):
            assert ask(messages).usage.prompt_tokens == len(prompt_ids(tokenizer, messages))

        hot = {ask(temperature=20, seed=seed).choices[0].message.content for seed in range(3)}
        assert len(hot) == 3  # the temperature of a request is used
        with pytest.raises(openai.BadRequestError) as refused:
            ask(model="other")
        assert "pinned to 'sft'" in refused.value.response.json()["detail"]
    finally:
        assert serving_run.stop(signal.SIGTERM) == 0
    listen("127.0.0.1", port).close()  # nobody else does


def test_ctrl_c_while_the_model_is_loaded_ends_the_server(run: Path, cache: Path) -> None:
    serving_run = Serving(str(run), "--port", str(free_port()), "--dtype", "float32")
    serving_run.until("starting ")
    while not psutil.Process(serving_run.process.pid).children():
        time.sleep(0.01)
    assert serving_run.stop(signal.SIGINT) == 0


VLLM = """
import http.server, json, os, signal, subprocess, sys
from pathlib import Path

here = Path(__file__).parent
(here / "arguments.json").write_text(json.dumps([os.getcwd(), *sys.argv[1:]]))
if (here / "fails").exists():
    for line in ("Traceback:", "ValueError: no device", "INFO: the application has ended"):
        print(line)
    sys.exit(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(here / "processes.json").write_text(json.dumps([os.getpid(), child.pid]))

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH with a stand-in for vLLM, which ignores SIGTERM. It writes there what it was given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "vllm").write_text(f"#!{sys.executable}\n{VLLM}")
    (folder / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_vllm_serves_the_export_with_its_own_options_and_is_ended_with_its_processes(
    run: Path, cache: Path, vllm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "GRACE", 0.2)
    port, pid = free_port(), os.getpid()

    def stop_when_ready() -> None:
        for _ in range(600):
            if "serving " in (read := capsys.readouterr().out):
                printed.append(read)
                break
            time.sleep(0.1)
        os.kill(pid, signal.SIGTERM)

    printed: list[str] = []
    thread = threading.Thread(target=stop_when_ready)
    thread.start()
    status = main(
        [
            "serve",
            str(run),
            "--engine",
            "vllm",
            "--port",
            str(port),
            "--dtype",
            "float32",
            "--",
            "--max-model-len",
            "64",
        ]
    )
    thread.join()

    assert status == 0
    assert len(printed) == 1
    place, *arguments = json.loads((vllm / "arguments.json").read_text())
    assert arguments == ["serve", "sft", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "64"]
    assert (Path(place) / "sft" / "model.safetensors").exists()
    for process in json.loads((vllm / "processes.json").read_text()):
        for _ in range(100):  # a killed process takes a moment to end
            if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"process {process} is left")


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The only line of a failing command, after what it has printed before."""
    capsys.readouterr()
    assert main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("alignkit: error: ")


def test_a_server_that_fails_is_one_line_with_its_reason(
    run: Path, cache: Path, vllm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (vllm / "fails").touch()
    line = error(capsys, str(run), "--engine", "vllm", "--port", str(free_port()), "--dtype", "float32")

    assert line.startswith("vllm serve could not start: ValueError: no device. Its output is in ")
    assert "Traceback:" in Path(line.rpartition(" in ")[2]).read_text()


def test_what_cannot_be_served_is_an_error_before_anything_is_exported(
    run: Path,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cached, "cached", lambda *arguments: pytest.fail("exported"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert error(capsys, str(run), "--port", port) == f"--port {port} is in use: choose another one"
    reward = Path(shutil.copytree(run, tmp_path / "rm"))
    record = json.loads((reward / "alignkit.json").read_text())
    (reward / "alignkit.json").write_text(json.dumps({**record, "role": "reward"}))
    assert "alignkit score" in error(capsys, str(reward))
    shutil.copytree(run, tmp_path / "ppo.unfinished")
    (tmp_path / "ppo.unfinished" / "alignkit.json").unlink()
    assert "is not finished" in error(capsys, str(tmp_path / "ppo"))
    assert "Did you mean 'sft'?" in error(capsys, str(run.with_name("sftt")))
    monkeypatch.setenv("PATH", "")
    assert error(capsys, str(run), "--engine", "vllm").endswith("vLLM is not installed: pip install vllm")
    monkeypatch.setattr(serving, "REQUIRED", ("fastapi", "missing_package"))
    assert "needs missing_package" in error(capsys, str(run))


def test_the_printed_command_starts_the_server(
    run: Path, cache: Path, vllm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (vllm / "fails").touch()
    capsys.readouterr()
    assert main(["serve", str(run), "--print", "--engine", "vllm", "--port", "9", "--dtype", "float32"]) == 0
    printed = capsys.readouterr()
    done = subprocess.run(printed.out, shell=True, capture_output=True, text=True)

    assert "ValueError: no device" in done.stdout
    place, *arguments = json.loads((vllm / "arguments.json").read_text())
    assert arguments == ["serve", "sft", "--host", "127.0.0.1", "--port", "9"]
    assert (Path(place) / "sft" / "config.json").exists()


def test_an_export_is_made_again_if_the_run_or_the_export_has_changed(
    run: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def exported(dtype: str = "float32") -> bool:
        lines.clear()
        cached.cached(run_folder, dtype, lines.append)
        return any(line.startswith("exporting ") for line in lines)

    run_folder = Path(shutil.copytree(run, tmp_path / "a run"))
    assert exported()
    assert not exported()
    (folder,) = (each for each in cache.glob("exports/*/*/") if each.name == "a-run")
    (folder / "model.safetensors").unlink()
    assert exported()
    assert exported("bfloat16")
    (run_folder / "alignkit.json").write_text((run_folder / "alignkit.json").read_text() + "\n")
    assert exported("bfloat16")
    assert [each.name for each in folder.parent.glob("*/")] == ["a-run"]


def test_requests_sample_from_the_policy_unless_a_generation_config_says_how(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": [2]}')
    cached.sample_by_default(tmp_path)
    assert json.loads(file.read_text()) == {
        "eos_token_id": [2],
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    file.write_text('{"do_sample": true, "top_p": 0.8}')
    cached.sample_by_default(tmp_path)
    assert json.loads(file.read_text()) == {"do_sample": True, "top_p": 0.8}
