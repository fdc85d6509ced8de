"""Test selection and concatenation by axes against the rows of a small ragged structure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pytest
from jaxtyping import Float32, Int64

from orchard import arrays
from orchard.arrays import Indices, Merge, Starts


@dataclass(frozen=True, kw_only=True)
class Chains:
    """Rows of nodes with parents, words below the nodes, and ends that name nodes."""

    name: Int64[np.ndarray, " B"]
    node_start: Annotated[Int64[np.ndarray, " B+1"], Starts("N")]
    parent: Annotated[Int64[np.ndarray, " N"], Indices("N")]
    word_start: Annotated[Int64[np.ndarray, " N+1"], Starts("W")]
    word: Int64[np.ndarray, " W"]
    end: Annotated[Int64[np.ndarray, " B"], Indices("N")]
    parts: Mapping[str, Float32[np.ndarray, " N"]]
    work: Annotated[int, Merge(sum)]
    label: str = "same"
    value: Float32[np.ndarray, " N"] | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Structure around another one, with an array on its ragged axis."""

    chains: Chains
    reward: Float32[np.ndarray, " N"]


def chains(lengths: Sequence[int], *, first: int = 0, valued: bool = False) -> Chains:
    """Build chains of nodes, node i of a row with i + 1 words."""
    start = np.concatenate([[0], np.cumsum(lengths)])
    inner = np.concatenate([np.arange(length) for length in lengths])
    parent = np.where(inner == 0, -1, np.arange(len(inner)) - 1)
    words = np.concatenate([[0], np.cumsum(inner + 1)])
    return Chains(
        name=np.arange(len(lengths)) + first,
        node_start=start,
        parent=parent,
        word_start=words,
        word=np.arange(words[-1]) + 100 * first,
        end=start[1:] - 1,
        parts={"depth": inner.astype(np.float32)},
        work=len(lengths),
        value=inner.astype(np.float32) if valued else None,
    )


def rows(structure: Chains) -> list[tuple[int, list[int], list[list[int]], int, list[float]]]:
    """List each row with indices counted from its first node."""
    listed = list[tuple[int, list[int], list[list[int]], int, list[float]]]()
    for b, name in enumerate(structure.name.tolist()):
        low, high = structure.node_start[b : b + 2].tolist()
        parent = [p - low if p >= 0 else -1 for p in structure.parent[low:high].tolist()]
        words = [
            structure.word[slice(*structure.word_start[n : n + 2])].tolist()
            for n in range(low, high)
        ]
        depth = structure.parts["depth"][low:high].tolist()
        listed.append((name, parent, words, int(structure.end[b]) - low, depth))
    return listed


@pytest.mark.parametrize("chosen", [[], [1], [2, 0], [1, 1, 0], [0, 1, 2]])
def test_a_selection_has_the_rows_that_it_names(chosen: list[int]) -> None:
    whole = chains([2, 1, 3])
    part = arrays.select(whole, np.array(chosen, np.int64))
    assert rows(part) == [rows(whole)[b] for b in chosen]
    assert part.work == whole.work
    assert len(part.word_start) == len(part.parent) + 1


def test_structures_around_a_ragged_one_follow_its_axes() -> None:
    whole = chains([2, 1, 3])
    outer = Outer(chains=whole, reward=np.arange(6, dtype=np.float32))
    part = arrays.select(outer, np.array([2, 1]))
    assert rows(part.chains) == [rows(whole)[b] for b in (2, 1)]
    assert part.reward.tolist() == [3, 4, 5, 2]


def test_a_concatenation_has_the_rows_of_its_parts() -> None:
    first, second = chains([2, 1]), chains([3], first=7)
    both = arrays.concatenate([first, second])
    assert rows(both) == rows(first) + rows(second)
    assert both.work == 3


def test_an_optional_field_needs_all_parts() -> None:
    with_value, without = chains([2], valued=True), chains([1])
    assert arrays.concatenate([with_value, without]).value is None
    both = arrays.concatenate([with_value, with_value]).value
    assert both is not None
    assert both.tolist() == [0, 1, 0, 1]


def test_rows_of_one_axis_are_taken_without_the_others() -> None:
    taken = arrays.take(chains([2, 1]), np.array([1]), axis="W")
    assert taken.word.tolist() == [1]
    assert taken.parent.tolist() == [-1, 0, -1]


def test_every_array_is_mapped_and_nothing_else() -> None:
    outer = Outer(chains=chains([2]), reward=np.ones(2, np.float32))
    mapped = arrays.map_arrays(outer.chains, lambda value: value)
    assert mapped.label == "same"
    twice = arrays.map_arrays(outer, lambda value: value if isinstance(value, dict) else value * 2)
    assert twice.reward.tolist() == [2, 2]
    assert twice.chains.name.tolist() == [0]
    assert twice.chains.work == 1
