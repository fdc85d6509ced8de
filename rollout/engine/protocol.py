"""Engine interfaces: forward spans of codes and score the legal next codes.

An engine owns a policy, its key-value cache, and the trie of legal codes, independently of any
search algorithm; the searches of `rollout.search` are independent of the model.

Shapes:  B prompts   F nodes of a frontier   F1 = F + 1   S tokens of their spans   M legal children
         R texts   R1 = R + 1   T tokens of all texts
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import Children, Trie
from orchard.errors import EngineError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.weights import Weights
from orchard.types import PolicyVersion, Prompts
from rollout.candidates import Candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class NextCodeLogprobs:
    """Log-probabilities of the next codes at the nodes of a frontier, and the nodes' states."""

    state: Int64[Tensor, " F"]
    """Opaque handle of each node, valid until the next `prefill`; any state may be extended any
    number of times."""
    logprob: Float32[Tensor, " M"]
    """Log-probability of each legal child, as `orchard.policy.model.child_logprobs` defines it."""
    children: Children
    """Legal children of the frontier's nodes."""
    value: Float32[Tensor, " F"] | None = None
    """Value of each state; None without a value head that the engine can run. The value at the
    root is never trained and has no meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Generated texts, one per context."""

    token: Int32[np.ndarray, " T"]
    """Generated tokens of all texts, including the stop token if one was generated."""
    logprob: Float32[np.ndarray, " T"]
    """Log-probability of each token under the tempered distribution that it was drawn from."""
    start: Int64[np.ndarray, " R1"]
    """Boundaries: the tokens of text r are `start[r] : start[r + 1]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """Parameters of free-text generation, which samples from the whole vocabulary."""

    stop: Sequence[int]
    """Tokens that end a text."""
    limit: int
    """Maximum number of tokens of a text."""
    temperature: float
    """Sampling temperature; 0 is greedy."""


@runtime_checkable
class DecodingBackend(Protocol):
    """A policy that decodes under a trie. All tensors are on the device of `trie`."""

    @property
    def trie(self) -> Trie:
        """Trie of the legal code sequences."""
        ...

    @property
    def tokenizer(self) -> ItemTokenizer:
        """Item tokenizer: the catalog and the tokens of its codes."""
        ...

    @property
    def version(self) -> PolicyVersion:
        """Version of the loaded policy."""
        ...

    def prefill(self, prompts: Prompts) -> NextCodeLogprobs:
        """Run prefill on the prompts and score the children of the root.

        States of earlier calls become invalid.
        """
        ...

    def extend(
        self,
        state: Int64[Tensor, " F"],
        token: Int64[Tensor, " S"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
    ) -> NextCodeLogprobs:
        """Append the span `token[start[f] : start[f + 1]]` (one or more tokens) to each state.

        `node` is the trie node at the end of each span; its children are scored.
        """
        ...


SearchFn = Callable[[DecodingBackend, Prompts], Candidates]
"""Search of codes: from a decoding backend and a batch of prompts to candidates."""


@runtime_checkable
class SearchRunner(Protocol):
    """Interface to run searches in the process of a policy."""

    def run(self, search_fn: SearchFn, prompts: Prompts, /) -> Candidates:
        """Run `search_fn`, a picklable function, for one batch of prompts.

        An item filter is bound to the keyword `allowed` by `functools.partial`, so that the engine
        can split the filter with the batch.

        Raises:
            EngineError: the batch does not fit, or `search_fn` raises it.
        """
        ...


@runtime_checkable
class InferenceEngine(SearchRunner, Protocol):
    """Interface of an inference engine: a policy that runs searches and generates text."""

    @property
    def version(self) -> PolicyVersion:
        """Version of the loaded policy."""
        ...

    def load_weights(self, version: PolicyVersion, weights: Weights) -> None:
        """Load weights of a version; states of earlier searches become invalid.

        The caller has verified the digest of the weights.

        Raises:
            CheckpointError: the weights belong to another model.
        """
        ...

    def set_catalog(self, catalog: Catalog) -> None:
        """Replace the catalog to search; the tokens of its codes stay the same."""
        ...

    def generate(
        self,
        contexts: Sequence[Sequence[int]],
        key: Int64[np.ndarray, " R"],
        params: GenerationParams,
    ) -> Completions:
        """Generate a continuation of each context.

        `key` seeds the draws of each context, which do not depend on the rest of the batch.

        Raises:
            EngineError: a context and its text exceed the policy's positions.
        """
        ...


@runtime_checkable
class LoadsChanges(Protocol):
    """Interface of an engine that can leave parameters as they are when it loads weights."""

    def load_changed_weights(
        self, version: PolicyVersion, weights: Weights, changed: Collection[str]
    ) -> None:
        """Load a version of which only the parameters `changed` differ from what is loaded."""
        ...


def check_prompt_length(prompts: Prompts, trie: Trie, limit: int) -> int:
    """Return the length of the longest prompt; raise EngineError if its codes do not fit."""
    longest = int(np.diff(prompts.token_start).max())
    if longest + trie.depth > limit:
        raise EngineError(
            f"a prompt of {longest} tokens and {trie.depth} codes exceed the policy's {limit} "
            "positions; shorten the history (data.max_history)"
        )
    return longest


def check_context_length(
    contexts: Sequence[Sequence[int]], params: GenerationParams, limit: int
) -> None:
    """Raise EngineError if a text of maximum length does not fit after its context."""
    longest = max(map(len, contexts), default=0)
    if longest + params.limit > limit:
        raise EngineError(
            f"a context of {longest} tokens and a text of up to {params.limit} exceed the policy's "
            f"{limit} positions; lower rollout.think.block_tokens or data.max_history"
        )
