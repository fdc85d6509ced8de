"""What a policy wrote before it named an item, and the trees that come of it.

Each sample is a chain of thinking blocks of its own below the prompt, and its codes come below the
last block. Equal code prefixes of two samples follow different thoughts, so that they stay apart;
several codes searched after one thought share their prefixes as everywhere.

Shapes:  B prompts   S samples   N blocks of all samples   T tokens of all blocks   B1 = B + 1
         S1 = S + 1   N1 = N + 1
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from orchard import ragged
from orchard.catalog.trie import ROOT
from orchard.types import Cost, Prompts, SearchTrees


@dataclass(frozen=True, slots=True, kw_only=True)
class Thoughts:
    """Blocks of every sample of every prompt. A block's tokens include its tags."""

    sample_start: Int64[np.ndarray, " B1"]
    block_start: Int64[np.ndarray, " S1"]
    token: Int32[np.ndarray, " T"]
    token_start: Int64[np.ndarray, " N1"]
    logprob: Float32[np.ndarray, " T"]
    """Under the distribution, at its temperature, that each token was drawn from; 0 if forced."""
    forced: Bool[np.ndarray, " T"]
    """The token was injected: an opening tag, or the closing tag of a block that was cut."""
    cost: Cost

    @property
    def score(self) -> Float64[np.ndarray, " S"]:
        """Log-probability of each sample's text."""
        sample = ragged.owners(self.block_start)[ragged.owners(self.token_start)]
        return np.bincount(sample, self.logprob, len(self.block_start) - 1)

    def contexts(self, prompts: Prompts) -> Prompts:
        """A prompt per sample, which ends with the thoughts; ids number samples as they follow."""
        owner = ragged.owners(self.sample_start)
        each = prompts.select(owner)
        text_start = self.token_start[self.block_start]
        count = np.diff(each.token_start) + np.diff(text_start)
        start = ragged.starts(count)
        token = np.empty(int(start[-1]), np.int32)
        asked = ragged.places(start) < np.repeat(np.diff(each.token_start), count)
        token[asked], token[~asked] = each.token, self.token
        # Draws after a thought depend on the prompt's id and on which of its samples this is.
        most = int(np.diff(self.sample_start).max(initial=1))
        return replace(
            each,
            id=each.id * most + ragged.places(self.sample_start),
            token=token,
            token_start=start,
        )

    @staticmethod
    def concatenate(parts: "Sequence[Thoughts]") -> "Thoughts":
        """Several batches one after another; costs add up."""
        token, token_start = ragged.concatenate([(p.token, p.token_start) for p in parts])
        _, block_start = ragged.concatenate([(p.token_start[:-1], p.block_start) for p in parts])
        _, sample_start = ragged.concatenate([(p.block_start[:-1], p.sample_start) for p in parts])
        return Thoughts(
            sample_start=sample_start,
            block_start=block_start,
            token=token,
            token_start=token_start,
            logprob=np.concatenate([p.logprob for p in parts]),
            forced=np.concatenate([p.forced for p in parts]),
            cost=sum((p.cost for p in parts), Cost()),
        )


def attach_thoughts(
    prompts: Prompts, thoughts: Thoughts, codes: SearchTrees, num_steps: int
) -> SearchTrees:
    """One tree per prompt: below its root the blocks of each sample, below those its codes.

    Args:
        prompts: as they were before anybody thought.
        thoughts: of their samples; every sample has a block.
        codes: the trees that were searched from `thoughts.contexts(prompts)`.
        num_steps: codes of an item, and blocks of a sample that is well formed.
    """
    owner = ragged.owners(thoughts.sample_start)
    blocks, below = np.diff(thoughts.block_start), np.diff(codes.node_start) - 1
    size = blocks + below
    node_start = ragged.starts(
        1 + np.bincount(owner, size, minlength=len(prompts)).astype(np.int64)
    )
    first = ragged.starts(size)[:-1] + owner + 1
    sample, place = ragged.owners(thoughts.block_start), ragged.places(thoughts.block_start)
    block = first[sample] + place
    under = codes.prompt_of_node
    at = (first + blocks)[under] + ragged.places(codes.node_start) - 1
    at[codes.node_start[:-1]] = first + blocks - 1  # a context ends with its last block
    inner = codes.parent != SearchTrees.NO_PARENT

    num_nodes = int(node_start[-1])
    parent = np.full(num_nodes, SearchTrees.NO_PARENT, np.int64)
    parent[block] = np.where(place == 0, node_start[owner[sample]], block - 1)
    parent[at[inner]] = at[codes.parent[inner]]
    step = np.zeros(num_nodes, np.int32)
    step[block], step[at[inner]] = place + 1, num_steps + codes.step[inner]
    state = np.full(num_nodes, ROOT, np.int64)
    state[block], state[at[inner]] = SearchTrees.FREE_TEXT, codes.state[inner]
    length = np.zeros(num_nodes, np.int64)
    length[block] = np.diff(thoughts.token_start)
    length[at[inner]] = np.diff(codes.token_start)[inner]
    start = ragged.starts(length)
    text = ragged.ranges(start[block], length[block])
    coded = ragged.ranges(start[at[inner]], length[at[inner]])

    def merged(name: str) -> np.ndarray:
        of_text, of_codes = getattr(thoughts, name), getattr(codes, name)
        values = np.empty(int(start[-1]), of_codes.dtype)
        values[text], values[coded] = of_text, of_codes
        return values

    of = codes.prompt_of_candidate
    score = (codes.score + thoughts.score[of]).astype(np.float32)
    order = np.lexsort((codes.leaf, -score, owner[of]))
    return replace(
        codes,
        prompts=prompts,
        node_start=node_start,
        parent=parent,
        step=step,
        state=state,
        token=merged("token"),
        token_start=start,
        logprob=merged("logprob"),
        forced=merged("forced"),
        candidate=at[codes.candidate][order],
        candidate_start=ragged.starts(np.bincount(owner[of], minlength=len(prompts))),
        leaf=codes.leaf[order],
        score=score[order],
        cost=thoughts.cost + codes.cost,
        value=None,
    )
