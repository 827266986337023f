"""What the router counts."""

from __future__ import annotations

from halfbyte.serve.backends import Backend, Backends
from halfbyte.serve.decision import Precision
from halfbyte.serve.limits import Gate
from halfbyte.serve.router_metrics import RouterMetrics


def test_answers_and_tokens_are_counted_for_both_readers() -> None:
    backends = Backends([Backend(Precision("nvfp4", 4.5), "", "", "vllm", nbytes=30, dense_nbytes=100)])
    metrics = RouterMetrics(backends, Gate(1, 1))
    metrics.answered("/v1/completions", "nvfp4", "coding", 200, 0.2, 1.0)
    metrics.answered("/v1/completions", "nvfp4", "coding", 499, None, 1.0)
    metrics.generated("nvfp4", 3, 60)
    backends["nvfp4"].healthy = False
    text = metrics.text().decode()
    for line in (
        'halfbyte_requests_total{endpoint="/v1/completions",precision="nvfp4",rule="coding",status="200"} 1.0',
        'halfbyte_tokens_total{kind="completion",precision="nvfp4"} 60.0',
        'halfbyte_saved_bytes{precision="nvfp4"} 70.0',
        'halfbyte_backend_up{precision="nvfp4"} 0.0',
        'halfbyte_first_byte_seconds_count{precision="nvfp4"} 1.0',
    ):
        assert line in text
    status = metrics.status()
    assert status["decisions"] == [{"rule": "coding", "precision": "nvfp4", "requests": 2}]
    assert (status["tokens_per_second"], status["first_token_seconds"]) == (1.0, 0.2)
    model = status["models"][0]
    assert (model["requests"], model["tokens"], model["saved_bytes"], model["healthy"]) == (2, 60, 70, False)
