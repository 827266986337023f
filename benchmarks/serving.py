"""What the router costs: requests and streams straight to a server and through the router, in turn.

    python benchmarks/serving.py

The server behind is a small process that answers at once, so all that is measured is the way there and back. The
two ways alternate, request by request, so that other work on the machine meets both alike. The router runs in this
process and the server does not, so the difference of CPU time is the router's, also on a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.serve.running import served


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--pause", type=float, default=0.005, help="seconds between tokens: 0.005 is 200 tokens/s")
    args = parser.parse_args()
    with served("w4", "w16") as running, httpx.Client(trust_env=False, timeout=60) as client:
        ways = {"direct": running.router.backends["w4"].url, "router": running.url}
        times: dict[str, list[float]] = {way: [] for way in ways}
        work: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(args.requests + 20):
            for way, url in ways.items():
                start = time.process_time()
                seconds = ask(
                    client, url, {"model": "halfbyte", "messages": [{"role": "user", "content": f"question {number}"}]}
                )
                if number >= 20:
                    times[way].append(seconds)
                    work[way].append(time.process_time() - start)
        work_of_streams = dict.fromkeys(ways, 0.0)
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(5):
            for way, url in ways.items():
                body = {"model": "halfbyte", "messages": [], "stream": True, "count": args.tokens, "pause": args.pause}
                start = time.process_time()
                rates[way].append(args.tokens / ask(client, url, body))
                work_of_streams[way] += (time.process_time() - start) / (5 * args.tokens)
    median = {way: statistics.median(values) for way, values in times.items()}
    rate = {way: statistics.median(values) for way, values in rates.items()}
    cpu = statistics.median(work["router"]) - statistics.median(work["direct"])
    cpu_per_token = work_of_streams["router"] - work_of_streams["direct"]
    print(
        json.dumps(
            {
                "request_ms": {way: round(1000 * value, 3) for way, value in median.items()},
                "router_ms": round(1000 * (median["router"] - median["direct"]), 3),
                "router_cpu_ms": round(1000 * cpu, 3),
                "router_cpu_us_per_token": round(1e6 * cpu_per_token, 1),
                "tokens_per_second": {way: round(value, 1) for way, value in rate.items()},
                "router_share_of_rate": round(1 - rate["router"] / rate["direct"], 4),
            },
            indent=2,
        )
    )


def ask(client: httpx.Client, url: str, body: dict[str, object]) -> float:
    """Return the seconds of a request to its last byte."""
    begin = time.perf_counter()
    client.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
