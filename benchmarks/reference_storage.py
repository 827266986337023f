"""What storing the source's log-probabilities costs: KL divergences from FP32, FP16, BF16 and uint16 copies of them.

    D=../shared/data; python benchmarks/reference_storage.py $D/models/qwen3-tiny-wiki $D/text/enwiki2015/valid.txt

The model is compared with its own copies in three recipes, from nearly none to much divergence. Printed: the error of
the mean, and the largest error of a token, in nats.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch

import halfbyte
from halfbyte.evaluate.divergence import divergence
from halfbyte.evaluate.forward import log_probabilities
from halfbyte.evaluate.reference_logprobs import compress, expand
from halfbyte.evaluate.results import environment, now
from halfbyte.evaluate.settings import TextSettings
from halfbyte.evaluate.text import Passage, passage_of
from halfbyte.runtime import load, load_tokenizer

RECIPES = ("fp8", "nvfp4", "mxfp4")


def through(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda p: torch.log_softmax(p.to(dtype).float(), dim=1)


STORAGE: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "FP32": (4, lambda p: p),
    "uint16 over the token's range": (2, lambda p: expand(*compress(p))),
    "FP16": (2, through(torch.float16)),
    "BF16": (2, through(torch.bfloat16)),
}


def all_of(path: Path, passage: Passage) -> torch.Tensor:
    return torch.cat([p for _, p, _ in log_probabilities(load(path, "float32", dequantize=True), passage)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--max-tokens", type=int, default=4096)
    args = parser.parse_args()
    passage = passage_of(
        TextSettings(args.text, length=256, max_tokens=args.max_tokens), None, load_tokenizer(args.model)
    )
    source = all_of(args.model, passage)
    others = {"itself": source}
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory(prefix="halfbyte-storage-") as folder:
            halfbyte.quantize(args.model, Path(folder) / "out", recipe)
            others[recipe] = all_of(Path(folder) / "out", passage)
    print(f"{now()[:10]}, {environment()}, {args.model.name}, {len(source):,} tokens of {args.text.name}\n")
    print(f"| stored as | bytes | {' | '.join(f'{name}: mean, token' for name in others)} |")
    print(f"|---|---:|{'---:|' * len(others)}")
    exact = {name: divergence(source.double(), other.double()) for name, other in others.items()}
    for name, (size, store) in STORAGE.items():
        kept = store(source)
        errors = [divergence(kept, other) - exact[key] for key, other in others.items()]
        cells = [f"{float(e.mean()):+.1e}, {float(e.abs().max()):.1e}" for e in errors]
        print(f"| {name} | {size} | {' | '.join(cells)} |")
    print(f"| *the divergence itself* | | {' | '.join(f'{float(kl.mean()):.2e}' for kl in exact.values())} |")


if __name__ == "__main__":
    main()
