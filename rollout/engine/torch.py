"""Reference engine: a Hugging Face causal language model with tree attention.

The keys and values of a prompt are computed once, in one row of the cache. Each frontier node
appends its keys and values to the row of its prompt. An explicit mask limits its attention to the
prompt and its ancestors; nothing in the cache is ever reordered.

Shapes:  B prompts (rows of the cache)   P slots of the longest prompt   C slots of the cache
         S new slots of each row   F frontier nodes   F1 = F + 1   N tokens of their spans   D width
         R texts
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import ROOT, Trie
from orchard.policy import value_head
from orchard.policy.attention import position_limit
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import child_logprobs, head_weight, hidden_states
from orchard.policy.tree_check import check_trees
from orchard.policy.weights import Weights, restore
from orchard.types import PolicyVersion, Prompts
from rollout.candidates import Candidates
from rollout.engine.contexts import ContextCache
from rollout.engine.generate import generate
from rollout.engine.prefix_cache import PrefixCache
from rollout.engine.protocol import (
    Completions,
    DecodingBackend,
    GenerationParams,
    NextCodeLogprobs,
    check_prompt_length,
)

_SLOT_BITS = 32
"""Number of low bits of a state that hold the slot of its last token; the others hold the row."""


class TorchEngine:
    """Engine on a model in this process, on the model's device and in its precision."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: ItemTokenizer,
        version: PolicyVersion,
        *,
        prefix_bytes: int = 0,
    ) -> None:
        """Take ownership of `model`, which has the weights of `version`.

        Args:
            model: the policy.
            tokenizer: catalog and tokens.
            version: version of the weights.
            prefix_bytes: bytes of keys and values of earlier prompts that are kept for longer ones.

        Raises:
            EngineError: trees do not reproduce the model's own forward pass (`check_trees`).
        """
        check_trees(model)
        head = head_weight(model)
        self.tokenizer = tokenizer.to(head.device)
        self.version = version
        self._model = model.eval()
        self._cache, self._contexts = DynamicCache(), ContextCache()
        self.prefixes = PrefixCache(prefix_bytes) if prefix_bytes else None
        self._in_prompt = torch.zeros(0, 0, dtype=torch.bool, device=head.device)
        self._position = self._above = torch.zeros(0, 0, dtype=torch.long, device=head.device)
        # Hidden states for the value head, from the last slot of the prompt on.
        self._hidden = head.new_zeros(0, 0, head.shape[1])

    @property
    def trie(self) -> Trie:
        """Trie of the legal code sequences."""
        return self.tokenizer.trie

    def load_weights(self, version: PolicyVersion, weights: Weights) -> None:
        """Load the weights of a version; see `InferenceEngine.load_weights`."""
        self.load_changed_weights(version, weights, weights)

    def load_changed_weights(
        self, version: PolicyVersion, weights: Weights, changed: Collection[str]
    ) -> None:
        """Load the parameters `changed`; see `LoadsChanges.load_changed_weights`."""
        value_head.adapt_weights(self._model, weights)
        restore(self._model, weights, changed)
        self.version, self._cache = version, DynamicCache()
        self._contexts.clear()
        if self.prefixes is not None:
            self.prefixes.clear()

    def set_catalog(self, catalog: Catalog) -> None:
        """Replace the catalog to search; see `InferenceEngine.set_catalog`."""
        self.tokenizer = self.tokenizer.with_catalog(catalog).to(self._position.device)
        self._cache = DynamicCache()

    def run(
        self, search_fn: Callable[[DecodingBackend, Prompts], Candidates], prompts: Prompts
    ) -> Candidates:
        """Run a search; see `SearchRunner.run`."""
        return search_fn(self, prompts)

    def generate(
        self,
        contexts: Sequence[Sequence[int]],
        key: Int64[np.ndarray, " R"],
        params: GenerationParams,
    ) -> Completions:
        """Generate a continuation of each context; see `InferenceEngine.generate`."""
        return generate(self._model, contexts, key, params, self._contexts)

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> NextCodeLogprobs:
        """Run prefill on the prompts and score the children of the root.

        Prompts that continue generated texts, as those of codes after a thought do, reuse their
        keys and values; so do prompts that continue earlier ones, where these are kept.
        """
        widest = check_prompt_length(prompts, self.trie, position_limit(self._model.config))
        texts: list[bytes] = []
        if self.prefixes is not None or not self._contexts.is_empty:
            texts = [t.tobytes() for t in np.split(prompts.token, prompts.token_start[1:-1])]
        continued = None
        if not self._contexts.is_empty:
            continued = self._contexts.continued(self._model, texts)
            if continued is None:
                self._contexts.clear()
        if continued is None and self.prefixes is not None:
            continued = self.prefixes.open(self._model, texts)
        if continued is None:
            last = self._prefill(prompts, widest)
        else:
            last, rows = continued
            self._cache, self._in_prompt, self._position = rows.cache, rows.used, rows.position
        if self.prefixes is not None:
            self.prefixes.keep(texts, self._cache, self._in_prompt, last)
        return self._start(last)

    def _prefill(self, prompts: Prompts, widest: int) -> Float[Tensor, "B D"]:
        """Forward whole prompts, of up to `widest` tokens; return their last hidden states."""
        # Left padding puts the last token of every prompt in the same slot.
        num_pad = widest - np.diff(prompts.token_start)
        row, index = ragged.row_of(prompts.token_start), ragged.index_in_row(prompts.token_start)
        table = np.full((len(prompts), widest), self.tokenizer.pad, dtype=np.int64)
        table[row, index + num_pad[row]] = prompts.token
        token = torch.from_numpy(table).to(self._position.device)
        slot = torch.arange(widest, device=token.device)
        # [B, P], negative at padding.
        position = slot - torch.from_numpy(num_pad).to(token.device)[:, None]
        self._in_prompt = position >= 0
        visible = self._in_prompt[:, None] & (slot <= slot[:, None])
        self._cache = DynamicCache()
        self._position = position.clamp(min=0)
        return self._forward(token, self._position, visible)[:, -1]

    def _start(self, last: Float[Tensor, "B D"]) -> NextCodeLogprobs:
        """Score the children of the root from the hidden states of the prompts' last tokens."""
        end = self._position.shape[1] - 1
        self._above = torch.full_like(self._position, end)
        self._hidden = last[:, None]
        state = (torch.arange(len(last), device=last.device) << _SLOT_BITS) + end
        return self._expand(state, last, torch.full_like(state, ROOT))

    @torch.inference_mode()
    def extend(
        self,
        state: Int64[Tensor, " F"],
        token: Int64[Tensor, " N"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
    ) -> NextCodeLogprobs:
        """Append a span to each state and score the children of `node`, the trie node after it."""
        num_rows, used = self._position.shape
        row, slot = state >> _SLOT_BITS, state & ((1 << _SLOT_BITS) - 1)
        # Column among the new slots, span and row of each token.
        column, span = self._columns(row, start)
        token_row, num_new = row[span], int(column.max()) + 1
        tokens = torch.full((num_rows, num_new), self.tokenizer.pad, device=token.device)
        tokens[token_row, column] = token
        step = torch.arange(len(token), device=token.device) - start[span]
        # Slot of the parent token of each new slot; the end of the prompt for unused slots.
        above = torch.full_like(tokens, self._in_prompt.shape[1] - 1)
        above[token_row, column] = torch.where(step == 0, slot[span], used + column - 1)
        position = torch.zeros_like(tokens)
        position[token_row, column] = self._position[row, slot][span] + 1 + step
        self._above = torch.cat([self._above, above], 1)
        self._position = torch.cat([self._position, position], 1)
        hidden = self._forward(tokens, position, self._visible(num_new))
        if value_head.value_head_of(self._model) is not None:
            self._hidden = torch.cat([self._hidden, hidden], 1)
        end = column[start[1:] - 1]  # of the last token of each span
        return self._expand((row << _SLOT_BITS) + used + end, hidden[row, end], node)

    def _columns(
        self, row: Int64[Tensor, " F"], start: Int64[Tensor, " F1"]
    ) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]:
        """Return each token's column among the new slots of its row, and its span."""
        count = start.diff()
        order = row.argsort(stable=True)  # spans by row
        before = count[order].cumsum(0) - count[order]
        total = torch.zeros(len(self._position), dtype=torch.long, device=row.device)
        total = total.index_add(0, row, count)  # new tokens of each row
        first = torch.empty_like(before)  # column of the first token of each span
        first[order] = before - (total.cumsum(0) - total)[row[order]]
        span = torch.arange(len(row), device=row.device).repeat_interleave(count)
        return first[span] + torch.arange(len(span), device=row.device) - start[span], span

    def _visible(self, num_new: int) -> Bool[Tensor, "B S C"]:
        """Return which slots each new slot sees: the prompt, its ancestors and itself.

        Follows `_above` from every new slot up to the prompt, one level per iteration.
        """
        num_rows, num_slots = self._above.shape
        prompt_slots = self._in_prompt.shape[1]
        visible = self._in_prompt.new_zeros(num_rows, num_new, num_slots)
        visible[:, :, :prompt_slots] = self._in_prompt[:, None]
        # [B, S]: the ancestor of each new slot that is unmasked next.
        ancestor = torch.arange(num_slots - num_new, num_slots, device=visible.device)
        ancestor = ancestor.expand(num_rows, num_new)
        while bool((ancestor >= prompt_slots).any()):
            visible.scatter_(2, ancestor[:, :, None], value=True)
            ancestor = self._above.gather(1, ancestor)
        return visible

    def _forward(
        self,
        token: Int64[Tensor, "B S"],
        position: Int64[Tensor, "B S"],
        visible: Bool[Tensor, "B S C"],
    ) -> Float[Tensor, "B S D"]:
        """Return the last hidden states of new slots and append their keys and values."""
        return hidden_states(
            self._model, token, position, visible, cache=self._cache, key_position=self._position
        )

    def _expand(
        self,
        state: Int64[Tensor, " F"],
        hidden: Float[Tensor, "F D"],
        node: Int64[Tensor, " F"],
    ) -> NextCodeLogprobs:
        """Score the children of `node` from the hidden state at the end of each state."""
        head = head_weight(self._model)
        logprob, children = child_logprobs(hidden, node, head, self.tokenizer)
        return NextCodeLogprobs(
            state=state, logprob=logprob, children=children, value=self._value(state)
        )

    def _value(self, state: Int64[Tensor, " F"]) -> Float32[Tensor, " F"] | None:
        """Return the value of each state, or None if the policy has no value head."""
        head = value_head.value_head_of(self._model)
        if head is None:
            return None
        prompt_end, slots = self._in_prompt.shape[1] - 1, self._hidden.shape[1]
        row, slot = state >> _SLOT_BITS, state & ((1 << _SLOT_BITS) - 1)
        steps = [slot]
        while bool((slot > prompt_end).any()):
            slot = self._above[row, slot]
            steps.append(slot)
        # Slots of each path, counted from the prompt's end down. A path shorter than the longest
        # repeats the prompt's end at the front.
        table = torch.stack(steps[::-1], 1) - prompt_end
        surplus = (table == 0).sum(1, keepdim=True) - 1
        # Shift the repeats out, so that each row starts with one prompt end and is padded with -1.
        column = torch.arange(table.shape[1], device=row.device) + surplus
        path = table.gather(1, column.clamp(max=table.shape[1] - 1)) + row[:, None] * slots
        path = path.masked_fill(column >= table.shape[1], -1)
        return head(self._hidden.flatten(0, 1), path)
