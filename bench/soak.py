"""Soak a server: many clients for minutes, some of which hang up or send nonsense; then look for what was left behind.

    python bench/soak.py MODEL --seconds 180

Starts `decoct serve MODEL` on a free port, and fails if an answer differs from what one client alone gets, if a seat or a
waiting place is not given back, if the server stops answering, or if its memory grows by more than a tenth after the
first quarter.
"""

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

PROMPTS = ["Once upon a time", "The sea", "Tom and his dog", "A", "One day a little girl found a big red ball and"]


def ask(port: int, verb: str, path: str, body: dict[str, object] | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(verb, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def post(port: int, body: dict[str, object]) -> tuple[int, dict]:
    status, text = ask(port, "POST", "/v1/completions", body)
    return status, json.loads(text)


def hang_up(port: int, name: str) -> None:
    body = json.dumps({"model": name, "prompt": "Once", "max_tokens": 200, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        connection.recv(100)


def metrics(port: int) -> dict[str, float]:
    lines = ask(port, "GET", "/metrics")[1].decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


class Soak:
    """What clients got, and what they should have got."""

    def __init__(self, port: int, name: str, seconds: float) -> None:
        self.port, self.name, self.end = port, name, time.monotonic() + seconds
        self.counts = {"right": 0, "busy": 0, "refused": 0, "hung up": 0}
        self.wrong: list[str] = []
        self.expected = {}
        for prompt in PROMPTS:
            status, answer = post(port, {"model": name, "prompt": prompt, "max_tokens": 24, "temperature": 0})
            if status != 200:
                sys.exit(f"the server answers {status}: {answer}")
            self.expected[prompt] = answer["choices"][0]["text"]

    def client(self, seed: int) -> None:
        """Ask until the time is over."""
        drawn = random.Random(seed)  # noqa: S311 - the same mixture every time
        while time.monotonic() < self.end and not self.wrong:
            what = drawn.random()
            if what < 0.15:
                hang_up(self.port, self.name)
                self.counts["hung up"] += 1
            elif what < 0.25:
                status, _ = post(self.port, {"model": self.name, "prompt": 3})
                self.counts["refused"] += 1
                if status != 400:
                    self.wrong.append(f"nonsense was answered with {status}")
            else:
                prompt = drawn.choice(PROMPTS)
                asked = {"model": self.name, "prompt": prompt, "max_tokens": 24, "temperature": 0}
                status, answer = post(self.port, asked)
                if status == 429:
                    self.counts["busy"] += 1
                elif status != 200 or answer["choices"][0]["text"] != self.expected[prompt]:
                    self.wrong.append(f"{prompt!r}: {status} {answer}")
                else:
                    self.counts["right"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--clients", type=int, default=8)
    asked = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        "from decoct.cli import main; main()",
        "serve",
        asked.model,
        "--port",
        str(port),
        "--max-waiting",
        "4",
    ]
    server = subprocess.Popen(command)
    try:
        while server.poll() is None:
            try:
                metrics(port)
                break
            except OSError:
                time.sleep(0.2)
        soak = Soak(port, Path(asked.model).name, asked.seconds)
        threads = [threading.Thread(target=soak.client, args=(seed,)) for seed in range(asked.clients)]
        for thread in threads:
            thread.start()
        time.sleep(asked.seconds / 4)
        process = psutil.Process(server.pid)
        early = process.memory_info().rss
        for thread in threads:
            thread.join()
        late = process.memory_info().rss
        time.sleep(2)
        left = metrics(port)
        busy = left["decoct_running"] + left["decoct_waiting"]
        wrong = [*soak.wrong[:3]]
        wrong += ["seats or waiting places were not given back"] if busy else []
        wrong += ["memory grew"] if late > 1.1 * early else []
        wrong += [] if soak.counts["right"] else ["nothing was answered"]
        print(json.dumps({**soak.counts, "early_bytes": early, "late_bytes": late, "left_busy": busy, "wrong": wrong}))
        if wrong:
            sys.exit(f"failed: {wrong[0]}")
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
