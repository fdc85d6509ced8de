"""Forward contexts that continue earlier ones, and compute the keys and values of each token once.

A thought is several texts: each continues the context and the text before it, and the codes of an
item continue the last. `ContextCache` keeps the keys and values of the newest contexts. It forwards
the rest of contexts that continue them, and of other contexts every distinct one once.

Texts of different lengths leave unused slots between their tokens. A mask hides these, and
positions count tokens, not slots.

Shapes:  R contexts   C slots of the cache   S new slots   D hidden width
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from orchard.policy.model import head_weight, hidden_states

_ROOM = 64
"""Number of slots by which a layer's buffer grows at least."""


class _GrowingLayer(DynamicLayer):
    """Layer of a cache that appends in place, where its superclass copies all earlier slots."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all of them."""
        used, added = self.get_seq_length(), key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if used == 0 or used + added > self._room.shape[3]:
            shape = (2, *key_states.shape[:2], used + max(added, used, _ROOM), key_states.shape[3])
            room = key_states.new_empty(shape)
            if used:
                room[:, :, :, :used] = self._room[:, :, :, :used]
            self._room = room
        self._room[0, :, :, used : used + added] = key_states
        self._room[1, :, :, used : used + added] = value_states
        self.keys, self.values = self._room[:, :, :, : used + added]
        return self.keys, self.values

    def rows(self, row: Int64[Tensor, " R"]) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values of rows."""
        both = self._room[:, :, :, : self.get_seq_length()].index_select(1, row)
        return both[0], both[1]


def growing_cache() -> DynamicCache:
    """Return an empty cache whose layers append in place."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = _GrowingLayer
    return cache


@dataclass(slots=True, kw_only=True)
class ContextRows:
    """Contexts with their keys and values, to which tokens are appended."""

    cache: DynamicCache
    position: Int64[Tensor, "R C"]
    """Position of the token of each slot in its context."""
    used: Bool[Tensor, "R C"]
    """Mask of the slots that hold a token of the context."""
    token: list[bytes]
    """Tokens of each context whose keys and values the cache holds, as the bytes of int32."""

    def append(
        self,
        model: PreTrainedModel,
        token: Int64[Tensor, "R S"],
        used: Bool[Tensor, "R S"],
    ) -> Float[Tensor, "R D"]:
        """Forward new slots, all of whose used ones are last; return the last hidden states."""
        num_new = token.shape[1]
        before = self.used.sum(1, keepdim=True)
        position = (before + used.cumsum(1) - 1).clamp(min=0)
        self.position = torch.cat([self.position, position], 1)
        self.used = torch.cat([self.used, used], 1)
        slot = torch.arange(self.used.shape[1], device=token.device)
        visible = self.used[:, None] & (slot <= slot[-num_new:, None])
        hidden = hidden_states(
            model, token, position, visible, cache=self.cache, key_position=self.position
        )
        return hidden[:, -1]

    def select(self, row: Int64[Tensor, " R"]) -> "ContextRows":
        """Return copies of rows."""
        cache = growing_cache()
        for index, layer in enumerate(self.cache.layers):
            assert isinstance(layer, _GrowingLayer)
            cache.update(*layer.rows(row), index)
        return ContextRows(
            cache=cache,
            position=self.position[row],
            used=self.used[row],
            token=[self.token[index] for index in row.tolist()],
        )


class ContextCache:
    """Keys and values of the newest contexts of a model in this process."""

    def __init__(self) -> None:
        """Hold no contexts."""
        self._rows: ContextRows | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no contexts are held, so that nothing can continue them."""
        return self._rows is None

    def clear(self) -> None:
        """Drop all contexts; needed when the weights change."""
        self._rows = None

    def keep(self, rows: ContextRows) -> None:
        """Hold `rows` instead of earlier contexts."""
        self._rows = rows

    def open(
        self, model: PreTrainedModel, contexts: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "R D"], ContextRows]:
        """Forward contexts, none of them empty; return the hidden states of their last tokens.

        Where all of them continue kept contexts, only the rest of each is forwarded.
        """
        token = [np.asarray(context, np.int32).tobytes() for context in contexts]
        device = head_weight(model).device
        if (continued := self.continued(model, token)) is not None:
            return continued
        distinct = list(dict.fromkeys(token))
        row_of = {text: row for row, text in enumerate(distinct)}
        empty = torch.zeros(len(distinct), 0, dtype=torch.long, device=device)
        rows = ContextRows(cache=growing_cache(), position=empty, used=empty.bool(), token=distinct)
        hidden = rows.append(model, *right_aligned(distinct, device))
        row = torch.tensor([row_of[text] for text in token], device=device)
        return hidden[row], rows.select(row)

    def continued(
        self, model: PreTrainedModel, token: Sequence[bytes]
    ) -> tuple[Float[Tensor, "R D"], ContextRows] | None:
        """Forward the rest of contexts that continue kept ones; None if one of them does not."""
        source = _match(self._rows.token, token) if self._rows is not None else None
        if self._rows is None or source is None:
            return None
        rows = self._rows.select(torch.tensor(source, device=self._rows.used.device))
        rest = [text[len(known) :] for text, known in zip(token, rows.token, strict=True)]
        hidden = rows.append(model, *right_aligned(rest, rows.used.device))
        rows.token = list(token)
        return hidden, rows


def _match(known: Sequence[bytes], token: Sequence[bytes]) -> list[int] | None:
    """Return for each context the longest known one that it continues; None if one has none."""
    row_of = {text: row for row, text in enumerate(known)}
    lengths = sorted({len(text) for text in known}, reverse=True)
    source: list[int] = []
    for text in token:
        found = (row_of.get(text[:length]) for length in lengths if length < len(text))
        row = next((row for row in found if row is not None), None)
        if row is None:
            return None
        source.append(row)
    return source


def right_aligned(
    texts: Sequence[bytes], device: torch.device
) -> tuple[Int64[Tensor, "R S"], Bool[Tensor, "R S"]]:
    """Return the tokens of texts, whose last tokens share a column, and the mask of used slots."""
    rows = [np.frombuffer(text, np.int32) for text in texts]
    widest = max(map(len, rows))
    table, used = np.zeros((len(rows), widest), np.int64), np.zeros((len(rows), widest), bool)
    for row, token in enumerate(rows):
        table[row, widest - len(token) :], used[row, widest - len(token) :] = token, True
    return torch.from_numpy(table).to(device), torch.from_numpy(used).to(device)
