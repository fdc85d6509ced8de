"""Write a synthetic data set as the importers write real ones, with a card of its properties.

`orchard.data.synthetic_world` generates the items and the interactions.

Shapes:  I items   L levels   R rows   K tastes of a user
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int, Int64

from orchard import folders, ragged
from orchard.data.importers.card import CARD, split_facts
from orchard.data.importers.examples import PARTS, SplitExamples, of_log
from orchard.data.importers.log import InteractionLog, ItemTable
from orchard.data.importers.write import write_tables
from orchard.data.synthetic_world import (
    Events,
    SyntheticWorld,
    WorldParams,
    make_world,
    simulate_users,
)
from orchard.evaluation.ranking import Estimate, TargetRanks, metrics

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
    examples = of_log(_log(world, events), split="chronological", max_history=params.max_history)
    card = WorldCard(
        params=params,
        facts=_facts(world, examples),
        yardsticks=_yardsticks(world, events, examples),
    )
    with folders.atomic_dir(out) as partial:
        write_tables(examples, partial)
        (partial / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n")
    return card


def _log(world: SyntheticWorld, events: Events) -> InteractionLog:
    """Return the events, in the order of users and times, as a log."""
    return InteractionLog(
        user=ragged.row_of(events.start),
        item=events.item,
        timestamp=events.timestamp,
        user_id=np.arange(len(events.start) - 1),
        items=ItemTable(
            item_id=np.arange(len(world.code)),
            title=tuple(titles(world.code)),
            sid=tuple(map(tuple, world.code.tolist())),
        ),
    )


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


def _facts(world: SyntheticWorld, examples: SplitExamples) -> dict[str, float]:
    """Compute the statistics of the card from the data that is written."""
    codes, count = np.unique(world.code, axis=0, return_counts=True)
    prefixes = np.unique(codes[:, :-1], axis=0, return_counts=True)[1]
    names = ("num_items", "num_users", "num_events", "sparsity")
    facts = {
        **{name: examples.facts[name] for name in names},
        "num_sids": len(codes),
        "items_sharing_a_sid": int(count[count > 1].sum()),
        "single_child_share": float((prefixes == 1).mean()),
        **split_facts(examples),
    }
    return {name: float(value) for name, value in facts.items()}


def _yardsticks(
    world: SyntheticWorld, events: Events, examples: SplitExamples
) -> dict[str, dict[str, Estimate]]:
    """Evaluate the oracle and two counting baselines on a sample of the test rows."""
    target_event = examples.first + examples.length  # a history ends before its target
    train, test = (target_event[examples.part == PARTS.index(p)] for p in ("train", "test"))
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
