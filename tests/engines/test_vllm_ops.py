"""The operators of vLLM's graphs; they need torch, not vLLM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from halfbyte.formats import QuantizedTensor
from halfbyte.kernels.linear import isas
from halfbyte.search import encode
from small_models import heavy_tailed

torch = pytest.importorskip("torch")
if not isas():
    pytest.skip("needs compiled kernels", allow_module_level=True)
from halfbyte.engines import vllm_ops  # noqa: E402
from halfbyte.runtime import packed  # noqa: E402


def quantized(*shape: int) -> QuantizedTensor:
    values = heavy_tailed(np.random.default_rng(0), *shape).astype(np.float32)
    return encode(values, "mixfp4")


def compiled(function: Any, *args: Any) -> Any:
    """What the function gives as a graph in which the operators stand by themselves."""
    return torch.compile(function, backend="aot_eager", fullgraph=True)(*args)


def test_a_product_in_a_graph_is_the_product_outside_of_it() -> None:
    product = packed.pack_linear([quantized(48, 64)])
    number, x = vllm_ops.number_of(product), torch.randn(3, 64)

    def multiply(x: Any, number: Any) -> Any:
        return vllm_ops.multiply(x, number, product, "exact") * 2

    assert torch.equal(compiled(multiply, x, number), multiply(x, number))


def test_one_graph_serves_every_layer() -> None:
    """The number of the product is an input, so that the second layer does not compile again."""
    products = [packed.pack_linear([quantized(48, 64)]), packed.pack_linear([quantized(48, 64)])]
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(backend=count, fullgraph=True)
    def multiply(x: Any, number: Any) -> Any:
        return torch.ops.halfbyte_vllm.linear(x, number, 48, "exact")

    x = torch.randn(2, 64)
    results = [multiply(x, vllm_ops.number_of(product)) for product in products]
    assert len(graphs) == 1 and torch.equal(*results)


def test_rows_in_a_graph_are_those_of_the_decoded_matrix() -> None:
    tensor = quantized(48, 64)
    product = packed.pack_linear([tensor])
    number, ids = vllm_ops.number_of(product), torch.tensor([[3, 47], [0, 3]])

    def look_up(ids: Any, number: Any) -> Any:
        return vllm_ops.look_up(ids, number, product, torch.float32)

    wanted = torch.from_numpy(tensor.decode())[ids]
    assert torch.equal(look_up(ids, number), wanted) and torch.equal(compiled(look_up, ids, number), wanted)


def test_experts_in_a_graph_are_those_outside_of_it() -> None:
    product = packed.pack_experts(quantized(4, 64, 32), quantized(4, 32, 32), activation="silu")
    number, x, chosen = vllm_ops.number_of(product), torch.randn(3, 32), torch.tensor([[0, 3], [2, 1], [-1, 3]])

    def mix(x: Any, chosen: Any, number: Any) -> Any:
        return vllm_ops.mix(x, chosen, torch.full((3, 2), 0.5), number, product, "exact")

    assert torch.equal(compiled(mix, x, chosen, number), mix(x, chosen, number))
