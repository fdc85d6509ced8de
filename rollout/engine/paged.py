"""Engine on a paged key-value cache: prefixes share full pages and own their last one.

A state is a row of page numbers and a length. To extend a state, the engine allocates new pages for
the new tokens; a partly filled last page is copied first (copy on write), so that other states stay
unchanged. The next `prefill` frees all pages at once.

For a value head the engine keeps the hidden states on the path of each state, from the end of the
prompt on: they are small compared with the pages, and states with a common prefix share rows.

Shapes:  B prompts   F frontier nodes   F1 = F + 1   N tokens of their spans   W pages of a prefix
         K codes of a path and the end of its prompt   E tokens whose hidden states are kept
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
    """Input of one forward pass: concatenated spans of tokens, each of which extends a prefix."""

    token: Int64[Tensor, " T"]
    position: Int64[Tensor, " T"]
    slot: Int64[Tensor, " T"]
    """Cache slot of the keys and values of each token: page * page size + offset in the page."""
    start: Int64[Tensor, " Q1"]
    """Boundaries: the tokens of span q are `start[q] : start[q + 1]`."""
    length: Int64[Tensor, " Q"]
    """Tokens of each prefix, including the span."""
    pages: Int32[Tensor, "Q W"]
    """Pages of each prefix, padded with page 0."""


@runtime_checkable
class PagedModel(Protocol):
    """Interface of a model with a paged cache. Page 0 is reserved as padding of page rows."""

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        ...

    @property
    def num_pages(self) -> int:
        """Pages of the cache, including page 0."""
        ...

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens in a forward pass."""
        ...

    @property
    def max_spans(self) -> int:
        """Maximum number of spans in a forward pass."""
        ...

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a prefix."""
        ...

    def forward(self, work: ForwardBatch) -> Float[Tensor, "T D"]:
        """Return the last hidden states of the tokens and write their keys and values."""
        ...

    def copy_pages(self, source: Int64[Tensor, " F"], target: Int64[Tensor, " F"]) -> None:
        """Copy pages; the targets are distinct, and none of them is a source."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prefixes:
    """Cached prefixes."""

    pages: Int32[Tensor, "F W"]
    """Pages of each prefix, padded with page 0."""
    length: Int64[Tensor, " F"]
    """Tokens of each prefix."""
    path: Int64[Tensor, "F K"]
    """Rows of the kept hidden states from the end of the prompt down, then -1."""

    def select(self, index: Int64[Tensor, " E"]) -> "_Prefixes":
        """Return the prefixes at `index`."""
        return _Prefixes(pages=self.pages[index], length=self.length[index], path=self.path[index])

    def join(self, other: "_Prefixes") -> "_Prefixes":
        """Append the prefixes of `other`."""
        return _Prefixes(
            pages=torch.cat([self.pages, other.pages]),
            length=torch.cat([self.length, other.length]),
            path=torch.cat([self.path, other.path]),
        )


class CacheFullError(Exception):
    """Error of a batch whose states need more pages than the cache has."""

    def __init__(self, needed: int, num_pages: int) -> None:
        """Store the pages needed up to the failure, a lower bound, and the pages of the cache."""
        super().__init__(f"{needed} pages needed, {num_pages} there")
        self.needed, self.num_pages = needed, num_pages


class PagedBackend:
    """Decoding backend on a paged model; states stay extensible until the next `prefill`."""

    def __init__(
        self,
        model: PagedModel,
        tokenizer: ItemTokenizer,
        version: PolicyVersion,
        head: Float[Tensor, "tokens D"],
        value_head: ValueHead | None = None,
    ) -> None:
        """Take ownership of the whole cache of `model`, whose output matrix is `head`."""
        self.tokenizer, self._model = tokenizer, model
        self.load_weights(version, head, value_head)

    @property
    def trie(self) -> Trie:
        """Trie of the legal code sequences."""
        return self.tokenizer.trie

    def load_weights(
        self,
        version: PolicyVersion,
        head: Float[Tensor, "tokens D"],
        value_head: ValueHead | None = None,
    ) -> None:
        """Set the version and heads of the weights that the model has loaded, and drop states."""
        self.version, self._head, self._value_head = version, head, value_head
        self._reset(self._empty_prefixes(0, 0))

    def _empty_prefixes(self, count: int, width: int) -> _Prefixes:
        """Make `count` empty prefixes of up to `width` pages."""
        device, path_length = self._head.device, self.trie.depth + 1
        return _Prefixes(
            pages=torch.zeros(count, width, dtype=torch.int32, device=device),
            length=torch.zeros(count, dtype=torch.long, device=device),
            path=torch.full((count, path_length), -1, dtype=torch.long, device=device),
        )

    def _reset(self, prefixes: _Prefixes) -> None:
        """Free all pages and drop all states; new states have the page width of `prefixes`."""
        self._used, self._states = 1, prefixes.select(prefixes.length[:0])
        self._hidden = self._head.new_zeros(0, self._head.shape[1])

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> NextCodeLogprobs:
        """Run prefill on the prompts and score the children of the root; older states are lost."""
        longest = check_prompt_length(prompts, self.trie, self._model.max_length)
        device = self._head.device
        width = -(-(longest + self.trie.depth) // self._model.page_size)
        empty = self._empty_prefixes(len(prompts), width)
        self._reset(empty)
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
        kept = start[1:] - 1
        if self._value_head is not None:
            kept = torch.arange(len(token), device=token.device)
        return self._read(self._states.select(state), token, start, node, kept)

    def _read(
        self,
        before: _Prefixes,
        token: Int64[Tensor, " N"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
        kept: Int64[Tensor, " E"],
    ) -> NextCodeLogprobs:
        """Append spans to prefixes and store the results as new states.

        `kept` are the indices of the tokens whose hidden states belong to a path, ascending; they
        include the last token of each span.
        """
        total = before.length + start.diff()
        pages = self._allocate_pages(before.pages, before.length, total)
        hidden = self._forward(pages, before.length, token, start, kept)
        value, path = None, before.path
        if self._value_head is not None:
            span_of = torch.searchsorted(start, kept, right=True) - 1  # of each kept token
            path = self._extend_paths(path, hidden, span_of)
            value = self._value(self._value_head, path)
        end = hidden[torch.searchsorted(kept, start[1:] - 1)]  # of the last token of each span
        logprob, children = child_logprobs(end, node, self._head, self.tokenizer)
        first = len(self._states.length)
        self._states = self._states.join(_Prefixes(pages=pages, length=total, path=path))
        state = torch.arange(first, len(self._states.length), device=node.device)
        return NextCodeLogprobs(state=state, logprob=logprob, children=children, value=value)

    def _extend_paths(
        self,
        path: Int64[Tensor, "F K"],
        hidden: Float[Tensor, "E D"],
        path_of: Int64[Tensor, " E"],
    ) -> Int64[Tensor, "F K"]:
        """Store hidden states and append their rows to the paths `path_of`."""
        new = torch.arange(len(path_of), device=path.device)
        count = torch.bincount(path_of, minlength=len(path))
        # Column of each new row: the length of its path plus its index within the span.
        column = (path >= 0).sum(1)[path_of] + new - (count.cumsum(0) - count)[path_of]
        path = path.clone()
        path[path_of, column] = len(self._hidden) + new
        self._hidden = torch.cat([self._hidden, hidden])
        return path

    def _value(self, head: ValueHead, path: Int64[Tensor, "F K"]) -> Float32[Tensor, " F"]:
        """Return the value of the states at the ends of paths."""
        path = path[:, : int((path >= 0).sum(1).max())]
        # Distinct rows of the paths, and the index of each path entry among them.
        row, row_index = path.unique(return_inverse=True)
        return head(self._hidden[row.clamp(min=0)], row_index.masked_fill(path < 0, -1))

    def _allocate_pages(
        self,
        pages: Int32[Tensor, "F W"],
        length: Int64[Tensor, " F"],
        total: Int64[Tensor, " F"],
    ) -> Int32[Tensor, "F W"]:
        """Allocate pages for the positions `length` to `total - 1`; copy partly filled pages.

        Raises:
            CacheFullError: the cache has too few free pages.
        """
        size = self._model.page_size
        column = length // size  # first column of each row that gets a new page
        count = (total - 1) // size - column + 1  # new pages of each row
        allocated = count.cumsum(0)
        needed = self._used + int(allocated[-1])
        if needed > self._model.num_pages:
            raise CacheFullError(needed, self._model.num_pages)
        row = torch.arange(len(length), device=length.device)
        partial = row[length % size > 0]
        shared = pages[partial, column[partial]].long()
        # Row of each new page, and its offset from the first new column of that row.
        row_of = row.repeat_interleave(count)
        offset = torch.arange(len(row_of), device=row.device) - (allocated - count)[row_of]
        fresh = self._used + torch.arange(len(row_of), device=row.device)
        pages = pages.clone()
        pages[row_of, column[row_of] + offset] = fresh.int()
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
        kept: Int64[Tensor, " E"],
    ) -> Float[Tensor, "E D"]:
        """Return the hidden states of the kept tokens, in as many passes as the limits require.

        Attention kernels require short spans before long ones. The rest of a span that is split
        between two passes attends to its beginning in the cache.
        """
        span = start.diff()  # tokens of each span
        order = span.argsort(stable=True)
        begin = torch.zeros_like(start)  # boundaries of the spans sorted by length
        torch.cumsum(span[order], 0, out=begin[1:])
        owner = torch.arange(len(span), device=span.device).repeat_interleave(span[order])
        offset = torch.arange(len(token), device=span.device) - begin[owner]
        # Span and token index, in the order of the arguments, of each token in sorted order.
        source = order[owner]
        origin = start[source] + offset
        kept_index = torch.full_like(token, -1)  # of each token among the kept ones
        kept_index[kept] = torch.arange(len(kept), device=token.device)
        token, kept_index = token[origin], kept_index[origin]
        position = length[source] + offset
        size = self._model.page_size
        slot = pages[source, position // size].long() * size + position % size
        parts: list[Tensor] = []
        edges = begin.tolist()
        # Each pass computes the tokens `low` to `high - 1`, of the spans `first` to `last - 1`.
        low, first = 0, 0
        while low < len(token):
            last = min(first + self._model.max_spans, len(span))
            high = min(low + self._model.max_tokens, edges[last])
            last = int(np.searchsorted(edges, high))
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
            parts.append(self._model.forward(work)[kept_index[low:high] >= 0])
            low, first = high, last if edges[last] == high else last - 1
        hidden = torch.cat(parts)
        # Back to the order of `kept`.
        return torch.empty_like(hidden).index_copy_(0, kept_index[kept_index >= 0], hidden)
