"""A paged key-value cache as an engine: prefixes share full pages and own their last one.

A state is a row of page numbers and a length. To extend it, the pages that the new tokens fall into
are taken fresh, and where its last page is only partly filled, that page is copied first: what
other states have read stays as it is. Pages are given back all at once, by the next `prefill`.

Shapes:  B prompts   F frontier nodes   F1 = F + 1   N tokens of their spans   W pages of a prefix
         S states so far   T tokens of a pass   Q spans of a pass   Q1 = Q + 1   D hidden width
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from orchard.model import child_logprobs
from orchard.trie import ROOT, Trie
from orchard.types import PolicyVersion, Prompts
from orchard.vocabulary import Vocabulary
from rollout.engine import Expansion, check_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
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

    def forward(self, work: Pass) -> Float[Tensor, "T D"]:
        """Last hidden states of the tokens, whose keys and values join the cache."""
        ...

    def copy_pages(self, source: Int64[Tensor, " F"], target: Int64[Tensor, " F"]) -> None:
        """Copy pages; the targets are distinct, and none of them is a source."""
        ...


class CacheFullError(Exception):
    """The states of a batch need more pages than there are."""

    def __init__(self, needed: int, num_pages: int) -> None:
        """`needed` is what was found to be needed so far."""
        super().__init__(f"{needed} pages needed, {num_pages} there")
        self.needed, self.num_pages = needed, num_pages


class PagedEngine:
    """Decodes with a paged model; every state of a batch stays extensible until the next one."""

    def __init__(
        self,
        model: PagedModel,
        trie: Trie,
        vocabulary: Vocabulary,
        version: PolicyVersion,
        head: Float[Tensor, "tokens D"],
    ) -> None:
        """Take over the whole cache of `model`. `head` is its output matrix."""
        self.trie, self.vocabulary, self.version = trie, vocabulary, version
        self._model, self._head = model, head
        self._used = 1
        self._pages = torch.zeros(0, 0, dtype=torch.int32, device=head.device)
        self._length = torch.zeros(0, dtype=torch.long, device=head.device)

    def install(self, version: PolicyVersion, head: Float[Tensor, "tokens D"]) -> None:
        """Answer for another version, whose weights the model has loaded already."""
        self.version, self._head = version, head
        self._pages, self._length = self._pages[:0], self._length[:0]

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> Expansion:
        """Read each prompt once and score the children of the root; older states are forgotten."""
        longest = check_length(prompts, self.trie, self._model.max_length)
        device = self._head.device
        width = -(-(longest + self.trie.depth) // self._model.page_size)
        empty = torch.zeros(len(prompts), width, dtype=torch.int32, device=device)
        self._used, self._pages = 1, empty[:0]
        self._length = torch.zeros(0, dtype=torch.long, device=device)
        token = torch.from_numpy(prompts.token.astype(np.int64)).to(device)
        start = torch.from_numpy(prompts.token_start).to(device)
        nothing = torch.zeros(len(prompts), dtype=torch.long, device=device)
        return self._read(empty, nothing, token, start, torch.full_like(nothing, ROOT))

    @torch.inference_mode()
    def extend(
        self,
        state: Int64[Tensor, " F"],
        token: Int64[Tensor, " N"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
    ) -> Expansion:
        """Append a span to each state and score the children of `node`, the trie node after it."""
        return self._read(self._pages[state], self._length[state], token, start, node)

    def _read(
        self,
        pages: Int32[Tensor, "F W"],
        length: Int64[Tensor, " F"],
        token: Int64[Tensor, " N"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
    ) -> Expansion:
        """Append spans to prefixes, which become states of their own."""
        total = length + start.diff()
        pages = self._own_pages(pages, length, total)
        hidden = self._forward(pages, length, token, start)
        first = len(self._length)
        self._pages = torch.cat([self._pages, pages])
        self._length = torch.cat([self._length, total])
        logprob, children = child_logprobs(hidden, node, self._head, self.trie, self.vocabulary)
        state = torch.arange(first, len(self._length), device=node.device)
        return Expansion(state=state, logprob=logprob, children=children)

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
    ) -> Float[Tensor, "F D"]:
        """The last hidden state of each span, in as many passes as the model's bounds ask for.

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
        token = token[start[source] + place]
        position = length[source] + place
        size = self._model.page_size
        slot = pages[source, position // size].long() * size + position % size
        ends: list[Tensor] = []
        edges = begin.tolist()
        low, first = 0, 0
        while low < len(token):
            last = min(first + self._model.max_spans, len(span))
            high = min(low + self._model.max_tokens, edges[last])
            last = int(np.searchsorted(edges, high))  # spans `first` to `last - 1` take part
            rows = order[first:last]
            bound = begin[first : last + 1].clamp(low, high)
            done = bound[1:] - begin[first:last]
            work = Pass(
                token=token[low:high],
                position=position[low:high],
                slot=slot[low:high],
                start=bound - low,
                length=length[rows] + done,
                pages=pages[rows],
            )
            hidden = self._model.forward(work)
            whole = done == span[rows]
            ends.append(hidden[(bound[1:] - low - 1)[whole]])
            low, first = high, last if edges[last] == high else last - 1
        found = torch.cat(ends)
        return torch.empty_like(found).index_copy_(0, order, found)
