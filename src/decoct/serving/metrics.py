"""What a server counts, in Prometheus' text format."""

import threading
from collections import Counter

_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


class Histogram:
    """Seconds, in buckets."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self._counts[sum(seconds > bound for bound in _BOUNDS)] += 1
        self._sum += seconds

    def lines(self, name: str) -> list[str]:
        """As Prometheus reads it."""
        found, total = [], 0
        for bound, count in zip((*_BOUNDS, "+Inf"), self._counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{name}_sum {self._sum}", f"{name}_count {total}"]


class Metrics:
    """Counts of one server; for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._tokens: Counter[str] = Counter()
        self._first, self._whole = Histogram(), Histogram()

    def answered(self, status: int) -> None:
        """A request was answered so; 499: its client hung up."""
        with self._lock:
            self._requests[status] += 1

    def wrote(self, prompt_tokens: int, tokens: int, first_token: float | None, seconds: float) -> None:
        """An answer is finished, or was given up."""
        with self._lock:
            self._tokens["prompt"] += prompt_tokens
            self._tokens["generated"] += tokens
            if first_token is not None:
                self._first.add(first_token)
            self._whole.add(seconds)

    def text(self, *, running: int, waiting: int, seats: int) -> str:
        """All of it, and how busy the server is now."""
        with self._lock:
            lines = ["# TYPE decoct_requests_total counter"]
            lines += [f'decoct_requests_total{{status="{status}"}} {n}' for status, n in sorted(self._requests.items())]
            for kind in ("prompt", "generated"):
                lines += [f"# TYPE decoct_{kind}_tokens_total counter"]
                lines += [f"decoct_{kind}_tokens_total {self._tokens[kind]}"]
            for name, value in {"running": running, "waiting": waiting, "seats": seats}.items():
                lines += [f"# TYPE decoct_{name} gauge", f"decoct_{name} {value}"]
            for name, found in {"first_token": self._first, "answer": self._whole}.items():
                full = f"decoct_{name}_seconds"
                lines += [f"# TYPE {full} histogram", *found.lines(full)]
        return "\n".join(lines) + "\n"
