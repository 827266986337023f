from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from halfbyte import encode, get_format, list_formats
from halfbyte.errors import FormatError, HalfbyteError
from halfbyte.formats import QuantizedTensor
from halfbyte.runtime import ops, packed

ROTATED = "mxfp4_duquant"
FORMATS = [name for name in list_formats() if packed.has_kernel(get_format(name))]


def weight(*shape: int, seed: int = 5) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, shape) * 0.02).astype(np.float32)


def tensor(name: str, *shape: int, seed: int = 5) -> QuantizedTensor:
    return encode(weight(*shape, seed=seed), name, search="absmax")


def activations(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).standard_normal(shape).astype(np.float32))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", list_formats())
def test_cut_rows_and_columns_decode_to_those_of_the_whole(name: str) -> None:
    whole = tensor(name, 2, 256, 512)
    values = whole.decode()
    np.testing.assert_array_equal(packed.rows_of(whole, 128, 256).decode(), values[:, 128:256])
    np.testing.assert_array_equal(packed.columns_of(whole, 128, 384).decode(), values[:, :, 128:384])


@pytest.mark.parametrize("name", list_formats())
def test_joined_halves_are_the_whole(name: str) -> None:
    whole = tensor(name, 256, 256)
    joined = packed.join_rows([packed.rows_of(whole, 0, 128), packed.rows_of(whole, 128, 256)])
    assert joined is not None
    for part, array in packed.parts_of(whole).items():
        np.testing.assert_array_equal(packed.parts_of(joined)[part], array)


@pytest.mark.parametrize("name", list_formats())
def test_a_tensor_is_made_again_of_its_arrays(name: str) -> None:
    whole = tensor(name, 128, 256)
    np.testing.assert_array_equal(packed.tensor_of(whole.format, packed.parts_of(whole)).decode(), whole.decode())


def test_a_stored_divisor_stays_a_divisor() -> None:
    whole = tensor("nvfp4", 32, 64)
    whole.global_scale_inv = np.asarray(np.float32(3.3))
    parts = packed.parts_of(whole)
    assert "global_scale" not in parts
    assert packed.tensor_of(whole.format, parts).global_scale_inv == np.float32(3.3)


def test_arrays_that_do_not_fit_are_refused() -> None:
    parts = packed.parts_of(tensor("nvfp4", 32, 64))
    with pytest.raises(FormatError, match=r"scales of a nvfp4 weight \[32, 64\] must be \[32, 4\]"):
        packed.tensor_of(get_format("nvfp4"), parts | {"scales": parts["scales"][:, :2]})


def test_cuts_within_blocks_are_refused() -> None:
    with pytest.raises(FormatError, match="columns 8 to 64 cannot be cut from a nvfp4 weight"):
        packed.columns_of(tensor("nvfp4", 32, 64), 8, 64)
    with pytest.raises(FormatError, match="rows 64 to 256 cannot be cut from a fp8_block128 weight"):
        packed.rows_of(tensor("fp8_block128", 256, 128), 64, 256)


@pytest.mark.parametrize("name", FORMATS)
def test_projections_are_one_product_whether_or_not_their_scales_agree(name: str) -> None:
    parts = [tensor(name, rows, 256, seed=seed) for seed, rows in enumerate((128, 48, 48))]
    x, bias = activations(3, 256), weight(224)
    found = ops.run_linear(x, packed.pack_linear(parts, bias))
    expected = torch.cat([x @ torch.from_numpy(part.decode()).T for part in parts], dim=-1) + torch.from_numpy(bias)
    close(found, expected)


def test_matrices_with_one_global_scale_become_one() -> None:
    whole = tensor("nvfp4", 64, 64)
    halves = [packed.rows_of(whole, 0, 32), packed.rows_of(whole, 32, 64)]
    assert isinstance(packed.pack_linear(halves), packed.PackedLinear)
    halves[1].global_scale = np.asarray(halves[1].global_scale * 2)
    assert isinstance(packed.pack_linear(halves), packed.PackedRows)


def test_columns_of_two_ranks_add_up() -> None:
    whole, x = tensor(ROTATED, 48, 256), activations(5, 256)
    parts = [packed.columns_of(whole, first, first + 128) for first in (0, 128)]
    found = sum(
        ops.run_linear(x[:, i * 128 : i * 128 + 128], packed.pack_linear([part])) for i, part in enumerate(parts)
    )
    close(found, x @ torch.from_numpy(whole.decode()).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_results_have_the_type_of_the_activations(dtype: torch.dtype) -> None:
    whole, x = tensor("mixfp4", 48, 64), activations(2, 3, 64).to(dtype)
    found = ops.run_linear(x, packed.pack_linear([whole]))
    expected = x.float() @ torch.from_numpy(whole.decode()).T
    assert found.dtype == dtype and found.shape == (2, 3, 48)
    torch.testing.assert_close(found.float(), expected, rtol=8e-3, atol=1e-5)


def test_compiled_code_runs_the_same_products() -> None:
    product = packed.pack_linear([tensor("mxfp4", 48, 64)])
    handle = ops.handle_of(product)
    assert ops.handle_of(product) == handle

    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.halfbyte.linear(x * 2, handle, product.n) + 1

    x = activations(3, 64)
    traced = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(x), ops.run_linear(x * 2, product) + 1, rtol=0, atol=0)


def test_compiled_code_runs_the_same_experts() -> None:
    gate_up, down = tensor("nvfp4", 4, 96, 64, seed=1), tensor("nvfp4", 4, 64, 48, seed=2)
    mixture = packed.pack_experts(gate_up, down)
    handle, x = ops.handle_of(mixture), activations(5, 64)
    chosen = torch.tensor([[0, 3], [1, 2], [3, 9], [2, 0], [1, 1]])
    shares = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))

    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.halfbyte.experts(x, chosen, shares, handle, mixture.n)

    expected = torch.zeros(5, 64)
    for row in range(5):
        for slot, expert in enumerate(chosen[row].tolist()):
            if expert < 4:
                gate, up = (torch.from_numpy(gate_up.decode()[expert]) @ x[row]).chunk(2)
                hidden = torch.nn.functional.silu(gate) * up
                expected[row] += shares[row, slot] * (torch.from_numpy(down.decode()[expert]) @ hidden)
    close(torch.compile(call, backend="aot_eager", fullgraph=True)(x), expected)


def test_activations_of_another_width_or_device_are_refused() -> None:
    product = packed.pack_linear([tensor("mxfp4", 48, 64)])
    with pytest.raises(HalfbyteError, match=r"activations of shape \[3, 32\] do not fit a weight with 64 columns"):
        ops.run_linear(activations(3, 32), product)
    with pytest.raises(HalfbyteError, match="on the CPU, and the activations are on meta"):
        ops.run_linear(torch.empty(3, 64, device="meta"), product)


def test_the_handle_of_a_model_that_is_gone_says_so() -> None:
    handle = ops.handle_of(packed.pack_linear([tensor("mxfp4", 48, 64)]))
    with pytest.raises(HalfbyteError, match="no packed weight has the handle"):
        torch.ops.halfbyte.linear(activations(3, 64), handle, 48)


@pytest.mark.parametrize("name", ["int4_g32", "affine4_g32", "fp8_channel", "fp8_block128"])
@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_scales_keep_the_type_of_their_file(name: str, kind: type) -> None:
    whole, x = tensor(name, 128, 256), activations(3, 256)
    whole.scales = whole.scales.astype(kind)
    product = packed.pack_linear([whole])
    close(ops.run_linear(x, product), x @ torch.from_numpy(whole.decode()).T)
    assert isinstance(product, packed.PackedLinear)
    np.testing.assert_array_equal(product.unpack().scales.astype(np.float32), whole.scales.astype(np.float32))
