"""A paged key-value cache as an engine: prefixes share full pages and own their last one.

A state is a row of page numbers and a length. To extend it, the pages that the new tokens fall into
are taken fresh, and where its last page is only partly filled, that page is copied first: what
other states have read stays as it is. Pages are given back all at once, by the next `prefill`.

For a value head the engine keeps the hidden states that a path leads through, from the end of the
prompt on: few beside the pages, and one row for all states that share it.

Shapes:  B prompts   F frontier nodes   F1 = F + 1   N tokens of their spans   W pages of a prefix
         K codes of a path and the end of its prompt   E tokens whose hidden states are wanted
         T tokens of a pass   Q spans of a pass   Q1 = Q + 1   D hidden width
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from orchard.catalog.trie import ROOT, Trie
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import child_logprobs
from orchard.policy.value_head import ValueHead
from orchard.types import PolicyVersion, Prompts
from rollout.engine.protocol import NextCodeLogprobs, check_prompt_length


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One forward pass: spans of tokens laid end to end, each behind what it continues."""

    token: Int64[Tensor, " T"]
    position: Int64[Tensor, " T"]
    slot: Int64[Tensor, " T"]
    """Where the keys and values of each token go: page * page size + place in the page."""
    start: Int64[Tensor, " Q1"]
    length: Int64[Tensor, " Q"]
    """Tokens of each prefix, the span included."""
    pages: Int32[Tensor, "Q W"]


@runtime_checkable
class PagedModel(Protocol):
    """A model with its cache. Page 0 is nobody's: rows of pages are filled up with it."""

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        ...

    @property
    def num_pages(self) -> int:
        """Pages of the cache, page 0 included."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens that a pass may have."""
        ...

    @property
    def max_spans(self) -> int:
        """Spans that a pass may have."""
        ...

    @property
    def max_length(self) -> int:
        """Longest prefix."""
        ...

    def forward(self, work: ForwardBatch) -> Float[Tensor, "T D"]:
        """Last hidden states of the tokens, whose keys and values join the cache."""
        ...

    def copy_pages(self, source: Int64[Tensor, " F"], target: Int64[Tensor, " F"]) -> None:
        """Copy pages; the targets are distinct, and none of them is a source."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prefixes:
    """What has been read."""

    pages: Int32[Tensor, "F W"]
    length: Int64[Tensor, " F"]
    path: Int64[Tensor, "F K"]
    """Rows of the hidden states from the end of the prompt down, then -1."""

    def select(self, which: Int64[Tensor, " E"]) -> "_Prefixes":
        return _Prefixes(pages=self.pages[which], length=self.length[which], path=self.path[which])

    def join(self, other: "_Prefixes") -> "_Prefixes":
        return _Prefixes(
            pages=torch.cat([self.pages, other.pages]),
            length=torch.cat([self.length, other.length]),
            path=torch.cat([self.path, other.path]),
        )


class CacheFullError(Exception):
    """The states of a batch need more pages than there are."""

    def __init__(self, needed: int, num_pages: int) -> None:
        """`needed` is what was found to be needed so far."""
        super().__init__(f"{needed} pages needed, {num_pages} there")
        self.needed, self.num_pages = needed, num_pages


class PagedBackend:
    """Decodes with a paged model; every state of a batch stays extensible until the next one."""

    def __init__(
        self,
        model: PagedModel,
        tokenizer: ItemTokenizer,
        version: PolicyVersion,
        head: Float[Tensor, "tokens D"],
        value_head: ValueHead | None = None,
    ) -> None:
        """Take over the whole cache of `model`. `head` is its output matrix."""
        self.tokenizer, self._model = tokenizer, model
        self.load_weights(version, head, value_head)

    @property
    def trie(self) -> Trie:
        """The legal sequences."""
        return self.tokenizer.trie

    def load_weights(
        self,
        version: PolicyVersion,
        head: Float[Tensor, "tokens D"],
        value_head: ValueHead | None = None,
    ) -> None:
        """Answer for another version, whose weights the model has loaded already."""
        self.version, self._head, self._value_head = version, head, value_head
        self._forget(self._nothing(0, 0))

    def _nothing(self, count: int, width: int) -> _Prefixes:
        """So many empty prefixes, with room for so many pages."""
        device, most = self._head.device, self.trie.depth + 1
        return _Prefixes(
            pages=torch.zeros(count, width, dtype=torch.int32, device=device),
            length=torch.zeros(count, dtype=torch.long, device=device),
            path=torch.full((count, most), -1, dtype=torch.long, device=device),
        )

    def _forget(self, prefixes: _Prefixes) -> None:
        """Give all pages back; states of the width of these may follow."""
        self._used, self._states = 1, prefixes.select(prefixes.length[:0])
        self._hidden = self._head.new_zeros(0, self._head.shape[1])

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> NextCodeLogprobs:
        """Read each prompt once and score the children of the root; older states are forgotten."""
        longest = check_prompt_length(prompts, self.trie, self._model.max_length)
        device = self._head.device
        width = -(-(longest + self.trie.depth) // self._model.page_size)
        empty = self._nothing(len(prompts), width)
        self._forget(empty)
        token = torch.from_numpy(prompts.token.astype(np.int64)).to(device)
        start = torch.from_numpy(prompts.token_start).to(device)
        node = torch.full_like(empty.length, ROOT)
        return self._read(empty, token, start, node, start[1:] - 1)

    @torch.inference_mode()
    def extend(
        self,
        state: Int64[Tensor, " F"],
        token: Int64[Tensor, " N"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
    ) -> NextCodeLogprobs:
        """Append a span to each state and score the children of `node`, the trie node after it."""
        wanted = start[1:] - 1
        if self._value_head is not None:
            wanted = torch.arange(len(token), device=token.device)
        return self._read(self._states.select(state), token, start, node, wanted)

    def _read(
        self,
        before: _Prefixes,
        token: Int64[Tensor, " N"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
        wanted: Int64[Tensor, " E"],
    ) -> NextCodeLogprobs:
        """Append spans to prefixes, which become states of their own.

        `wanted` are the tokens, in ascending order, whose hidden states are on a path, the last one
        of each span among them.
        """
        total = before.length + start.diff()
        pages = self._own_pages(before.pages, before.length, total)
        hidden = self._forward(pages, before.length, token, start, wanted)
        value, path = None, before.path
        if self._value_head is not None:
            path = self._lengthen(path, hidden, torch.searchsorted(start, wanted, right=True) - 1)
            value = self._value(self._value_head, path)
        end = hidden[torch.searchsorted(wanted, start[1:] - 1)]
        logprob, children = child_logprobs(end, node, self._head, self.tokenizer)
        first = len(self._states.length)
        self._states = self._states.join(_Prefixes(pages=pages, length=total, path=path))
        state = torch.arange(first, len(self._states.length), device=node.device)
        return NextCodeLogprobs(state=state, logprob=logprob, children=children, value=value)

    def _lengthen(
        self,
        path: Int64[Tensor, "F K"],
        hidden: Float[Tensor, "E D"],
        owner: Int64[Tensor, " E"],
    ) -> Int64[Tensor, "F K"]:
        """Keep hidden states, which belong to the paths `owner`, and put them at their ends."""
        new = torch.arange(len(owner), device=path.device)
        count = torch.bincount(owner, minlength=len(path))
        place = (path >= 0).sum(1)[owner] + new - (count.cumsum(0) - count)[owner]
        path = path.clone()
        path[owner, place] = len(self._hidden) + new
        self._hidden = torch.cat([self._hidden, hidden])
        return path

    def _value(self, head: ValueHead, path: Int64[Tensor, "F K"]) -> Float32[Tensor, " F"]:
        """Value of the states at the ends of paths."""
        path = path[:, : int((path >= 0).sum(1).max())]
        row, place = path.unique(return_inverse=True)
        return head(self._hidden[row.clamp(min=0)], place.masked_fill(path < 0, -1))

    def _own_pages(
        self,
        pages: Int32[Tensor, "F W"],
        length: Int64[Tensor, " F"],
        total: Int64[Tensor, " F"],
    ) -> Int32[Tensor, "F W"]:
        """Fresh pages for the places `length` to `total - 1`, partly filled ones copied."""
        size = self._model.page_size
        column = length // size
        count = (total - 1) // size - column + 1
        taken = count.cumsum(0)
        needed = self._used + int(taken[-1])
        if needed > self._model.num_pages:
            raise CacheFullError(needed, self._model.num_pages)
        row = torch.arange(len(length), device=length.device)
        partial = row[length % size > 0]
        shared = pages[partial, column[partial]].long()
        owner = row.repeat_interleave(count)
        place = torch.arange(len(owner), device=row.device) - (taken - count)[owner]
        fresh = self._used + torch.arange(len(owner), device=row.device)
        pages = pages.clone()
        pages[owner, column[owner] + place] = fresh.int()
        self._used = needed
        if len(partial):
            self._model.copy_pages(shared, pages[partial, column[partial]].long())
        return pages

    def _forward(
        self,
        pages: Int32[Tensor, "F W"],
        length: Int64[Tensor, " F"],
        token: Int64[Tensor, " N"],
        start: Int64[Tensor, " F1"],
        wanted: Int64[Tensor, " E"],
    ) -> Float[Tensor, "E D"]:
        """Hidden states of the wanted tokens, in as many passes as the model's bounds ask for.

        Attention kernels want short spans before long ones. A span cut between two passes finds its
        beginning in the cache.
        """
        span = start.diff()
        order = span.argsort(stable=True)
        begin = torch.zeros_like(start)
        torch.cumsum(span[order], 0, out=begin[1:])
        owner = torch.arange(len(span), device=span.device).repeat_interleave(span[order])
        place = torch.arange(len(token), device=span.device) - begin[owner]
        source = order[owner]
        origin = start[source] + place
        number = torch.full_like(token, -1)  # of each token among the wanted ones
        number[wanted] = torch.arange(len(wanted), device=token.device)
        token, number = token[origin], number[origin]
        position = length[source] + place
        size = self._model.page_size
        slot = pages[source, position // size].long() * size + position % size
        found: list[Tensor] = []
        edges = begin.tolist()
        low, first = 0, 0
        while low < len(token):
            last = min(first + self._model.max_spans, len(span))
            high = min(low + self._model.max_tokens, edges[last])
            last = int(np.searchsorted(edges, high))  # spans `first` to `last - 1` take part
            rows = order[first:last]
            bound = begin[first : last + 1].clamp(low, high)
            work = ForwardBatch(
                token=token[low:high],
                position=position[low:high],
                slot=slot[low:high],
                start=bound - low,
                length=length[rows] + bound[1:] - begin[first:last],
                pages=pages[rows],
            )
            found.append(self._model.forward(work)[number[low:high] >= 0])
            low, first = high, last if edges[last] == high else last - 1
        hidden = torch.cat(found)
        return torch.empty_like(hidden).index_copy_(0, number[number >= 0], hidden)
