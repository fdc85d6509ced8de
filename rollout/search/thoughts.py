"""Thoughts generated before the codes of an item, and their merge into search trees.

Each sample is a separate chain of thinking blocks below the prompt, with its codes below the last
block. Equal code prefixes of two samples follow different thoughts, so they are different nodes;
code sequences searched after the same thought share their prefixes as in any search tree.

Shapes:  B prompts   S samples   N blocks of all samples   T tokens of all blocks   B1 = B + 1
         S1 = S + 1   N1 = N + 1
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from orchard import arrays, ragged
from orchard.arrays import Merge, Starts
from orchard.catalog.trie import ROOT
from orchard.types import Cost, Prompts, SearchTrees, sum_costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Thoughts:
    """Thinking blocks of every sample of every prompt. A block's tokens include its tags."""

    sample_start: Annotated[Int64[np.ndarray, " B1"], Starts("S")]
    """Boundaries: the samples of prompt b are `sample_start[b] : sample_start[b + 1]`."""
    block_start: Annotated[Int64[np.ndarray, " S1"], Starts("N")]
    """Boundaries: the blocks of sample s are `block_start[s] : block_start[s + 1]`."""
    token: Int32[np.ndarray, " T"]
    """Tokens of all blocks."""
    token_start: Annotated[Int64[np.ndarray, " N1"], Starts("T")]
    """Boundaries: the tokens of block n are `token_start[n] : token_start[n + 1]`."""
    logprob: Float32[np.ndarray, " T"]
    """Log-probability of each token under the tempered distribution that it was drawn from; 0 if
    forced."""
    forced: Bool[np.ndarray, " T"]
    """Whether the token was injected: an opening tag, or the closing tag of a block that was cut
    or ended by the end token."""
    cost: Annotated[Cost, Merge(sum_costs)]

    @property
    def score(self) -> Float64[np.ndarray, " S"]:
        """Log-probability of each sample's text."""
        sample = ragged.row_of(self.block_start)[ragged.row_of(self.token_start)]
        return np.bincount(sample, self.logprob, len(self.block_start) - 1)

    def contexts(self, prompts: Prompts) -> Prompts:
        """Return a prompt per sample, with its own id: the prompt followed by the thoughts."""
        prompt_of = ragged.row_of(self.sample_start)
        repeated = prompts.select(prompt_of)
        text_start = self.token_start[self.block_start]
        count = np.diff(repeated.token_start) + np.diff(text_start)
        start = ragged.starts(count)
        token = np.empty(int(start[-1]), np.int32)
        # Whether each token of the contexts is of the prompt; the others are of the thoughts.
        is_prompt = ragged.index_in_row(start) < np.repeat(np.diff(repeated.token_start), count)
        token[is_prompt], token[~is_prompt] = repeated.token, self.token
        # Draws after a thought depend on the prompt's id and the sample's index in its prompt.
        max_samples = int(np.diff(self.sample_start).max(initial=1))
        return replace(
            repeated,
            id=repeated.id * max_samples + ragged.index_in_row(self.sample_start),
            token=token,
            token_start=start,
        )

    @staticmethod
    def concatenate(parts: "Sequence[Thoughts]") -> "Thoughts":
        """Concatenate batches in order and sum their costs."""
        return arrays.concatenate(parts)


def attach_thoughts(
    prompts: Prompts, thoughts: Thoughts, codes: SearchTrees, num_steps: int
) -> SearchTrees:
    """Build one tree per prompt: below its root each sample's blocks, below these its codes.

    Args:
        prompts: prompts without thoughts.
        thoughts: thoughts of the prompts; every sample has at least one block.
        codes: search trees of `thoughts.contexts(prompts)`, one per sample.
        num_steps: codes of an item, and blocks of a well-formed sample.
    """
    prompt_of = ragged.row_of(thoughts.sample_start)  # of each sample
    num_blocks, num_codes = np.diff(thoughts.block_start), np.diff(codes.node_start) - 1
    size = num_blocks + num_codes  # new nodes of each sample
    node_start = ragged.starts(
        1 + np.bincount(prompt_of, size, minlength=len(prompts)).astype(np.int64)
    )
    # New node of each sample's first block; every prompt has a root before its samples.
    first = ragged.starts(size)[:-1] + prompt_of + 1
    # Sample of each block, its index there, and its new node.
    sample, block_index = (
        ragged.row_of(thoughts.block_start),
        ragged.index_in_row(thoughts.block_start),
    )
    block = first[sample] + block_index
    # New node of each node of `codes`; the root of a context becomes its last block.
    sample_of_node = codes.prompt_of_node
    new_node = (first + num_blocks)[sample_of_node] + ragged.index_in_row(codes.node_start) - 1
    new_node[codes.node_start[:-1]] = first + num_blocks - 1
    inner = codes.parent != SearchTrees.NO_PARENT
    code_node = new_node[inner]

    num_nodes = int(node_start[-1])
    parent = np.full(num_nodes, SearchTrees.NO_PARENT, np.int64)
    parent[block] = np.where(block_index == 0, node_start[prompt_of[sample]], block - 1)
    parent[code_node] = new_node[codes.parent[inner]]
    step = np.zeros(num_nodes, np.int32)
    step[block], step[code_node] = block_index + 1, num_steps + codes.step[inner]
    state = np.full(num_nodes, ROOT, np.int64)
    state[block], state[code_node] = SearchTrees.FREE_TEXT, codes.state[inner]
    length = np.zeros(num_nodes, np.int64)
    length[block] = np.diff(thoughts.token_start)
    length[code_node] = np.diff(codes.token_start)[inner]
    start = ragged.starts(length)
    # Positions of the blocks' tokens and of the codes' tokens among all tokens.
    text_position = ragged.ranges(start[block], length[block])
    code_position = ragged.ranges(start[code_node], length[code_node])

    def merged(name: str) -> np.ndarray:
        of_text, of_codes = getattr(thoughts, name), getattr(codes, name)
        values = np.empty(int(start[-1]), of_codes.dtype)
        values[text_position], values[code_position] = of_text, of_codes
        return values

    sample_of = codes.prompt_of_candidate
    score = (codes.score + thoughts.score[sample_of]).astype(np.float32)
    order = np.lexsort((codes.leaf, -score, prompt_of[sample_of]))
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
        candidate=new_node[codes.candidate][order],
        candidate_start=ragged.starts(np.bincount(prompt_of[sample_of], minlength=len(prompts))),
        leaf=codes.leaf[order],
        score=score[order],
        cost=thoughts.cost + codes.cost,
        value=None,
    )
