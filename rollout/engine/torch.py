"""The reference engine: a Hugging Face causal language model and tree attention.

The keys and values of a prompt are computed once, in one row of the cache. Each frontier node
appends its own to the row of its prompt and sees the prompt and its own ancestors only, through an
explicit mask; nothing in the cache is ever reordered.

Shapes:  B prompts (rows of the cache)   P slots of the longest prompt   C slots of the cache
         S new slots of each row   F frontier nodes   F1 = F + 1   N tokens of their spans   D width
         R texts
"""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import ROOT, Trie
from orchard.policy import value_head
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import child_logprobs, head_weight
from orchard.policy.weights import Weights, restore
from orchard.types import PolicyVersion, Prompts
from rollout.candidates import Candidates
from rollout.engine.generate import generate
from rollout.engine.protocol import (
    Completions,
    DecodingBackend,
    GenerationParams,
    NextCodeLogprobs,
    check_prompt_length,
    check_weights,
)

_SLOT_BITS = 32
"""A state is a row and, in its lower bits, the slot of the last token there."""


class TorchEngine:
    """Decodes with a model of this process, on the model's device and in its precision."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: ItemTokenizer, version: PolicyVersion
    ) -> None:
        """Take over `model`, whose weights are those that `version` names."""
        head = head_weight(model)
        self.tokenizer = tokenizer.to(head.device)
        self.version = version
        self._model = model.eval()
        self._cache = DynamicCache()
        self._padding = head.new_zeros(0, 0)
        self._position = self._above = torch.zeros(0, 0, dtype=torch.long, device=head.device)
        # What the value head reads: the last slot of the prompt and all slots after it.
        self._hidden = head.new_zeros(0, 0, head.shape[1])

    @property
    def trie(self) -> Trie:
        """The legal sequences."""
        return self.tokenizer.trie

    def load_weights(self, version: PolicyVersion, weights: Weights) -> None:
        """Answer with these weights from now on; see `InferenceEngine.load_weights`."""
        check_weights(version, weights)
        value_head.adapt_weights(self._model, weights)
        restore(self._model, weights)
        self.version, self._cache = version, DynamicCache()

    def set_catalog(self, catalog: Catalog) -> None:
        """Search these items from now on; see `InferenceEngine.set_catalog`."""
        self.tokenizer = self.tokenizer.with_catalog(catalog).to(self._padding.device)
        self._cache = DynamicCache()

    def run(
        self, find: Callable[[DecodingBackend, Prompts], Candidates], prompts: Prompts
    ) -> Candidates:
        """Search with `find`; see `SearchRunner.run`."""
        return find(self, prompts)

    def generate(
        self, contexts: Sequence[Sequence[int]], key: Int64[np.ndarray, " R"], how: GenerationParams
    ) -> Completions:
        """Continue each context with text; see `Holder.write`."""
        return generate(self._model, contexts, key, how)

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> NextCodeLogprobs:
        """Read each prompt once and score the children of the root."""
        widest = check_prompt_length(prompts, self.trie, self._model.config.max_position_embeddings)
        # Padded on the left, the last token of every prompt is in the same slot.
        short = widest - np.diff(prompts.token_start)
        row, place = ragged.owners(prompts.token_start), ragged.places(prompts.token_start)
        table = np.full((len(prompts), widest), self.tokenizer.pad, dtype=np.int64)
        table[row, place + short[row]] = prompts.token
        token = torch.from_numpy(table).to(self._padding.device)
        slot = torch.arange(widest, device=token.device)
        position = slot - torch.from_numpy(short).to(token.device)[:, None]
        blocked = torch.finfo(self._padding.dtype).min
        self._padding = torch.zeros_like(token, dtype=self._padding.dtype)
        self._padding.masked_fill_(position < 0, blocked)
        mask = self._padding[:, None].masked_fill(slot > slot[:, None], blocked)
        # A padding slot sees itself: over nothing at all, a softmax is undefined.
        mask.diagonal(dim1=1, dim2=2).zero_()
        self._cache = DynamicCache()
        self._position = position.clamp(min=0)
        self._above = torch.full_like(token, widest - 1)
        last = self._forward(token, self._position, mask)[:, -1]
        self._hidden = last[:, None]
        state = (torch.arange(len(prompts), device=token.device) << _SLOT_BITS) + (widest - 1)
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
        place, owner = self._places(row, start)
        at, new = row[owner], int(place.max()) + 1
        tokens = torch.full((num_rows, new), self.tokenizer.pad, device=token.device)
        tokens[at, place] = token
        step = torch.arange(len(token), device=token.device) - start[owner]
        above = torch.full_like(tokens, self._padding.shape[1] - 1)
        above[at, place] = torch.where(step == 0, slot[owner], used + place - 1)
        position = torch.zeros_like(tokens)
        position[at, place] = self._position[row, slot][owner] + 1 + step
        self._above = torch.cat([self._above, above], 1)
        self._position = torch.cat([self._position, position], 1)
        hidden = self._forward(tokens, position, self._tree_mask(new))
        if value_head.value_head_of(self._model) is not None:
            self._hidden = torch.cat([self._hidden, hidden], 1)
        end = place[start[1:] - 1]
        return self._expand((row << _SLOT_BITS) + used + end, hidden[row, end], node)

    def _places(
        self, row: Int64[Tensor, " F"], start: Int64[Tensor, " F1"]
    ) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]:
        """For each token its place among the new ones of its row, and the span that it is of."""
        count = start.diff()
        order = row.argsort(stable=True)
        before = count[order].cumsum(0) - count[order]
        total = torch.zeros(len(self._position), dtype=torch.long, device=row.device)
        total = total.index_add(0, row, count)
        first = torch.empty_like(before)
        first[order] = before - (total.cumsum(0) - total)[row[order]]
        owner = torch.arange(len(row), device=row.device).repeat_interleave(count)
        return first[owner] + torch.arange(len(owner), device=row.device) - start[owner], owner

    def _tree_mask(self, new: int) -> Float[Tensor, "B S C"]:
        """Additive mask of the newest slots: the prompt, their ancestors and themselves."""
        num_rows, slots = self._above.shape
        prompt = self._padding.shape[1]
        mask = self._padding.new_full((num_rows, new, slots), torch.finfo(self._padding.dtype).min)
        mask[:, :, :prompt] = self._padding[:, None]
        at = torch.arange(slots - new, slots, device=mask.device).expand(num_rows, new)
        while bool((at >= prompt).any()):
            mask.scatter_(2, at[:, :, None], 0.0)
            at = self._above.gather(1, at)
        return mask

    def _forward(
        self,
        token: Int64[Tensor, "B S"],
        position: Int64[Tensor, "B S"],
        mask: Float[Tensor, "B S C"],
    ) -> Float[Tensor, "B S D"]:
        """Last hidden states of new slots, whose keys and values join the cache."""
        output = self._model.base_model(
            input_ids=token,
            position_ids=position,
            attention_mask=mask[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        return cast(Tensor, output.last_hidden_state)

    def _expand(
        self,
        state: Int64[Tensor, " F"],
        hidden: Float[Tensor, "F D"],
        node: Int64[Tensor, " F"],
    ) -> NextCodeLogprobs:
        head = head_weight(self._model)
        logprob, children = child_logprobs(hidden, node, head, self.tokenizer)
        return NextCodeLogprobs(
            state=state, logprob=logprob, children=children, value=self._value(state)
        )

    def _value(self, state: Int64[Tensor, " F"]) -> Float32[Tensor, " F"] | None:
        """Value of each state, if the policy has a head for it."""
        head = value_head.value_head_of(self._model)
        if head is None:
            return None
        prompt_end, slots = self._padding.shape[1] - 1, self._hidden.shape[1]
        row, slot = state >> _SLOT_BITS, state & ((1 << _SLOT_BITS) - 1)
        steps = [slot]
        while bool((slot > prompt_end).any()):
            slot = self._above[row, slot]
            steps.append(slot)
        # From the prompt's end down; a path shorter than the longest repeated it at the top.
        table = torch.stack(steps[::-1], 1) - prompt_end
        surplus = (table == 0).sum(1, keepdim=True) - 1
        place = torch.arange(table.shape[1], device=row.device) + surplus
        path = table.gather(1, place.clamp(max=table.shape[1] - 1)) + row[:, None] * slots
        path = path.masked_fill(place >= table.shape[1], -1)
        return head(self._hidden.flatten(0, 1), path)
