"""Everything that passes between rooms.

    Prompts -> SearchTrees -> ScoredTrees -> TrainBatch -> PolicyVersion
       rollout       rewards        learner       learner, publish

A batch of trees is one structure of NumPy arrays, so that it ships through the object store
without a copy and every algorithm over it is a few array operations.

Shapes:  B prompts (one tree each)   B1 = B + 1   N nodes of all trees   S tokens of all nodes
         C candidates   T prompt tokens   H history items   K steps of the longest candidate
Ragged axes are a flat array and a `*_start` array with one more entry (see `orchard.ragged`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from orchard import ragged
from orchard.targets import SequenceTargets, ValueTargets


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PolicyVersion:
    """Which policy: comparable by age, verifiable by content."""

    step: int
    """Number of batches learned from since the warm start."""
    digest: str = field(compare=False)
    """SHA-256 of the weights, computed once by whoever made them."""

    def __str__(self) -> str:
        return f"{self.step}-{self.digest[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Rows of a data split, as the policy reads them."""

    id: Int64[np.ndarray, " B"]
    """Row number in the split; the key of everything that is drawn at random for the prompt."""
    target: Int64[np.ndarray, " B"]
    """Catalog item that followed the history."""
    history: Int64[np.ndarray, " H"]
    """Catalog items, oldest first."""
    history_start: Int64[np.ndarray, " B+1"]
    token: Int32[np.ndarray, " T"]
    """What the policy sees: the history (and instruction) as token ids."""
    token_start: Int64[np.ndarray, " B+1"]

    def __len__(self) -> int:
        return len(self.id)

    def select(self, rows: Int64[np.ndarray, " R"]) -> "Prompts":
        """The given prompts, in the order asked for."""
        history, history_start = ragged.take(self.history, self.history_start, rows)
        token, token_start = ragged.take(self.token, self.token_start, rows)
        return Prompts(
            id=self.id[rows],
            target=self.target[rows],
            history=history,
            history_start=history_start,
            token=token,
            token_start=token_start,
        )

    @staticmethod
    def concatenate(parts: "Sequence[Prompts]") -> "Prompts":
        """Several batches one after another."""
        history, history_start = ragged.concatenate([(p.history, p.history_start) for p in parts])
        token, token_start = ragged.concatenate([(p.token, p.token_start) for p in parts])
        return Prompts(
            id=np.concatenate([p.id for p in parts]),
            target=np.concatenate([p.target for p in parts]),
            history=history,
            history_start=history_start,
            token=token,
            token_start=token_start,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a search spent; forward tokens exclude the prompt, as the V-STAR paper counts."""

    forward_tokens: int = 0
    leaf_tokens: int = 0
    """Tokens forwarded for nothing but the value of a leaf, which the paper does not count."""
    prefill_tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    """What else a search counted, by name."""

    def __add__(self, other: "Cost") -> "Cost":
        names = [f.name for f in fields(self) if f.name != "counts"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        counts = Counter(self.counts)
        counts.update(other.counts)  # `+` of counters would drop what was counted as zero
        return Cost(**sums, counts=counts)


def concatenate_optional(
    parts: Sequence[Float32[np.ndarray, "..."] | None],
) -> Float32[np.ndarray, "..."] | None:
    """Arrays one after another; None where any of them is."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchTrees:
    """One search tree per prompt, nodes in preorder: a root, then each child with its subtree.

    A node is a span of tokens with a step number: one semantic-ID code, one title token, or a
    block of thought. The root is the prompt itself: step 0 and an empty span. Steps grow along a
    path, by one unless a block is missing: over K codes a thinking policy has blocks at steps 1 to
    K and codes at steps K + 1 to 2 K.
    """

    NO_PARENT: ClassVar[int] = -1
    FREE_TEXT: ClassVar[int] = -1

    prompts: Prompts
    policy: PolicyVersion
    catalog: str
    """Digest of the catalog whose trie constrained the search."""
    node_start: Int64[np.ndarray, " B1"]
    parent: Int64[np.ndarray, " N"]
    """Index of the parent in these arrays; NO_PARENT at a root."""
    step: Int32[np.ndarray, " N"]
    state: Int64[np.ndarray, " N"]
    """Trie node reached by the codes so far; FREE_TEXT for a span that the trie does not bind."""
    token: Int32[np.ndarray, " S"]
    token_start: Int64[np.ndarray, " N+1"]
    logprob: Float32[np.ndarray, " S"]
    """Behaviour log-probability of each token under the distribution it was chosen from."""
    forced: Bool[np.ndarray, " S"]
    """The token was the only choice, or was injected: no gradient."""
    candidate: Int64[np.ndarray, " C"]
    """Node that ends each candidate, best first within its prompt; i.i.d. draws may repeat one."""
    candidate_start: Int64[np.ndarray, " B1"]
    leaf: Int64[np.ndarray, " C"]
    """Catalog leaf (distinct semantic ID) of each candidate."""
    score: Float32[np.ndarray, " C"]
    """Log-probability of the whole candidate given its prompt, free of sampling noise."""
    cost: Cost
    value: Float32[np.ndarray, " N"] | None = None
    """What the value head made of each node, NaN where it was not asked; None where the search is
    not guided by values."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def prompt_of_node(self) -> Int64[np.ndarray, " N"]:
        """The prompt of each node."""
        return ragged.owners(self.node_start)

    @property
    def prompt_of_candidate(self) -> Int64[np.ndarray, " C"]:
        """The prompt of each candidate."""
        return ragged.owners(self.candidate_start)

    @property
    def rank(self) -> Int64[np.ndarray, " C"]:
        """Place of each candidate by policy log-probability within its prompt, 1 for the best."""
        return ragged.places(self.candidate_start) + 1

    @property
    def is_reasoning(self) -> bool:
        """If there is a block of thought before codes."""
        return bool((self.state == self.FREE_TEXT).any())

    def paths(self) -> Int64[np.ndarray, "C K"]:
        """Node of each candidate at each step 1..K; NO_PARENT where it has none."""
        depth = self.step[self.candidate]
        path = np.full((len(self.candidate), int(depth.max(initial=0))), self.NO_PARENT, np.int64)
        node, rows = self.candidate.copy(), np.arange(len(self.candidate))
        while True:
            inside = self.step[node] > 0
            if not inside.any():
                return path
            path[rows[inside], self.step[node[inside]] - 1] = node[inside]
            node = np.where(inside, self.parent[node], node)

    def select(self, rows: Int64[np.ndarray, " R"]) -> "SearchTrees":
        """The trees of the given prompts, in the order asked for."""
        count = np.diff(self.node_start)[rows]
        nodes = ragged.ranges(self.node_start[rows], count)
        node_start = ragged.starts(count)
        shift = np.repeat(node_start[:-1] - self.node_start[rows], count)
        parent = self.parent[nodes]
        token, token_start = ragged.take(self.token, self.token_start, nodes)
        candidates = ragged.ranges(
            self.candidate_start[rows], counts := np.diff(self.candidate_start)[rows]
        )
        return SearchTrees(
            prompts=self.prompts.select(rows),
            policy=self.policy,
            catalog=self.catalog,
            node_start=node_start,
            parent=np.where(parent == self.NO_PARENT, self.NO_PARENT, parent + shift),
            step=self.step[nodes],
            state=self.state[nodes],
            token=token,
            token_start=token_start,
            logprob=ragged.take(self.logprob, self.token_start, nodes)[0],
            forced=ragged.take(self.forced, self.token_start, nodes)[0],
            candidate=self.candidate[candidates]
            + np.repeat(node_start[:-1] - self.node_start[rows], counts),
            candidate_start=ragged.starts(counts),
            leaf=self.leaf[candidates],
            score=self.score[candidates],
            cost=self.cost,
            value=None if self.value is None else self.value[nodes],
        )

    @staticmethod
    def concatenate(parts: "Sequence[SearchTrees]") -> "SearchTrees":
        """Several batches on one catalog as one; costs add up.

        No tree mixes policies, but a batch may: it counts as old as its oldest tree. Behaviour
        log-probabilities are stored with the tokens, so the update stays exact.
        """
        first = parts[0]
        assert all(p.catalog == first.catalog for p in parts)
        shift = np.cumsum([0, *(len(p.step) for p in parts)])
        token, token_start = ragged.concatenate([(p.token, p.token_start) for p in parts])
        _, node_start = ragged.concatenate([(p.step, p.node_start) for p in parts])
        _, candidate_start = ragged.concatenate([(p.leaf, p.candidate_start) for p in parts])
        return SearchTrees(
            prompts=Prompts.concatenate([p.prompts for p in parts]),
            policy=min(p.policy for p in parts),
            catalog=first.catalog,
            node_start=node_start,
            parent=np.concatenate(
                [
                    np.where(p.parent == p.NO_PARENT, p.NO_PARENT, p.parent + by)
                    for p, by in zip(parts, shift[:-1], strict=True)
                ]
            ),
            step=np.concatenate([p.step for p in parts]),
            state=np.concatenate([p.state for p in parts]),
            token=token,
            token_start=token_start,
            logprob=np.concatenate([p.logprob for p in parts]),
            forced=np.concatenate([p.forced for p in parts]),
            candidate=np.concatenate(
                [p.candidate + by for p, by in zip(parts, shift[:-1], strict=True)]
            ),
            candidate_start=candidate_start,
            leaf=np.concatenate([p.leaf for p in parts]),
            score=np.concatenate([p.score for p in parts]),
            cost=sum((p.cost for p in parts), Cost()),
            value=concatenate_optional([p.value for p in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTrees:
    """Search trees whose candidates have been judged."""

    trees: SearchTrees
    reward: Float32[np.ndarray, " C"]
    """Weighted sum of the parts."""
    parts: Mapping[str, Float32[np.ndarray, " C"]]
    """The unweighted terms of the reward, by name."""
    step_reward: Float32[np.ndarray, "C L"] | None = None
    """What each of the candidate's L codes earned, for credit by steps; None where not judged."""

    @staticmethod
    def concatenate(parts: "Sequence[ScoredTrees]") -> "ScoredTrees":
        """Several scored batches as one."""
        return ScoredTrees(
            trees=SearchTrees.concatenate([p.trees for p in parts]),
            reward=np.concatenate([p.reward for p in parts]),
            parts={name: np.concatenate([p.parts[name] for p in parts]) for name in parts[0].parts},
            step_reward=concatenate_optional([p.step_reward for p in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """An estimator's verdict: advantage and loss weight of each candidate at each step.

    Several credits of one batch add up in the loss. Weights are zero past a candidate's end.
    """

    advantage: Float32[np.ndarray, "C K"]
    weight: Float32[np.ndarray, "C K"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """Trees packed one to a row: the prompt, then the tree's nodes in preorder, each token once.

    Slot j is visible to slot i iff `j <= i < subtree_end[j]` (prompt slots end with the row), which
    is the whole tree mask. A *choice* is one predicted token: `slot` is the position whose output
    predicts it, `state` the trie node whose legal children compete (or FREE_TEXT), `edge` the
    trie node (or token id) chosen.

    Shapes:  B rows   S slots of the widest row   E choices
    """

    token: Int32[np.ndarray, "B S"]
    position: Int32[np.ndarray, "B S"]
    subtree_end: Int32[np.ndarray, "B S"]
    """One past the last slot of the subtree of the token; 0 at padding."""
    row: Int64[np.ndarray, " E"]
    query_slot: Int32[np.ndarray, " E"]
    state: Int64[np.ndarray, " E"]
    chosen: Int64[np.ndarray, " E"]
    behaviour_logprob: Float32[np.ndarray, " E"]
    advantage_pos: Float32[np.ndarray, " E"]
    """A+: sum of the positive weighted advantages of the candidates through the choice."""
    advantage_neg: Float32[np.ndarray, " E"]
    """A-: sum of the negative ones."""
    kl_weight: Float32[np.ndarray, " E"]
    forward_tokens: int
    """Tokens that are not padding."""
    flat_tokens: int
    """Tokens of the same candidates laid out one sequence each."""
    policy: PolicyVersion
    """Which policy grew the trees."""
    catalog: str
    values: ValueTargets | None = None
    """What the value head learns, where there is one to teach."""
    sequences: SequenceTargets | None = None
    """The candidates, where they and not the choices have ratios; `gain` and `loss` then rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What the learner returns: the new version and what was measured on the way."""

    policy: PolicyVersion
    metrics: Mapping[str, float]
