"""Numbers of the router in Prometheus' format, and the same numbers for the status page."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from halfbyte.serve.backends import Backend, Backends
from halfbyte.serve.limits import Gate

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
RECENT = 60.0
"""Seconds over which tokens per second are averaged."""


class RouterMetrics:
    """Counters of one router; labels are names of rules, precisions and endpoints, never text of a request."""

    def __init__(self, backends: Backends, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        self._backends = backends
        self._gate = gate
        self._recent: deque[tuple[float, int]] = deque(maxlen=10_000)
        self._first: deque[float] = deque(maxlen=1000)
        self._decisions: dict[tuple[str, str], int] = {}
        self._answers: dict[str, list[int]] = {}
        of_request = ["endpoint", "precision", "rule", "status"]
        self.requests = Counter("halfbyte_requests", "Requests answered", of_request, registry=self.registry)
        self.tokens = Counter("halfbyte_tokens", "Tokens", ["precision", "kind"], registry=self.registry)
        self.refused = Counter("halfbyte_refused", "Requests refused", ["reason"], registry=self.registry)
        self.first = self._times("halfbyte_first_byte_seconds", "Time to the first byte")
        self.seconds = self._times("halfbyte_request_seconds", "Time to the last byte")
        running = Gauge("halfbyte_requests_running", "Requests that run", registry=self.registry)
        running.set_function(lambda: gate.running)
        waiting = Gauge("halfbyte_requests_waiting", "Requests that wait", registry=self.registry)
        waiting.set_function(lambda: gate.waiting)
        up = Gauge("halfbyte_backend_up", "Whether a backend is healthy", ["precision"], registry=self.registry)
        restarts = Gauge("halfbyte_backend_restarts", "Restarts of a backend", ["precision"], registry=self.registry)
        saved = Gauge("halfbyte_saved_bytes", "Bytes of weights below BF16", ["precision"], registry=self.registry)
        for backend in backends:
            up.labels(backend.name).set_function(partial(_up, backend))
            restarts.labels(backend.name).set_function(partial(_restarts, backend))
            saved.labels(backend.name).set(max(0, backend.dense_nbytes - backend.nbytes))

    def _times(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, ["precision"], buckets=_SECONDS, registry=self.registry)

    def answered(
        self, endpoint: str, precision: str, rule: str, status: int, first: float | None, seconds: float
    ) -> None:
        """Count an answer; ``first`` and ``seconds`` since its request."""
        self.requests.labels(endpoint, precision, rule, str(status)).inc()
        self.seconds.labels(precision).observe(seconds)
        if first is not None:
            self.first.labels(precision).observe(first)
            self._first.append(first)
        self._decisions[rule, precision] = self._decisions.get((rule, precision), 0) + 1
        self._answers.setdefault(precision, [0, 0])[0] += 1

    def generated(self, precision: str, prompt: int, completion: int) -> None:
        """Count the tokens of an answer."""
        self.tokens.labels(precision, "prompt").inc(prompt)
        self.tokens.labels(precision, "completion").inc(completion)
        self._answers.setdefault(precision, [0, 0])[1] += completion
        self._recent.append((time.monotonic(), completion))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def status(self) -> dict[str, Any]:
        """What the status page shows, as JSON."""
        now = time.monotonic()
        recent = sum(tokens for at, tokens in self._recent if now - at <= RECENT)
        ordered = sorted(self._first)
        return {
            "models": [
                {
                    "precision": b.name,
                    "bits": b.precision.bits,
                    "engine": b.engine,
                    "healthy": b.healthy,
                    "restarts": b.restarts,
                    "bytes": b.nbytes,
                    "saved_bytes": max(0, b.dense_nbytes - b.nbytes),
                    "requests": self._answers.get(b.name, [0, 0])[0],
                    "tokens": self._answers.get(b.name, [0, 0])[1],
                }
                for b in self._backends
            ],
            "decisions": [
                {"rule": rule, "precision": precision, "requests": count}
                for (rule, precision), count in sorted(self._decisions.items(), key=lambda item: -item[1])
            ],
            "running": self._gate.running,
            "waiting": self._gate.waiting,
            "tokens_per_second": recent / RECENT,
            "first_token_seconds": ordered[len(ordered) // 2] if ordered else None,
        }


def _up(backend: Backend) -> float:
    return float(backend.healthy)


def _restarts(backend: Backend) -> float:
    return float(backend.restarts)
