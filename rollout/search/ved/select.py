"""The candidates of a guided search: what its trees have borne.

Shapes:  B prompts   K completions
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int64

from orchard import ragged
from orchard.catalog.trie import Trie
from orchard.types import Cost
from rollout.candidates import Candidates
from rollout.search.beam import collect
from rollout.search.topk import sort_by_score
from rollout.search.ved.tree import VedTree


def select_candidates(
    trie: Trie, tree: VedTree, count: int, num_prompts: int, cost: Cost
) -> Candidates:
    """The `count` leaves of the highest value of each prompt, ordered by likelihood.

    Where too few were visited, free leaves below visited prefixes complete them, by distributions
    that are known already and so without a forward pass.
    """
    leaf = np.flatnonzero(tree.is_leaf)
    by = np.lexsort((tree.node[leaf], -tree.score[leaf], -tree.value[leaf], tree.prompt[leaf]))
    leaf = leaf[by]
    found = np.bincount(tree.prompt[leaf], minlength=num_prompts)
    leaf = leaf[ragged.places(ragged.starts(found)) < count]
    entry, owner, below = _completions(trie, tree, count - np.minimum(found, count))
    prompt = np.concatenate([tree.prompt[leaf], tree.prompt[owner]])
    node = np.concatenate([tree.node[leaf], below])
    logprob, value = tree.branches(np.concatenate([leaf, owner]), trie.depth)
    new = np.arange(len(leaf), len(prompt))
    logprob[new, tree.depth[owner]] = tree.child_logprob[entry]
    score = np.concatenate([tree.score[leaf], tree.score[owner] + tree.child_logprob[entry]])
    by = sort_by_score(
        torch.from_numpy(prompt), torch.from_numpy(score), torch.from_numpy(node)
    ).numpy()
    device = trie.code.device
    candidates = collect(
        trie,
        torch.from_numpy(prompt[by]).to(device),
        torch.from_numpy(node[by]).to(device),
        torch.from_numpy(logprob[by]).to(device),
        torch.from_numpy(score[by]).to(device),
        num_prompts,
        cost + Cost(counts={"completed": len(entry)}),
    )
    return replace(candidates, value=value[by])


def _completions(
    trie: Trie, tree: VedTree, wanted: Int64[np.ndarray, " B"]
) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K"], Int64[np.ndarray, " K"]]:
    """Free children that are leaves, as many per prompt as wanted: entry, owner, trie node.

    The likeliest of each prefix comes before the second likeliest of any, and prefixes of high
    value come first.
    """
    short = np.flatnonzero(wanted[tree.prompt] > 0)
    entry, owner = tree.free_children(short)
    owner = short[owner]
    below = trie.descend(torch.from_numpy(tree.child[entry]).to(trie.code.device))
    ends = (trie.num_children(below) == 0).cpu().numpy()
    entry, owner, node = entry[ends], owner[ends], below.cpu().numpy()[ends]
    by = np.lexsort((node, -tree.child_logprob[entry], owner))
    entry, owner, node = entry[by], owner[by], node[by]
    place = ragged.places(ragged.starts(np.bincount(owner, minlength=len(tree))))
    by = np.lexsort((node, -tree.score[owner], -tree.value[owner], place, tree.prompt[owner]))
    entry, owner, node = entry[by], owner[by], node[by]
    prompt = tree.prompt[owner]
    place = ragged.places(ragged.starts(np.bincount(prompt, minlength=len(wanted))))
    kept = place < wanted[prompt]
    return entry[kept], owner[kept], node[kept]
