"""Keep the keys and values of prompts, so that a history that has grown costs its new items alone.

An entry belongs to one prompt. A later prompt that begins with all of its tokens takes it over, and
replaces it. That is the case where a history grows at its end and the template has nothing after
the items; where the oldest items give way, all tokens have moved, and nothing is reused.

Shapes:  B prompts   C slots   H heads   T tokens of a prompt   D hidden width   E size of a head
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from orchard.policy.model import head_weight
from rollout.engine.contexts import ContextRows, growing_cache, right_aligned


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """Keys and values of the tokens of one prompt, and the hidden state of its last token."""

    layers: tuple[tuple[Float[Tensor, "H T E"], Float[Tensor, "H T E"]], ...]
    hidden: Float[Tensor, " D"]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.hidden.nbytes + sum(k.nbytes + v.nbytes for k, v in self.layers)


class PrefixCache:
    """Keys and values of prompts of one policy, up to a number of bytes; the oldest go first."""

    def __init__(self, limit: int) -> None:
        """Start empty; `limit` is the largest size in bytes."""
        self._limit = limit
        self._entries = OrderedDict[bytes, _Entry]()
        self._lengths = Counter[int]()
        self.num_bytes = 0
        """Size of all entries in bytes."""
        self.hits = 0
        """Prompts that have taken over an entry."""
        self.tokens = 0
        """Tokens of prompts that were not forwarded, because an entry had them."""

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Drop all entries; needed when the weights change."""
        self._entries.clear()
        self._lengths.clear()
        self.num_bytes = 0

    def open(
        self, model: PreTrainedModel, texts: Sequence[bytes]
    ) -> tuple[Float[Tensor, "B D"], ContextRows] | None:
        """Forward the rest of prompts that begin with an entry; None if none of them does.

        Args:
            model: policy.
            texts: tokens of each prompt, as the bytes of int32.

        Returns:
            Hidden states of the last tokens, and the prompts with their keys and values.
        """
        known = [self._longest(text) for text in texts]
        if not any(known):
            return None
        self.hits += sum(bool(text) for text in known)
        self.tokens += sum(len(text) // 4 for text in known)
        entries = [self._take(text) if text else None for text in known]
        rows = _rows_of(entries, known, head_weight(model).device)
        rest = [text[len(begin) :] for text, begin in zip(texts, known, strict=True)]
        hidden = head_weight(model).new_zeros(len(texts), head_weight(model).shape[1])
        for row, entry in enumerate(entries):
            if entry is not None:
                hidden[row] = entry.hidden
        if any(rest):
            forwarded = rows.append(model, *right_aligned(rest, rows.used.device))
            is_new = torch.tensor([bool(text) for text in rest], device=hidden.device)
            hidden = torch.where(is_new[:, None], forwarded, hidden)
        for begin, more in zip(known, rest, strict=True):
            if more and begin in self._entries:
                self._remove(begin)  # what continues it takes its place
        rows.token = list(texts)
        return hidden, rows

    def keep(
        self,
        texts: Sequence[bytes],
        cache: DynamicCache,
        used: Bool[Tensor, "B C"],
        hidden: Float[Tensor, "B D"],
    ) -> None:
        """Keep forwarded prompts.

        Args:
            texts: tokens of each prompt, as the bytes of int32.
            cache: keys and values of all slots.
            used: slots that hold a token of the prompt.
            hidden: hidden states of the last tokens.
        """
        for row, text in enumerate(texts):
            if text in self._entries:
                continue
            slot = used[row].nonzero().squeeze(1)
            layers = tuple(_parts(layer, row, slot) for layer in cache.layers)
            entry = _Entry(layers=layers, hidden=hidden[row].clone())
            if entry.num_bytes > self._limit:
                continue
            self._entries[text] = entry
            self._lengths[len(text)] += 1
            self.num_bytes += entry.num_bytes
            while self.num_bytes > self._limit:
                self._remove(next(iter(self._entries)))

    def _longest(self, text: bytes) -> bytes:
        """Return the longest entry that a prompt begins with, empty if there is none."""
        for length in sorted(self._lengths, reverse=True):
            if length <= len(text) and text[:length] in self._entries:
                return text[:length]
        return b""

    def _take(self, text: bytes) -> _Entry:
        """Return an entry as the one that was used last."""
        self._entries.move_to_end(text)
        return self._entries[text]

    def _remove(self, text: bytes) -> None:
        """Drop one entry."""
        self.num_bytes -= self._entries.pop(text).num_bytes
        self._lengths[len(text)] -= 1
        if not self._lengths[len(text)]:
            del self._lengths[len(text)]


def _parts(layer: object, row: int, slot: Int64[Tensor, " T"]) -> tuple[Tensor, Tensor]:
    """Return copies of the keys and values of one row."""
    assert isinstance(layer, DynamicLayer)  # the layers of a `DynamicCache` without settings
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys[row].index_select(1, slot), layer.values[row].index_select(1, slot)


def _rows_of(
    entries: Sequence[_Entry | None], texts: Sequence[bytes], device: torch.device
) -> ContextRows:
    """Put entries side by side, the last token of each in the last slot."""
    first = next(entry for entry in entries if entry is not None)
    size = [len(text) // 4 for text in texts]
    widest = max(size)
    cache = growing_cache()
    for layer, (key, _) in enumerate(first.layers):
        both = key.new_zeros(2, len(entries), key.shape[0], widest, key.shape[2])
        for row, entry in enumerate(entries):
            if entry is not None:
                both[0, row, :, widest - size[row] :] = entry.layers[layer][0]
                both[1, row, :, widest - size[row] :] = entry.layers[layer][1]
        cache.update(both[0], both[1], layer)
    position = torch.arange(widest, device=device) - (
        widest - torch.tensor(size, device=device)[:, None]
    )
    return ContextRows(
        cache=cache, position=position.clamp(min=0), used=position >= 0, token=list(texts)
    )
