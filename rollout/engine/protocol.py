"""What a search asks of a model: forward spans of codes, and score what may follow.

An engine owns a policy, its keys and values, and the trie that says which codes are legal. It knows
nothing of beams or draws; `rollout.search` knows nothing of models.

Shapes:  B prompts   F nodes of a frontier   F1 = F + 1   S tokens of their spans   M legal children
         R texts   R1 = R + 1   T tokens of all texts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import Children, Trie
from orchard.errors import EngineError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.weights import Weights, digest
from orchard.types import PolicyVersion, Prompts
from rollout.candidates import Candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class NextCodeLogprobs:
    """The policy at the nodes of a frontier, and what the engine needs to go on from them."""

    state: Int64[Tensor, " F"]
    """Opaque handles, valid until the next `prefill`; any state may be extended any number of
    times."""
    logprob: Float32[Tensor, " M"]
    """Log-probability of each legal child, as `orchard.policy.model.child_logprobs` defines it."""
    children: Children
    value: Float32[Tensor, " F"] | None = None
    """Value of the frontier's states, where the policy has a value head that the engine runs; at
    the root, which no training reaches, it means nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """What was written behind each of several contexts."""

    token: Int32[np.ndarray, " T"]
    """Ends with a stop token where one was written."""
    logprob: Float32[np.ndarray, " T"]
    """Under the distribution, at its temperature, that each token was drawn from."""
    start: Int64[np.ndarray, " R1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """How to write: by drawing from the whole vocabulary, or greedily at temperature 0."""

    stop: Sequence[int]
    """Tokens that end a text."""
    limit: int
    """Most tokens of a text."""
    temperature: float


@runtime_checkable
class DecodingBackend(Protocol):
    """A policy ready to decode. All tensors are on the device of `trie`."""

    @property
    def trie(self) -> Trie:
        """The legal sequences."""
        ...

    @property
    def tokenizer(self) -> ItemTokenizer:
        """The catalog and the tokens of its codes."""
        ...

    @property
    def version(self) -> PolicyVersion:
        """The policy that answers now."""
        ...

    def prefill(self, prompts: Prompts) -> NextCodeLogprobs:
        """Read each prompt once and score the children of the root; older states become invalid."""
        ...

    def extend(
        self,
        state: Int64[Tensor, " F"],
        token: Int64[Tensor, " S"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
    ) -> NextCodeLogprobs:
        """Append the span `token[start[f] : start[f + 1]]` (one token or more) to each state.

        `node` is the trie node after the span, whose children are scored.
        """
        ...


@runtime_checkable
class SearchRunner(Protocol):
    """Lets searches run where a policy is."""

    def run(
        self, find: Callable[[DecodingBackend, Prompts], Candidates], prompts: Prompts
    ) -> Candidates:
        """Search with `find`, a function that can be pickled, for one batch of prompts.

        What the prompts may find is bound to it by the keyword `allowed` (`functools.partial`), so
        that it can be cut where the batch is.

        Raises:
            EngineError: the batch does not fit, or as `find` raises it.
        """
        ...


@runtime_checkable
class InferenceEngine(SearchRunner, Protocol):
    """Holds a policy, and lets searches run where the policy is."""

    @property
    def version(self) -> PolicyVersion:
        """The policy that answers now."""
        ...

    def load_weights(self, version: PolicyVersion, weights: Weights) -> None:
        """Answer with these weights from now on; states of earlier searches become invalid.

        Raises:
            EngineError: the weights are not those that the version names.
            CheckpointError: they belong to another model.
        """
        ...

    def set_catalog(self, catalog: Catalog) -> None:
        """Search these items from now on, with the same tokens for their codes."""
        ...

    def generate(
        self, contexts: Sequence[Sequence[int]], key: Int64[np.ndarray, " R"], how: GenerationParams
    ) -> Completions:
        """Continue each context; what is drawn depends on its key and not on its neighbours.

        Raises:
            EngineError: a context and its text exceed the policy's positions.
        """
        ...


def check_weights(version: PolicyVersion, weights: Weights) -> None:
    """Raise EngineError unless the weights are those that the version names."""
    if (found := digest(weights)) != version.digest:
        raise EngineError(
            f"weights with digest {found[:8]} arrived as policy {version}; publish them again"
        )


def check_prompt_length(prompts: Prompts, trie: Trie, limit: int) -> int:
    """Tokens of the longest prompt; raises EngineError where its codes would not fit behind it."""
    longest = int(np.diff(prompts.token_start).max())
    if longest + trie.depth > limit:
        raise EngineError(
            f"a prompt of {longest} tokens and {trie.depth} codes exceed the policy's {limit} "
            "positions; shorten the history (data.max_history)"
        )
    return longest


def check_context_length(
    contexts: Sequence[Sequence[int]], how: GenerationParams, limit: int
) -> None:
    """Raise EngineError where a text would not fit behind its context."""
    longest = max(map(len, contexts), default=0)
    if longest + how.limit > limit:
        raise EngineError(
            f"a context of {longest} tokens and a text of up to {how.limit} exceed the policy's "
            f"{limit} positions; lower rollout.think.block_tokens or data.max_history"
        )
