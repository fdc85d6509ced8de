"""Measure and plot the quality of semantic IDs.

Shapes:  I items   L levels   P distinct prefixes
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from orchard import arrays
from orchard.semantic_ids.collisions import groups


class LevelQuality(TypedDict):
    """Quality of one level of the codes."""

    codes_used: int
    perplexity: float
    """Exponential of the entropy of code use: the number of equally used codes of that entropy."""
    prefixes: int
    """Number of distinct prefixes that this level continues."""
    children_mean: float
    children_max: int
    single_child_share: float
    """Share of the prefixes with a single continuation, which is forced and free to decode."""


class CodeQuality(TypedDict):
    """Quality of a set of semantic IDs."""

    items: int
    distinct: int
    """Number of distinct semantic IDs."""
    colliding_items: int
    largest_collision: int
    levels: list[LevelQuality]


def measure_codes(codes: Int[np.ndarray, "I L"]) -> CodeQuality:
    """Measure use of codes, branching and collisions; codes are -1 past the end of shorter IDs."""
    levels: list[LevelQuality] = []
    for level in range(codes.shape[1]):
        reaching = codes[codes[:, level] >= 0]
        used, count = np.unique(reaching[:, level], return_counts=True)
        share = count / count.sum()
        # distinct prefixes that include this level; their parents group them by children
        prefixes = _distinct(reaching[:, : level + 1])
        children = np.diff(groups(prefixes[:, :level])[1]) if level else np.array([len(used)])
        levels.append(
            LevelQuality(
                codes_used=len(used),
                perplexity=float(np.exp(-(share * np.log(share)).sum())),
                prefixes=len(children),
                children_mean=float(children.mean()),
                children_max=int(children.max()),
                single_child_share=float((children == 1).mean()),
            )
        )
    group_size = np.diff(groups(codes)[1])
    return CodeQuality(
        items=len(codes),
        distinct=len(group_size),
        colliding_items=int(group_size[group_size > 1].sum()),
        largest_collision=int(group_size.max()),
        levels=levels,
    )


def _distinct(codes: Int[np.ndarray, "I L"]) -> Int[np.ndarray, "P L"]:
    """Return the distinct rows in ascending order."""
    return codes[np.unique(arrays.row_keys(codes), return_index=True)[1]]


def draw(codes: Int[np.ndarray, "I L"], error: Sequence[float], path: Path) -> None:
    """Plot the use of each level's codes, the children of its prefixes, and the residual."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes: Any = figure.subplots(1, 3)
    for level in range(codes.shape[1]):
        reaching = codes[codes[:, level] >= 0]
        count = np.sort(np.bincount(reaching[:, level]))[::-1]
        axes[0].plot(count[count > 0], label=f"level {level + 1}")
        if level:
            prefixes = _distinct(reaching[:, : level + 1])
            children = np.sort(np.diff(groups(prefixes[:, :level])[1]))[::-1]
            axes[1].plot(np.linspace(0, 1, len(children)), children, color=f"C{level}")
    axes[0].set(xlabel="code, by use", ylabel="items", yscale="log", title="Use of codes")
    axes[1].set(xlabel="share of prefixes", ylabel="children", yscale="log", title="Branching")
    axes[2].plot(range(len(error) + 1), [1.0, *error], marker="o", color="C7")
    axes[2].set(xlabel="levels", ylabel="share of variance", ylim=(0, 1.05), title="Residual")
    axes[2].set_xticks(range(len(error) + 1))
    axes[0].legend()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=120)
