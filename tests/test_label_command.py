"""``alignkit label`` as a process of its own: killed, restarted, twice at once; and what it refuses."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from label_clients import read_rows, write_rows
from label_samples import numbered

from alignkit.cli import main
from alignkit.labeling import serve

LISTENING = re.compile(r"open http://([\w.]+):(\d+)/\?token=(\S+) \(press Ctrl-C to stop\)")


class Process:
    """A server in a process of its own."""

    def __init__(self, samples: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "alignkit", "label", str(samples), *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "DISPLAY": ""}
        )
        assert self.process.stdout is not None
        self.lines = []
        while not self.lines or not LISTENING.fullmatch(self.lines[-1]):
            line = self.process.stdout.readline()
            assert line, self.process.communicate()[1]
            self.lines.append(line.rstrip("\n"))
        match = LISTENING.fullmatch(self.lines[-1])
        assert match is not None
        self.host, self.port, self.token = match[1], int(match[2]), match[3]
        self.browsers: list[Browser] = []

    def browser(self, name: str, cookie: str | None = None) -> Browser:
        """A browser of a labeler, whose connection ends with the test."""
        self.browsers.append(Browser(self, name, cookie))
        return self.browsers[-1]

    def end(self, number: int) -> tuple[int, str, str]:
        """Send a signal. Returns the exit status and what was printed."""
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=30)
        return self.process.returncode, output, errors


class Browser:
    """A client of a server, with a connection of its own."""

    def __init__(self, process: Process, name: str, cookie: str | None) -> None:
        self.connection = http.client.HTTPConnection(process.host, process.port)
        origin = f"http://{process.host}:{process.port}"
        self.headers = {"Content-Type": "application/json", "Origin": origin}
        if cookie is None:
            self.connection.request("GET", f"/?token={process.token}")
            response = self.connection.getresponse()
            response.read()
            cookie = response.headers["Set-Cookie"].partition(";")[0]
        self.headers["Cookie"] = cookie
        self.request("POST", "/api/session", {"labeler": name})

    def request(self, method: str, path: str, body: Any = None) -> Any:
        self.connection.request(method, path, None if body is None else json.dumps(body), self.headers)
        response = self.connection.getresponse()
        content = json.loads(response.read())
        assert response.status == 200, content
        return content

    def label_all(self, labeled: list[int]) -> None:
        """Label until nothing is left; ``labeled`` gets the numbers whose submission was confirmed."""
        while item := self.request("GET", "/api/next")["item"]:
            ranks = {answer["id"]: int(answer["text"][-1]) for answer in item["answers"]}
            self.request("PUT", f"/api/items/{item['id']}", {"ranks": ranks, "seconds": 1})
            labeled.append(item["number"])


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """``start(samples, "--port", "8000")``: a server, which ends with the test."""
    started: list[Process] = []

    def call(samples: Path, *arguments: str) -> Process:
        started.append(Process(samples, *arguments))
        return started[-1]

    yield call
    for each in started:
        each.process.kill()
        each.process.communicate()
        for browser in each.browsers:
            browser.connection.close()


def exported(samples: Path) -> list[dict[str, Any]]:
    output = samples.with_name("rankings.jsonl")
    assert main(["label", str(samples), "--export", str(output), "--merge", "apart"]) == 0
    return read_rows(output)


def test_ctrl_c_ends_with_one_line_about_the_labels(start: Callable[..., Process], tmp_path: Path) -> None:
    samples = write_rows(tmp_path / "samples.jsonl", numbered(2))
    server = start(samples)
    server.browser("anna").label_all([])
    status, output, errors = server.end(signal.SIGINT)

    store = tmp_path / "samples.labels.sqlite"
    hint = f"the labels are in {store}. Write them: alignkit label {samples} --export rankings.jsonl\n"
    assert (status, output, errors) == (0, hint, "")
    assert len(server.lines) == 1
    assert not store.with_name(f"{store.name}-wal").exists()  # everything is in one file
    assert [row["ranks"] for row in exported(samples)] == [[0, 1, 2]] * 2


def test_kill_9_loses_nothing_that_was_submitted_and_an_open_page_continues(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    samples = write_rows(tmp_path / "samples.jsonl", numbered(300))
    server, confirmed = start(samples), list[int]()
    browser = server.browser("anna")

    def label() -> None:
        with pytest.raises((OSError, http.client.HTTPException)):
            browser.label_all(confirmed)

    thread = threading.Thread(target=label)
    thread.start()
    while len(confirmed) < 20:
        thread.join(0.005)
    assert server.end(signal.SIGKILL)[0] == -9
    thread.join()

    kept = {int(re.findall(r"\d+", row["prompt"])[0]) + 1 for row in exported(samples)}
    assert {*confirmed} <= kept <= {*confirmed, confirmed[-1] + 1}  # perhaps one more, whose confirmation was lost
    assert len(exported(samples)) == len(kept)

    again = start(samples)
    assert again.port == server.port
    assert again.token != server.token
    open_page = again.browser("anna", browser.headers["Cookie"])
    assert open_page.request("GET", "/api/next")["item"]["number"] == max(kept) + 1
    assert open_page.request("GET", "/api/next")["progress"]["done"] == len(kept)


def test_two_servers_of_one_store_and_six_browsers_label_every_item_once(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    samples = write_rows(tmp_path / "samples.jsonl", numbered(60))
    servers = [start(samples, "--overlap", "0"), start(samples)]
    assert servers[0].port != servers[1].port
    labeled = [list[int]() for _ in range(6)]
    browsers = [servers[number % 2].browser(f"labeler {number}") for number in range(6)]
    threads = [
        threading.Thread(target=browser.label_all, args=[numbers])
        for browser, numbers in zip(browsers, labeled, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(number for numbers in labeled for number in numbers) == list(range(1, 61))
    rows = exported(samples)
    assert len(rows) == 60
    assert all(row["ranks"] == [0, 1, 2] for row in rows)
    assert sum(map(bool, labeled)) > 1


def test_it_imports_neither_torch_nor_what_it_does_not_need(tmp_path: Path) -> None:
    samples = write_rows(tmp_path / "samples.jsonl", numbered(2))
    code = (
        "import sys\n"
        "from alignkit.cli import main\n"
        "import uvicorn\n"
        "uvicorn.Server.run = lambda *arguments, **settings: None\n"
        "status = main(['label', sys.argv[1], '--no-browser'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'nh3', 'markdown_it', 'alignkit_sft'}\n"
        "sys.exit(status or ' '.join(heavy & {*sys.modules}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(samples)], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("arguments", "display", "opened"), [([], ":0", 1), (["--no-browser"], ":0", 0), ([], "", 0)])
def test_a_browser_is_opened_where_there_is_a_display(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    display: str,
    opened: int,
) -> None:
    samples = write_rows(tmp_path / "samples.jsonl", numbered(2))
    addresses: list[str] = []
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(webbrowser, "open", addresses.append)
    monkeypatch.setattr(uvicorn.Server, "run", lambda *arguments, **settings: None)

    assert main(["label", str(samples), *arguments]) == 0
    printed = LISTENING.search(capsys.readouterr().out)
    assert printed is not None
    assert len(addresses) == opened
    assert all(address.startswith(f"http://127.0.0.1:{printed[2]}/?token=") for address in addresses)
    assert all(printed[3] not in address for address in addresses)  # any user can read a command line


def test_a_port_in_use_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = write_rows(tmp_path / "samples.jsonl", numbered(2))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        assert main(["label", str(samples), "--port", str(port)]) == 2
        assert os.listdir(tmp_path) == ["samples.jsonl"]
        assert capsys.readouterr().err == (f"alignkit: error: --port {port} is in use: choose another one\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample.jsonl"], "no file or folder sample.jsonl. Did you mean 'samples.jsonl'?"),
        (["samples.jsonl", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 0: "),
        (["samples.jsonl", "--host", "no such host"], "--host no such host: "),
        (["samples.jsonl", "--prompts", "p.jsonl"], "label: --prompts has no effect with a file of samples"),
        (["samples.jsonl", "-k", "2"], "label: -k has no effect with a file of samples"),
        (["samples.jsonl", "--json"], "label: --json has no effect without --status"),
        (["samples.jsonl", "--merge", "mean"], "label: --merge has no effect without --export"),
        (["samples.jsonl", "--status", "--export", "r.jsonl"], "label: --export has no effect with --status"),
        (["samples.jsonl", "--export", "r.jsonl", "--merge", "median"], "--merge: 'median' is not mean or apart"),
        (["samples.jsonl", "--no-grades", "--scale", "5"], "label: --scale has no effect with --no-grades"),
        (["samples.jsonl", "--guide", "no.md"], "--guide no.md: No such file or directory"),
        (["samples.jsonl", "--guide", "binary.md"], "--guide binary.md: not UTF-8"),
        (["samples.jsonl", "--guide", "."], "--guide .: Is a directory"),
        (["samples.jsonl", "--labeler", " "], "--labeler: a labeler's name must have 1 to 64 characters"),
        (["runs", "--status"], "--status and --export need the file of samples, and runs is not a data file"),
        (["runs"], "label runs: name the prompts to sample answers to with --prompts, or a file of samples"),
        (["runs", "--prompts", "samples.jsonl", "-k", "1"], "label: -k must be at least 2"),
        (["./runs", "--prompts", "samples.jsonl"], "no model folder ./runs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("samples.jsonl"), numbered(2))
    Path("binary.md").write_bytes(b"\xff")

    assert main(["label", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"alignkit: error: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_without_the_extra_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = write_rows(tmp_path / "samples.jsonl", numbered(2))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert main(["label", str(samples)]) == 2
    assert capsys.readouterr().err == (
        "alignkit: error: label needs starlette, which is not installed: pip install 'alignkit[label]'\n"
    )


def test_a_run_is_sampled_first_and_continued_where_it_was_interrupted(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("--plugin", "lora", "train.max_steps=1")
    monkeypatch.chdir(tmp_path)
    write_rows(Path("prompts.jsonl"), [{"prompt": f"What is {number}?"} for number in range(4)])
    served: list[Any] = []
    monkeypatch.setattr(serve, "serve", lambda samples, store, *arguments: served.append((samples, store.next("anna"))))
    sampling = ["-k", "3", "--max-new-tokens", "4", "--batch", "2", "--seed", "5"]

    assert main(["sample", str(run), "prompts.jsonl", *sampling, "-o", "sampled.jsonl"]) == 0
    Path("samples.jsonl").write_text("".join(Path("sampled.jsonl").read_text().splitlines(keepends=True)[:3]))
    capsys.readouterr()
    assert main(["label", str(run), "--prompts", "prompts.jsonl", *sampling]) == 0
    assert "samples.jsonl already has 2 of 4 rows" in capsys.readouterr().out
    assert Path("samples.jsonl").read_text() == Path("sampled.jsonl").read_text()
    assert main(["label", str(run), "--prompts", "prompts.jsonl", *sampling]) == 0
    assert [(str(samples), len(item.answers)) for samples, item in served] == [("samples.jsonl", 3)] * 2


def test_the_wheel_has_the_page() -> None:
    from hatchling.builders.wheel import WheelBuilder

    root = Path(__file__).parents[1]
    files = {file.distribution_path for file in WheelBuilder(str(root)).recurse_included_files()}

    page = sorted((root / "alignkit" / "labeling" / "page").iterdir())
    assert {file.suffix for file in page} == {".css", ".html", ".js"}
    assert {f"alignkit/labeling/page/{file.name}" for file in page} <= files
