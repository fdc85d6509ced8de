"""Find examples of valid and test that a training example already shows.

Shapes:  R examples   A training examples   B held-out examples   K those found
"""

import numpy as np
from jaxtyping import Bool, Int64

from orchard import ragged
from orchard.data.importers.examples import SplitExamples

_TELLING = 3
"""Number of history items from which an equal history and target are no coincidence."""


def leaks(examples: SplitExamples) -> Int64[np.ndarray, " K"]:
    """Return the examples of valid and test whose target is inside a training history.

    For histories that reach back to the user's first item, the position in the sequence identifies
    an interaction; for the others the time does, if known. An item that a user merely interacted
    with twice is not a leak. An example that is copied into train, with user, history and target,
    is a leak, too (see `copies`).
    """
    train = np.flatnonzero(examples.part == 0)
    held_out = np.flatnonzero(examples.part > 0)
    leaking = [_later(examples, train, held_out)] if examples.timestamp is not None else []
    train, held_out = train[examples.whole[train]], held_out[examples.whole[held_out]]
    of_user, _ = copies(examples)
    return np.unique(np.concatenate([*leaking, of_user, _inside(examples, train, held_out)]))


def copies(
    examples: SplitExamples,
) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K2"]]:
    """Return the held-out examples whose history and target equal those of a training example.

    Returns:
        Those of the same user, of the same time if times are known, and those of other users.
        Without times, a history that may have been cut counts if it has at least `_TELLING` items:
        a user may well meet one item after another twice. Splits that were made here have none of
        the same user: each example is an event of its own, and a log may list equal events.
    """
    content = _content(examples)
    who = np.stack([examples.user_id, content], axis=1)
    if examples.timestamp is not None:
        who = np.concatenate([who, examples.timestamp[:, None]], axis=1)
    is_telling = examples.whole | (examples.length >= _TELLING)
    if examples.timestamp is not None:
        is_telling = np.ones(len(examples), dtype=bool)
    same_user = _in_train(examples, np.unique(who, axis=0, return_inverse=True)[1].reshape(-1))
    same_user &= is_telling & (examples.split == "given")
    any_user = _in_train(examples, content) & (examples.length >= _TELLING)
    return np.flatnonzero(same_user), np.flatnonzero(any_user & ~same_user)


def _in_train(examples: SplitExamples, value: Int64[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
    """Return which held-out examples have a value that a training example has."""
    return (examples.part > 0) & np.isin(value, value[examples.part == 0])


def _content(examples: SplitExamples) -> Int64[np.ndarray, " R"]:
    """Return a number per example that is equal for equal histories and targets, up to 2 ** -64."""
    width = np.uint64(0x9E3779B97F4A7C15)
    item, start = examples.history(np.arange(len(examples)))
    # A polynomial of the items at a fixed odd base, modulo 2 ** 64, after mixing each item.
    from_end = (start[1:] - 1)[ragged.row_of(start)] - np.arange(len(item))
    powers = np.ones(int(from_end.max(initial=0)) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        np.multiply.accumulate(np.full(len(powers) - 1, width), out=powers[1:])
        terms = _mixed(item) * powers[from_end]
        total = np.add.reduceat(terms, start[:-1]) if len(terms) else terms
        mixed = _mixed(total.view(np.int64)) + _mixed(examples.target) * width
        return _mixed((mixed + examples.length.astype(np.uint64)).view(np.int64)).view(np.int64)


def _mixed(value: Int64[np.ndarray, " N"]) -> np.ndarray:
    """Return well-mixed 64-bit numbers, one to one (the finalizer of splitmix64)."""
    mixed = value.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _inside(
    examples: SplitExamples, train: Int64[np.ndarray, " A"], held_out: Int64[np.ndarray, " B"]
) -> Int64[np.ndarray, " K"]:
    """Return the held-out examples whose position the user's longest training history covers."""
    longest, held_out = _last_of_user(examples, train, held_out, examples.length)
    position = examples.length[held_out]
    # The user's sequence begins at `first`, so the item at `position` is the held-out interaction.
    is_longer = examples.length[longest] > position
    longest, held_out, position = longest[is_longer], held_out[is_longer], position[is_longer]
    item_there = examples.sequence[examples.first[longest] + position]
    return held_out[item_there == examples.target[held_out]]


def _later(
    examples: SplitExamples, train: Int64[np.ndarray, " A"], held_out: Int64[np.ndarray, " B"]
) -> Int64[np.ndarray, " K"]:
    """Return the held-out examples that precede a training example whose history has the target."""
    assert examples.timestamp is not None
    last_train, held_out = _last_of_user(examples, train, held_out, examples.timestamp)
    is_later = examples.timestamp[last_train] > examples.timestamp[held_out]
    last_train, held_out = last_train[is_later], held_out[is_later]
    item, start = examples.history(last_train)
    owner = ragged.row_of(start)
    matches = np.bincount(owner, item == examples.target[held_out][owner], minlength=len(held_out))
    return held_out[matches > 0]


def _last_of_user(
    examples: SplitExamples,
    train: Int64[np.ndarray, " A"],
    held_out: Int64[np.ndarray, " B"],
    by: Int64[np.ndarray, " R"],
) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K"]]:
    """Match held-out examples of users in train with the user's training example of largest `by`.

    Returns the training examples and the held-out examples, paired.
    """
    empty = np.zeros(0, dtype=np.int64)
    if len(train) == 0 or len(held_out) == 0:
        return empty, empty
    # training examples by user and, within a user, by `by`; then the last one of each user
    order = train[np.lexsort((by[train], examples.user_id[train]))]
    user = examples.user_id[order]
    last = np.searchsorted(user, examples.user_id[held_out], side="right") - 1
    has_train = (last >= 0) & (user[last.clip(0)] == examples.user_id[held_out])
    return order[last[has_train]], held_out[has_train]
