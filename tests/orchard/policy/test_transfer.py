"""Transfers of weights: what travels, how it is verified, and what comes out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from orchard.errors import EngineError
from orchard.policy.lora import AdapterFactors, merge
from orchard.policy.transfer import (
    BaseMismatchError,
    WeightTransfer,
    check_digest,
    digest,
    pack,
    pack_adapters,
    unpack,
)

RNG = np.random.default_rng(0)


def values() -> dict[str, np.ndarray]:
    """Weights of three shapes."""
    shapes = {"table": (9, 4), "down": (4, 6), "norm": (4,)}
    return {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def adapter() -> AdapterFactors:
    """Factors of an adapter of the weight `down`."""
    up, down = RNG.normal(size=(4, 2)), RNG.normal(size=(2, 6))
    return AdapterFactors(up=up.astype(np.float32), down=down.astype(np.float32), scaling=0.3)


def test_weights_in_float32_arrive_as_they_are_and_without_a_copy() -> None:
    weights = values()
    packed = pack(weights)
    unpacked = unpack(packed)
    assert unpacked.keys() == weights.keys()
    assert len(unpacked) == len(weights)
    assert all(np.shares_memory(unpacked[name], weights[name]) for name in weights)
    assert packed.nbytes == sum(value.nbytes for value in weights.values())
    assert packed.changed == set(weights)


def test_weights_in_bfloat16_are_rounded_as_torch_rounds_them_and_take_half_the_room() -> None:
    weights = values() | {"odd": np.float32([np.inf, -0.0, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8])}
    packed = pack(weights, rounded=True)
    unpacked = unpack(packed)
    for name, value in weights.items():
        expected = torch.from_numpy(value).bfloat16().float().numpy()
        np.testing.assert_array_equal(unpacked[name].view(np.uint32), expected.view(np.uint32))
    assert 2 * packed.nbytes == pack(weights).nbytes


def test_the_digest_names_everything_that_travels_whatever_its_order() -> None:
    weights, factors = values(), adapter()
    whole = pack(weights)
    backwards = pack(dict(reversed(weights.items())))
    assert digest(whole) == digest(backwards) == digest(whole, threads=2)
    columns = pack(weights | {"table": np.asfortranarray(weights["table"])})
    assert digest(columns) == digest(whole)
    part = WeightTransfer(
        tensors=weights, rows={"table": np.arange(9)}, adapters={"down": factors}, base="b"
    )
    others = [
        replace(part, base="c"),
        replace(part, rows={"table": np.arange(9)[::-1]}),
        replace(part, adapters={"norm": factors}),
        replace(part, adapters={"down": replace(factors, scaling=0.4)}),
        replace(part, tensors=weights | {"norm": weights["norm"] * 2}),
        replace(part, tensors={n.upper(): value for n, value in weights.items()}),
        pack(weights | {"table": weights["table"].reshape(4, 9)}),
        pack(weights, rounded=True),
        whole,
    ]
    assert len({digest(part), *map(digest, others)}) == len(others) + 1
    check_digest(part, digest(part))
    message = f"digest {digest(part)[:8]} arrived where {digest(whole)[:8]} were published"
    with pytest.raises(EngineError, match=message):
        check_digest(part, digest(whole))


def test_adapters_travel_with_the_rows_of_tables_that_differ_from_the_base() -> None:
    base, factors = values(), adapter()
    table, norm = base["table"].copy(), base["norm"] + 1
    table[[2, 5]] += 1
    table[7, 0] = -0.0 if base["table"][7, 0] else 1.0
    whole = pack(base)
    packed = pack_adapters(
        {"table": table, "norm": norm}, {"down": factors}, base=base, digest=digest(whole)
    )
    assert packed.rows["table"].tolist() == [2, 5, 7]
    assert packed.tensors["table"].shape == (3, 4)
    assert packed.changed == {"table", "norm", "down"}
    merged = unpack(packed, whole)
    assert merged.keys() == base.keys()
    np.testing.assert_array_equal(merged["table"], table)
    np.testing.assert_array_equal(merged["norm"], norm)
    np.testing.assert_array_equal(merged["down"], merge(base["down"], factors))
    # Where most rows differ, the table travels as it is.
    most = pack_adapters({"table": table + 1}, {}, base=base, digest=digest(whole))
    assert not most.rows
    np.testing.assert_array_equal(unpack(most, whole)["table"], table + 1)


def test_adapters_without_their_base_are_refused() -> None:
    packed = pack_adapters({}, {"down": adapter()}, base=values(), digest="0badcafe")
    with pytest.raises(BaseMismatchError, match="base 0badcafe arrived without it; publish its"):
        unpack(packed)
