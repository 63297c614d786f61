"""Start time, response times and memory of the server of ``alignkit label``.

::

    python benchmarks/label.py
    python benchmarks/label.py --items 200 --words 2000

The file of samples is made up. The server is a process of its own, opened twice: the first time it copies the samples
into its store. Times are those of one client on the same machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        write_samples(samples, options)
        size = samples.stat().st_size / 1e6
        print(f"{options.items} items of {options.k} answers of {options.words} words: {size:.1f} MB")
        for opened in ("first", "again"):
            with Server(samples, options.arguments) as server:
                seconds, cpu = server.seconds_to_first_byte, server.cpu_seconds
                print(f"opened {opened:6} first byte after {seconds:.2f} s ({cpu:.2f} s of them on the CPU)")
                times = label(server, min(options.labels, options.items // 3), options.k)
                for request, each in times.items():
                    milliseconds = sorted(1000 * time for time in each)
                    worst = milliseconds[int(0.99 * len(milliseconds))]
                    print(f"  {request:8} median {statistics.median(milliseconds):6.1f} ms, 99 % {worst:6.1f} ms")
                print(f"  memory {server.peak_memory() / 1e6:.0f} MB")


def write_samples(file: Path, options: argparse.Namespace) -> None:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 9))) for _ in range(5000)]
    with file.open("w", encoding="utf-8") as rows:
        for item in range(options.items):
            responses = [" ".join(generator.choices(words, k=options.words)) for _ in range(options.k)]
            rows.write(json.dumps({"prompt": f"Prompt {item}?", "responses": responses}) + "\n")


class Server:
    """A running server and a client that is signed in."""

    def __init__(self, samples: Path, arguments: list[str]) -> None:
        start = time.monotonic()
        command = [sys.executable, "-m", "alignkit", "label", str(samples), "--no-browser", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        match = None
        while match is None:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit("the server did not start")
            match = re.search(r"http://([\d.]+):(\d+)/\?token=(\S+)", line)
        self.client = http.client.HTTPConnection(match[1], int(match[2]))
        self.headers = {"Content-Type": "application/json", "Origin": f"http://{match[1]}:{match[2]}"}
        self.client.request("GET", f"/?token={match[3]}")
        response = self.client.getresponse()
        response.read(1)
        self.seconds_to_first_byte = time.monotonic() - start
        self.cpu_seconds = self.cpu_time()
        response.read()
        self.headers["Cookie"] = (response.getheader("Set-Cookie") or "").partition(";")[0]
        self.request("POST", "/api/session", {"labeler": "benchmark"})

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """The content of a response."""
        self.client.request(method, path, None if body is None else json.dumps(body), self.headers)
        response = self.client.getresponse()
        content = json.loads(response.read())
        if response.status != 200:
            raise SystemExit(f"{method} {path}: {content}")
        return content

    def cpu_time(self) -> float:
        """Seconds that the process has used a CPU: on a shared machine less than have passed. Linux only."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_memory(self) -> int:
        """Bytes of memory that the process had at most. Linux only."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        return 1024 * int(match[1]) if match else 0

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        with self.process:
            self.process.terminate()


def label(server: Server, count: int, k: int) -> dict[str, list[float]]:
    """Label items, with one undo and one skip in ten. Returns the seconds of each request."""
    times: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, *request: Any) -> Any:
        start = time.perf_counter()
        content = server.request(*request)
        times[name].append(time.perf_counter() - start)
        return content

    label = {"ranks": {str(answer): answer for answer in range(k)}, "seconds": 40.0}
    for number in range(count):
        item = timed("next", "GET", "/api/next")["item"]["id"]
        if number % 10 == 5:
            timed("skip", "POST", f"/api/items/{item}/skip")
            item = timed("undo", "POST", "/api/undo")["item"]["id"]
        timed("submit", "PUT", f"/api/items/{item}", label)
    timed("status", "GET", "/api/status")
    return times


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--k", type=int, default=9, help="answers per item")
    parser.add_argument("--words", type=int, default=100, help="words per answer")
    parser.add_argument("--labels", type=int, default=200, help="items that are labeled")
    parser.add_argument("arguments", nargs="*", help="arguments of alignkit label, after --")
    return parser.parse_args()


if __name__ == "__main__":
    main()
