"""Context in prompts: values of each event of a history and of a whole row, as tokens of their own.

A column of context says something about every event of a history, such as whether the item was
viewed or bought, or about the row, such as the country of its user. Each value that the training
rows have is a token, `<behavior_buy>`; every other value, and a missing one, is `<behavior_?>`. The
token of an event follows its item, so that the next item is predicted right after it; tokens of the
row come before the first item. The columns are saved with the policy's tokenizer.

Shapes:  H history items of all rows   R rows   E columns of events   U columns of rows
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int32, Int64
from transformers import AddedToken, PreTrainedTokenizerBase

from orchard import ragged
from orchard.errors import DataError
from orchard.settings.data import GAP

NO_TOKEN, UNKNOWN = -1, 0
"""Numbers for no token at all, and for a value that has no token of its own."""
_DAY = 86_400
_BUCKETS = {
    "minute": 60, "hour": 3600, "day": _DAY, "week": 7 * _DAY, "month": 30 * _DAY,
    "quarter": 91 * _DAY, "year": 365 * _DAY,
}  # fmt: skip
GAPS = (*_BUCKETS, "longer")
"""Values of the column `gap`: shorter than a minute, than an hour, and so on."""
_KEY = "orchard_context"
"""Key of the columns in `init_kwargs` of a tokenizer, which `save_pretrained` saves."""

Value = str | int | float | None
GivenContext = Mapping[str, Sequence[Value] | Value]
"""Context of one history by column: a value for each event, oldest first, or one value."""


@dataclass(frozen=True, kw_only=True)
class ContextColumn:
    """A column of context with the values that have tokens."""

    name: str
    per_event: bool
    """Whether there is a value for every event of a history, otherwise one for the row."""
    values: tuple[str, ...]

    @property
    def tokens(self) -> list[str]:
        """Tokens by the number of the value: that of unknown values first."""
        return [f"<{self.name}_{value}>" for value in ("?", *self.values)]

    @cached_property
    def _number(self) -> dict[str, int]:
        return {value: number for number, value in enumerate(self.values, start=1)}

    def number(self, value: Value) -> int:
        """Return the number of a value; seconds of the column `gap` are put into their bucket."""
        if self.name == GAP and isinstance(value, int | float):
            return int(gap_numbers(np.array([value], np.float64))[0])
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return self._number.get(str(value), UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class Context:
    """Context of the histories of some rows, as numbers of values."""

    event: Int64[np.ndarray, "H E"]
    row: Int64[np.ndarray, "R U"]

    def take(self, start: Int64[np.ndarray, " R1"], rows: Int64[np.ndarray, " B"]) -> "Context":
        """Select rows, whose events are `start[r] : start[r + 1]`."""
        return Context(event=ragged.take(self.event, start, rows)[0], row=self.row[rows])


@dataclass(frozen=True, kw_only=True)
class ContextTokens:
    """Columns of context that a policy reads, and their tokens."""

    columns: tuple[ContextColumn, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    """Token ids of each column, by the number of the value."""

    @property
    def num_event(self) -> int:
        """Number of tokens after each item of a history."""
        return sum(column.per_event for column in self.columns)

    @property
    def num_row(self) -> int:
        """Number of tokens before the first item of a prompt."""
        return len(self.columns) - self.num_event

    def of(
        self, context: Context | None, *, num_items: int, num_rows: int
    ) -> tuple[Int32[np.ndarray, "H E"], Int32[np.ndarray, "R U"]]:
        """Return the tokens after each item, -1 for none, and those of each row.

        Without a context all values are unknown.
        """
        if context is None:
            context = self.unknown(num_items=num_items, num_rows=num_rows)
        return (
            self._of(context.event, per_event=True, num=num_items),
            self._of(context.row, per_event=False, num=num_rows),
        )

    def unknown(self, *, num_items: int, num_rows: int) -> Context:
        """Return a context whose values are all unknown."""
        return Context(
            event=np.full((num_items, self.num_event), UNKNOWN),
            row=np.full((num_rows, self.num_row), UNKNOWN),
        )

    def _of(
        self, number: Int64[np.ndarray, "N K"], *, per_event: bool, num: int
    ) -> Int32[np.ndarray, "N K"]:
        ids = [i for c, i in zip(self.columns, self.ids, strict=True) if c.per_event == per_event]
        token = np.zeros((num, len(ids)), np.int32)
        for index, table in enumerate(ids):
            # The last entry of each table stands for NO_TOKEN.
            token[:, index] = np.array([*table, -1], np.int32)[number[:, index]]
        return token

    def read(self, given: GivenContext | None, length: int) -> Context:
        """Return the context that a request gives for a history of `length` items, as one row.

        Columns that are left out, and values without a token, are unknown.

        Raises:
            DataError: the policy has no such column, a list does not have a value for each item
                of the history, or a list is given for a row or a value for events.
        """
        given = given or {}
        known = [column.name for column in self.columns]
        if unknown := sorted(given.keys() - set(known)):
            raise DataError(
                f"the policy reads no context {unknown[0]!r}; "
                + (f"give some of {', '.join(known)}" if known else "leave it out"),
                code="context.unknown_column",
            )
        context = self.unknown(num_items=length, num_rows=1)
        places = {True: context.event, False: context.row}
        index = {True: 0, False: 0}
        for column in self.columns:
            place = index[column.per_event]
            index[column.per_event] += 1
            if (value := given.get(column.name)) is None:
                continue
            values = None if isinstance(value, str | int | float) else list(value)
            is_list = values is not None
            if is_list != column.per_event or (values is not None and len(values) != length):
                wanted = f"a list of {length} values, one for each item of the history"
                raise DataError(
                    f"context {column.name} is "
                    + (repr(value) if values is None else f"a list of {len(values)}")
                    + f"; it must be {wanted if column.per_event else 'one value'}",
                    code="context.wrong_length",
                )
            if values is None:
                values = [cast(Value, value)]
            places[column.per_event][:, place] = [column.number(each) for each in values]
        return context


def gap_numbers(seconds: Float[np.ndarray, " H"]) -> Int64[np.ndarray, " H"]:
    """Return the number of the bucket of each gap in seconds, UNKNOWN for NaN."""
    bucket = np.searchsorted(list(_BUCKETS.values()), seconds, side="right") + 1
    return np.where(np.isnan(seconds), UNKNOWN, bucket).astype(np.int64)


def add_context(tokenizer: PreTrainedTokenizerBase, columns: Sequence[ContextColumn]) -> int:
    """Add the tokens of columns to a tokenizer and save the columns in it; return how many."""
    if not columns:
        return 0
    vocabulary = tokenizer.get_vocab()
    wanted = [token for column in columns for token in column.tokens]
    missing = [
        AddedToken(token, special=True, normalized=False)
        for token in wanted
        if token not in vocabulary
    ]
    tokenizer.add_tokens(missing, special_tokens=True)
    tokenizer.init_kwargs[_KEY] = [asdict(column) for column in columns]
    return len(missing)


def saved_columns(tokenizer: PreTrainedTokenizerBase) -> tuple[ContextColumn, ...]:
    """Return the columns saved in a tokenizer; none where the policy reads no context."""
    saved = cast("list[dict[str, Any]]", tokenizer.init_kwargs.get(_KEY) or [])
    return tuple(
        ContextColumn(name=each["name"], per_event=each["per_event"], values=tuple(each["values"]))
        for each in saved
    )


def context_tokens(tokenizer: PreTrainedTokenizerBase) -> ContextTokens:
    """Return the columns saved in a tokenizer with their tokens.

    Raises:
        DataError: the tokenizer lacks a token of a column.
    """
    columns, vocabulary = saved_columns(tokenizer), tokenizer.get_vocab()
    missing = [t for column in columns for t in column.tokens if t not in vocabulary]
    if missing:
        raise DataError(
            f"the policy's tokenizer has no token {missing[0]} ({len(missing)} such values of its "
            "context); save or export the policy again",
            code="policy.damaged",
        )
    ids = tuple(tuple(vocabulary[token] for token in column.tokens) for column in columns)
    return ContextTokens(columns=columns, ids=ids)
