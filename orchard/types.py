"""Data types that the components exchange.

    Prompts -> SearchTrees -> ScoredTrees -> TrainBatch -> PolicyVersion
       rollout       rewards        learner       learner, publish

A batch of trees is one structure of NumPy arrays, so that it passes through the object store
without a copy and every algorithm on it is a few array operations.

Shapes:  B prompts (one tree each)   B1 = B + 1   N nodes of all trees   S tokens of all nodes
         C candidates   T prompt tokens   H history items   K steps of the longest candidate
Ragged axes are a flat array and a `*_start` array with one more entry (see `orchard.ragged`).
The annotations of fields hold their axes, by which `orchard.arrays` selects and concatenates.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Generic

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64

from orchard import arrays, ragged
from orchard.arrays import Indices, Merge, Starts
from orchard.targets import A, CodeTargets, SequenceTargets, ValueTargets


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PolicyVersion:
    """Version of a policy, ordered by training step and verifiable by its digest."""

    step: int
    """Number of training batches since SFT."""
    digest: str = field(compare=False)
    """Digest of the weights, computed once by the component that produced them: SHA-256 of those of
    a policy folder, BLAKE3 of those on the way to actors (`orchard.policy.transfer`)."""

    def __str__(self) -> str:
        return f"{self.step}-{self.digest[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Batch of prompts, made from rows of a data split."""

    id: Int64[np.ndarray, " B"]
    """Row number in the split, which keys every random draw for the prompt."""
    target: Int64[np.ndarray, " B"]
    """Catalog row of the item that followed the history."""
    history: Int64[np.ndarray, " H"]
    """Catalog rows of the history items, oldest first."""
    history_start: Annotated[Int64[np.ndarray, " B+1"], Starts("H")]
    token: Int32[np.ndarray, " T"]
    """Token IDs of the prompt: the history, with the instruction if there is one."""
    token_start: Annotated[Int64[np.ndarray, " B+1"], Starts("T")]
    reward: Float32[np.ndarray, " B"] | None = None
    """Reward of the target, in feedback; None if it is 1 everywhere."""
    logged: Float32[np.ndarray, " B"] | None = None
    """Log-probability with which the target was shown; None if it is not known."""

    def __len__(self) -> int:
        return len(self.id)

    def select(self, rows: Int64[np.ndarray, " R"]) -> "Prompts":
        """Select prompts by row, in the given order."""
        return arrays.select(self, rows)

    @staticmethod
    def concatenate(parts: "Sequence[Prompts]") -> "Prompts":
        """Concatenate several batches."""
        return arrays.concatenate(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Compute cost of a search; forward tokens exclude the prompt, as in the V-STAR paper."""

    forward_tokens: int = 0
    leaf_tokens: int = 0
    """Number of tokens forwarded only for the value of a leaf, which the paper does not count."""
    prefill_tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Further counters of a search, by name."""

    def __add__(self, other: "Cost") -> "Cost":
        names = [f.name for f in fields(self) if f.name != "counts"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        counts = Counter(self.counts)
        counts.update(other.counts)  # `+` of counters would drop what was counted as zero
        return Cost(**sums, counts=counts)


def sum_costs(costs: Sequence[Cost]) -> Cost:
    """Return the sum of costs."""
    return sum(costs, Cost())


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchTrees:
    """One search tree per prompt, nodes in preorder: a root, then each child with its subtree.

    A node is a span of tokens with a step number: one semantic-ID code, one title token, or one
    thinking block. The root represents the prompt and has step 0 and an empty span. Steps increase
    along a path, by one unless a block is missing: with K codes a thinking policy has blocks at
    steps 1 to K and codes at steps K + 1 to 2 K.
    """

    NO_PARENT: ClassVar[int] = -1
    FREE_TEXT: ClassVar[int] = -1

    prompts: Prompts
    policy: Annotated[PolicyVersion, Merge(min)]
    catalog: str
    """Digest of the catalog whose trie constrained the search."""
    node_start: Annotated[Int64[np.ndarray, " B1"], Starts("N")]
    """First node of each tree, then N."""
    parent: Annotated[Int64[np.ndarray, " N"], Indices("N")]
    """Node index of the parent; NO_PARENT at a root."""
    step: Int32[np.ndarray, " N"]
    state: Int64[np.ndarray, " N"]
    """Trie node reached by the codes so far; FREE_TEXT for a span that the trie does not
    constrain."""
    token: Int32[np.ndarray, " S"]
    token_start: Annotated[Int64[np.ndarray, " N+1"], Starts("S")]
    logprob: Float32[np.ndarray, " S"]
    """Behavior log-probability of each token under the distribution from which it was chosen."""
    forced: Bool[np.ndarray, " S"]
    """True if the token was the only legal choice or was injected, so that it has no gradient."""
    candidate: Annotated[Int64[np.ndarray, " C"], Indices("N")]
    """Last node of each candidate, best first within a prompt; independent samples may repeat
    nodes."""
    candidate_start: Annotated[Int64[np.ndarray, " B1"], Starts("C")]
    """First candidate of each prompt, then C."""
    leaf: Int64[np.ndarray, " C"]
    """Catalog leaf (distinct semantic ID) of each candidate."""
    score: Float32[np.ndarray, " C"]
    """Log-probability of the whole candidate given its prompt, without sampling noise."""
    cost: Annotated[Cost, Merge(sum_costs)]
    value: Float32[np.ndarray, " N"] | None = None
    """Value estimate of each node, NaN where it was not evaluated; None if the search does not use
    values."""
    hinted: Int64[np.ndarray, " B"] | None = None
    """Number of first codes of the target that were given to the search of each prompt, forced and
    with log-probability 0; None if the run gives no hints."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def prompt_of_node(self) -> Int64[np.ndarray, " N"]:
        """Prompt index of each node."""
        return ragged.row_of(self.node_start)

    @property
    def prompt_of_candidate(self) -> Int64[np.ndarray, " C"]:
        """Prompt index of each candidate."""
        return ragged.row_of(self.candidate_start)

    @property
    def rank(self) -> Int64[np.ndarray, " C"]:
        """Rank of each candidate by policy log-probability within its prompt, 1 for the best."""
        return ragged.index_in_row(self.candidate_start) + 1

    @property
    def is_reasoning(self) -> bool:
        """True if there are thinking blocks before the codes."""
        return bool((self.state == self.FREE_TEXT).any())

    def well_formed(self, num_steps: int) -> Bool[np.ndarray, " C"]:
        """Mark candidates with a thinking block for each of the `num_steps` codes.

        Where the policy does not think, all candidates are well formed.
        """
        if not self.is_reasoning:
            return np.ones(len(self.candidate), dtype=bool)
        path = self.paths()
        num_blocks = ((path >= 0) & (self.state[path] == self.FREE_TEXT)).sum(1)
        return num_blocks == num_steps

    def paths(self) -> Int64[np.ndarray, "C K"]:
        """Return the node of each candidate at each step 1..K; NO_PARENT if it has none."""
        depth = self.step[self.candidate]
        path = np.full((len(self.candidate), int(depth.max(initial=0))), self.NO_PARENT, np.int64)
        # All candidates climb to their roots in parallel; `node` is the current node of each.
        node, rows = self.candidate.copy(), np.arange(len(self.candidate))
        while True:
            below_root = self.step[node] > 0
            if not below_root.any():
                return path
            path[rows[below_root], self.step[node[below_root]] - 1] = node[below_root]
            node = np.where(below_root, self.parent[node], node)

    def select(self, rows: Int64[np.ndarray, " R"]) -> "SearchTrees":
        """Select the trees of prompts by row, in the given order; the cost is unchanged."""
        return arrays.select(self, rows)

    @staticmethod
    def concatenate(parts: "Sequence[SearchTrees]") -> "SearchTrees":
        """Concatenate several batches that share a catalog; costs are summed.

        A tree never mixes policy versions, but a batch may: its version is the oldest of its trees.
        Behavior log-probabilities are stored with the tokens, so the update stays exact.
        """
        return arrays.concatenate(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTrees:
    """Search trees with the rewards of their candidates."""

    trees: SearchTrees
    reward: Float32[np.ndarray, " C"]
    """Reward of each candidate: the weighted sum of the parts."""
    parts: Mapping[str, Float32[np.ndarray, " C"]]
    """Unweighted reward parts by name."""
    step_reward: Float32[np.ndarray, "C L"] | None = None
    """Reward of each of the L codes of a candidate, for step-level credit; None if not computed."""
    node_reward: Float32[np.ndarray, " N"] | None = None
    """Reward of the step into each node, which trains the value head; None without one."""

    @staticmethod
    def concatenate(parts: "Sequence[ScoredTrees]") -> "ScoredTrees":
        """Concatenate several scored batches."""
        return arrays.concatenate(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Advantage and loss weight of each candidate at each step, from one estimator.

    Losses of several estimators are summed. Weights are zero past the end of a candidate.
    """

    advantage: Float32[np.ndarray, "C K"]
    weight: Float32[np.ndarray, "C K"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch(Generic[A]):
    """Search trees packed one per row: the prompt, then the nodes in preorder, each token once.

    Slot j is visible to slot i if and only if `j <= i < subtree_end[j]`, where the subtree of a
    prompt slot ends with the row; this defines the whole tree attention mask. A *choice* is one
    predicted token: `query_slot` is the slot whose output predicts it, `state` the trie node whose
    legal children compete (or FREE_TEXT), `chosen` the chosen trie node (or token ID).

    The arrays are NumPy's, or tensors on the model's device (`TrainBatch[Tensor]`).

    Shapes:  B rows   S slots of the widest row   E choices
    """

    token: Int[A, "B S"]
    position: Int[A, "B S"]
    subtree_end: Int[A, "B S"]
    """End (exclusive) of the subtree of each slot; 0 at padding."""
    row: Int[A, " E"]
    query_slot: Int[A, " E"]
    state: Int[A, " E"]
    chosen: Int[A, " E"]
    behaviour_logprob: Float32[A, " E"]
    advantage_pos: Float32[A, " E"]
    """A+: sum of the positive weighted advantages of the candidates that contain the choice."""
    advantage_neg: Float32[A, " E"]
    """A-: sum of the negative weighted advantages of these candidates."""
    kl_weight: Float32[A, " E"]
    forward_tokens: int
    """Number of tokens without padding."""
    flat_tokens: int
    """Number of tokens if each candidate were a separate sequence."""
    policy: PolicyVersion
    """Version of the policy that ran the search."""
    catalog: str
    values: ValueTargets[A] | None = None
    """Targets of the value head; None without a value head."""
    sequences: SequenceTargets[A] | None = None
    """Candidates with their advantages if the ratio is per candidate; `advantage_pos` and
    `advantage_neg` are then unused."""
    codes: CodeTargets[A] | None = None
    """Codes of targets to learn by cross entropy; None if there is no such term."""


@dataclass(frozen=True, kw_only=True)
class StoredTransfer:
    """Place of weights (`orchard.policy.transfer`) in an object store, with that of its base."""

    digest: str
    """Digest of the transfer of the weights."""
    ref: Any
    """Object reference of the transfer."""
    base_ref: Any = None
    """Object reference of the base; None where none is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Result of the learner's start or of an update: a policy version and where its weights are.

    Weights are a `StoredTransfer` or values by parameter name.
    """

    policy: PolicyVersion
    """Version to search with from now on."""
    metrics: Mapping[str, float]
    """Measured metrics; empty at a start."""
    weights: Any = field(default_factory=dict[str, np.ndarray])
    """Weights of `policy`."""
    probe_logprobs: Float32[np.ndarray, " B"] | None = None
    """Log-probabilities of the probe's answers under `weights`; None without a probe."""
    eval_weights: tuple[PolicyVersion, Any] | None = None
    """Version and weights to evaluate and keep; None if they are `policy` and `weights`, or if the
    update was not asked for them."""
    exact_weights: Any = None
    """Weights to keep where `weights` are rounded and are those to evaluate."""
    adapter: Any = None
    """LoRA factors of the weights to keep, or the object reference of them; None where there are
    none or the update was not asked for them."""

    @property
    def to_evaluate(self) -> tuple[PolicyVersion, Any]:
        """Version and weights to evaluate."""
        return self.eval_weights or (self.policy, self.weights)

    @property
    def to_keep(self) -> tuple[PolicyVersion, Any]:
        """Version and weights to keep: those evaluated, or what they are rounded from."""
        policy, weights = self.to_evaluate
        return policy, weights if self.exact_weights is None else self.exact_weights
