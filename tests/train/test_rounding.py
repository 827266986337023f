"""Masters to codes, and gradients back into the space of the blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from halfbyte.formats import get_format
from halfbyte.plan.build import make_plan
from halfbyte.search import encode
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.train.rounding import in_block_space, round_given, round_searched, unrotated_gradient
from small_models import DENSE_CONFIG, dense_tensors, linear, write_checkpoint


def values() -> np.ndarray:
    return np.random.default_rng(4).normal(0, 0.02, (32, 64)).astype(np.float32)


def test_values_are_those_that_the_tensor_decodes_to() -> None:
    tensor = encode(values(), "mixfp4", "sweep")
    rounded = round_given(tensor, values())
    np.testing.assert_array_equal(rounded.values, rounded.tensor.decode())


def test_gradients_pass_between_the_ends_of_a_block_only() -> None:
    tensor = encode(values(), "nvfp4", "sweep")
    master = values()
    master[3, 5], master[3, 6] = 9.0, -9.0
    gradient = unrotated_gradient(round_given(tensor, master), np.ones_like(master))
    assert gradient[3, 5] == gradient[3, 6] == 0 and (np.delete(gradient, 3, axis=0) != 0).mean() > 0.95


def test_gradients_of_rotated_weights_are_rotated_as_the_weights_are() -> None:
    fmt = get_format("mxfp4_hadamard")
    tensor = encode(values(), fmt, "sweep")
    master = np.float32(0.5) * in_block_space(tensor, values())
    direction = np.random.default_rng(1).normal(size=master.shape).astype(np.float32)
    rounded = round_given(tensor, master)
    assert rounded.passes.all()
    # <d, R^T m> = <R d, m>
    in_blocks = fmt.to_plain(rounded.tensor).decode()
    gradient = unrotated_gradient(rounded, direction)
    assert np.isclose(np.vdot(direction, rounded.values), np.vdot(gradient, in_blocks), rtol=1e-4)


def test_a_group_shares_the_scale_of_its_largest_member(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", dense_tensors(), DENSE_CONFIG)
    plan = make_plan(Checkpoint.open(tmp_path / "m"), linear("nvfp4"))
    item = next(i for i in plan.items if i.weight.group)
    master = np.random.default_rng(4).normal(0, 0.02, item.weight.shape).astype(np.float32)
    alone = round_searched(plan, item, master, [master]).tensor
    together = round_searched(plan, item, master, [master, 4 * master]).tensor
    assert together.global_scale == 4 * alone.global_scale
