"""llama.cpp's own HTTP server as the package xllamacpp carries it: ``MODEL.gguf --port N``."""

from __future__ import annotations

import argparse
import importlib
import os
import threading
from collections.abc import Sequence
from typing import Any


def parameters(argv: Sequence[str] | None = None) -> Any:
    """Return llama.cpp's parameters for the arguments of this program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--alias", default="default")
    parser.add_argument("--ctx-size", type=int, default=0, help="tokens; 0: the model's own")
    parser.add_argument("--parallel", type=int, default=4, help="requests at once")
    args = parser.parse_args(argv)
    llama = importlib.import_module("xllamacpp")
    params = llama.CommonParams()
    params.model.path = args.model
    params.hostnames = [args.host]
    params.port = args.port
    params.model_alias = {args.alias}
    params.n_ctx = args.ctx_size
    params.n_parallel = args.parallel
    if os.environ.get("LLAMA_API_KEY"):
        params.api_keys = [os.environ["LLAMA_API_KEY"]]
    return params


def main() -> None:
    """Serve until the process is ended."""
    llama = importlib.import_module("xllamacpp")
    server = llama.Server(parameters())
    print(f"listening on {server.listening_address}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
