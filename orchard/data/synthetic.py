"""Write a synthetic data set in the Parquet schema of real ones, with a card of its properties.

`orchard.data.synthetic_world` generates the items and the interactions.

Shapes:  I items   L levels   E events   R rows   H history items   K tastes of a user
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float64, Int, Int64

from orchard import folders, ragged
from orchard.data.synthetic_world import (
    Events,
    SyntheticWorld,
    WorldParams,
    make_world,
    simulate_users,
)
from orchard.evaluation.ranking import Estimate, TargetRanks, metrics

CARD = "card.json"
SPLITS = (("train", 0.0, 0.8), ("valid", 0.8, 0.9), ("test", 0.9, 1.0))
"""Start and end of each split, as shares of all rows in time order."""

_YARDSTICK_ROWS = 4000
"""Number of test rows on which the baselines are evaluated."""
_SMOOTHING = 5.0
"""Weight of popularity relative to the counts of pairs."""
_SHOWN = ("ndcg@10/sid", "ndcg@10/item", "hr@10/sid", "hr@10/item")

_WORDS = tuple(
    words.split()
    for words in (
        """Lamp Kettle Tent Backpack Drill Guitar Camera Chair Blanket Notebook Bicycle Teapot
        Mirror Clock Speaker Basket Knife Bottle Keyboard Helmet Rug Candle Puzzle Telescope""",
        """Brass Oak Linen Ceramic Steel Bamboo Leather Glass Wool Copper Walnut Cotton Marble
        Felt Titanium Cork Granite Canvas Silk Birch Enamel Rattan Carbon Slate""",
        """Folding Compact Classic Travel Silent Garden Winter Studio Rustic Slim Nordic Vintage
        Mini Heavy-Duty Portable Coastal Modular Everyday Royal Outdoor Pocket Urban Alpine Soft""",
    )
)
"""Title words of the codes of each level: objects, materials, kinds. Further codes and levels get
generated names."""


@dataclass(frozen=True, kw_only=True)
class WorldCard:
    """Card of a synthetic data set: parameters, statistics and baseline scores."""

    params: WorldParams
    facts: Mapping[str, float]
    """Counts, shares and lengths."""
    yardsticks: Mapping[str, Mapping[str, Estimate]]
    """Test metrics of reference scorers, by name and metric: `oracle` knows the world and each
    user's current tastes, which no model can; `transitions` counts pairs of last item and target in
    train, smoothed by popularity; `popularity` counts targets in train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Examples in time order, as references to events."""

    user: Int64[np.ndarray, " R"]
    event: Int64[np.ndarray, " R"]
    """Event of the target."""
    length: Int64[np.ndarray, " R"]
    """Number of history items, which are the events directly before the target."""

    def cut(self, low: float, high: float) -> "_Rows":
        """Return the rows between two shares of all rows."""
        part = slice(int(low * len(self.event)), int(high * len(self.event)))
        return _Rows(user=self.user[part], event=self.event[part], length=self.length[part])


def write_world(out: Path, params: WorldParams, *, overwrite: bool = False) -> WorldCard:
    """Write items, train, valid and test rows and the card to `out`, atomically.

    The rows of all users are sorted by time and split 80/10/10, so a user may occur in all splits.
    Equal parameters give equal data.

    Raises:
        DataError: `out` is not empty, and not a synthetic data set that may be overwritten.
    """
    folders.check_output_dir(out, mark=CARD, kind="synthetic world", overwrite=overwrite)
    world_rng, user_rng = np.random.default_rng(params.seed).spawn(2)
    world = make_world(params, world_rng)
    events = simulate_users(world, user_rng)
    rows = _rows(events, params.max_history)
    card = WorldCard(
        params=params,
        facts=_facts(world, events, rows),
        yardsticks=_yardsticks(world, events, rows),
    )
    with folders.atomic_dir(out) as partial:
        _write(_item_columns(world), partial / "items.parquet")
        for name, low, high in SPLITS:
            _write(_row_columns(events, rows.cut(low, high)), partial / f"{name}.parquet")
        (partial / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n")
    return card


def _rows(events: Events, max_history: int) -> _Rows:
    """Return a row for every event except each user's first, in time order."""
    position_in_history = ragged.index_in_row(events.start)
    event = np.flatnonzero(position_in_history > 0)
    user = ragged.row_of(events.start)[event]
    order = np.lexsort((user, events.timestamp[event]))
    event = event[order]
    return _Rows(
        user=user[order], event=event, length=np.minimum(position_in_history[event], max_history)
    )


def _write(columns: Mapping[str, Any], path: Path) -> None:
    pq.write_table(pa.table(dict(columns)), path, compression="zstd")


def _row_columns(events: Events, rows: _Rows) -> dict[str, Any]:
    history = events.item[ragged.ranges(rows.event - rows.length, rows.length)].astype(np.int32)
    offsets = ragged.starts(rows.length).astype(np.int32)
    return {
        "user_id": rows.user.astype(np.int32),
        "history": pa.ListArray.from_arrays(offsets, history),
        "target": events.item[rows.event].astype(np.int32),
        "timestamp": events.timestamp[rows.event],
    }


def _item_columns(world: SyntheticWorld) -> dict[str, Any]:
    text = [
        "".join(f"<{chr(97 + level)}_{code}>" for level, code in enumerate(codes))
        for codes in world.code.tolist()
    ]
    return {
        "item_id": np.arange(len(world.code), dtype=np.int32),
        "title": titles(world.code),
        "sid": pa.array(world.code.tolist(), pa.list_(pa.int16())),
        "sid_text": text,
    }


def titles(code: Int[np.ndarray, "I L"]) -> list[str]:
    """Return titles of one word per code, deepest level first; equal titles are numbered."""
    seen: dict[str, int] = {}
    result: list[str] = []
    for codes in code.tolist():
        title = " ".join(_word(level, c) for level, c in reversed(list(enumerate(codes))))
        seen[title] = seen.get(title, 0) + 1
        result.append(title if seen[title] == 1 else f"{title} No. {seen[title]}")
    return result


def _word(level: int, code: int) -> str:
    """Return the title word of a code: a listed word, or a generated name."""
    dictionary = _WORDS[level] if level < len(_WORDS) else []
    if code < len(dictionary):
        return dictionary[code]
    # Spell a number that depends on level and code in syllables. Two syllables give 70 * 70 names;
    # a step coprime to that number makes the names of neighboring codes differ.
    quotient, number = divmod(5 * (code - len(dictionary)) + level % 5, 70 * 70)
    number, name = (1931 * number) % (70 * 70) + 70 * 70 * quotient, ""
    while number or len(name) < 4:
        number, syllable = divmod(number, 70)
        name += "bdfgklmnprstvz"[syllable // 5] + "aeiou"[syllable % 5]
    return name.capitalize()


def _facts(world: SyntheticWorld, events: Events, rows: _Rows) -> dict[str, float]:
    """Compute the statistics of the card from the data that is written."""
    target = {name: events.item[rows.cut(low, high).event] for name, low, high in SPLITS}
    codes, count = np.unique(world.code, axis=0, return_counts=True)
    prefixes = np.unique(codes[:, :-1], axis=0, return_counts=True)[1]
    seen = np.unique(events.item + len(world.code) * ragged.row_of(events.start))
    facts = {
        "num_items": len(world.code),
        "num_sids": len(codes),
        "items_sharing_a_sid": int(count[count > 1].sum()),
        "single_child_share": float((prefixes == 1).mean()),
        "num_users": len(events.start) - 1,
        "num_events": len(events.item),
        **{f"{name}_rows": len(items) for name, items in target.items()},
        "sparsity": 1 - len(seen) / len(world.code) / (len(events.start) - 1),
        "history_mean": float(rows.length.mean()),
        "history_median": float(np.median(rows.length)),
        "history_max": int(rows.length.max()),
        "test_targets_in_history": float(_repeated(events, rows.cut(*SPLITS[-1][1:])).mean()),
        "test_targets_seen_in_train": float(np.isin(target["test"], target["train"]).mean()),
    }
    return {name: float(value) for name, value in facts.items()}


def _repeated(events: Events, rows: _Rows) -> Bool[np.ndarray, " R"]:
    """Return whether each row's history contains its target."""
    owner = ragged.row_of(ragged.starts(rows.length))
    history = events.item[ragged.ranges(rows.event - rows.length, rows.length)]
    same = history == events.item[rows.event][owner]
    return np.bincount(owner, same, minlength=len(rows.event)) > 0


def _yardsticks(
    world: SyntheticWorld, events: Events, rows: _Rows
) -> dict[str, dict[str, Estimate]]:
    """Evaluate the oracle and two counting baselines on a sample of the test rows."""
    (_, *train_part), _, (_, *test_part) = SPLITS
    train, test = rows.cut(*train_part).event, rows.cut(*test_part).event
    test = test[np.unique(np.linspace(0, len(test) - 1, _YARDSTICK_ROWS).astype(np.int64))]
    # [2, train rows] last history item and target of each row, sorted by the former
    item_pairs = np.stack([events.item[train - 1], events.item[train]])
    item_pairs = item_pairs[:, np.argsort(item_pairs[0], kind="stable")]
    popularity = np.bincount(item_pairs[1], minlength=len(world.code)) / len(train)
    first = np.searchsorted(item_pairs[0], np.arange(len(world.code) + 1))  # first pair of an item

    def transitions(event: Int64[np.ndarray, " R"]) -> Float64[np.ndarray, "R I"]:
        last = events.item[event - 1]
        count = np.diff(first)[last]
        score = np.tile(_SMOOTHING * popularity, (len(event), 1))
        pair_index = ragged.ranges(first[last], count)
        np.add.at(score, (np.repeat(np.arange(len(event)), count), item_pairs[1, pair_index]), 1.0)
        return score

    scores: dict[str, Callable[[Int64[np.ndarray, " R"]], Float64[np.ndarray, "R I"]]] = {
        "oracle": lambda event: likelihood(world, events.item[event - 1], events.interest[event]),
        "transitions": transitions,
        "popularity": lambda event: np.tile(popularity, (len(event), 1)),
    }
    return {
        name: _measured(world, events.item[test], test, score) for name, score in scores.items()
    }


def _measured(
    world: SyntheticWorld,
    target: Int64[np.ndarray, " R"],
    event: Int64[np.ndarray, " R"],
    score: Callable[[Int64[np.ndarray, " R"]], Float64[np.ndarray, "R I"]],
) -> dict[str, Estimate]:
    """Compute metrics of ranking items by score, and semantic IDs by their items' total score."""
    leaf, order = world.node(world.code.shape[1]), world.order
    first = np.searchsorted(leaf[order], np.arange(leaf.max() + 1))
    chunk = max(1, (1 << 22) // len(leaf))  # rows per pass: 32 MiB of scores
    sid, item = np.zeros((2, len(event)), dtype=np.int64)
    for low in range(0, len(event), chunk):
        chunk_rows = slice(low, low + chunk)
        table = score(event[chunk_rows])
        item[chunk_rows] = _place(table, target[chunk_rows])
        sid[chunk_rows] = _place(
            np.add.reduceat(table[:, order], first, axis=1), leaf[target[chunk_rows]]
        )
    estimates = metrics(TargetRanks(sid=sid, item=item), width=len(leaf))
    return {name: estimates[name] for name in _SHOWN}


def _place(
    score: Float64[np.ndarray, "R I"], target: Int64[np.ndarray, " R"]
) -> Int64[np.ndarray, " R"]:
    """Return the rank of each target by descending score; ties go to the lower column."""
    target_score = score[np.arange(len(score)), target][:, None]
    is_earlier = np.arange(score.shape[1]) < target[:, None]
    return ((score > target_score) | ((score == target_score) & is_earlier)).sum(axis=1)


def likelihood(
    world: SyntheticWorld, last: Int[np.ndarray, " R"], taste: Int[np.ndarray, "R K"]
) -> Float64[np.ndarray, "R I"]:
    """Return the true probability of every item to come next, given each user's tastes."""
    params = world.params
    share_per_taste = (1 - params.transition_share - params.noise_share) / taste.shape[1]
    chance = np.tile(params.noise_share * world.popularity, (len(last), 1))
    successor_index = (np.arange(len(last))[:, None], world.next_items[last])
    np.add.at(chance, successor_index, params.transition_share * world.next_item_probs)
    for node_of_item, nodes, share in (
        (world.interest, taste, params.focus),
        (world.category, world.category_of_interest[taste], 1 - params.focus),
    ):
        within = world.popularity / np.bincount(node_of_item, world.popularity)[node_of_item]
        for node in nodes.T:
            chance += np.where(node_of_item == node[:, None], share_per_taste * share * within, 0.0)
    return chance
