"""Save search trees of a few prompts for inspection in the report.

The examples are written to `examples.json` in the run folder; `cluster.report.examples` reads them.
The file holds a list with, for each example,

    row         of the validation split            history, target      names of items, oldest first
    node        parent (-1 at the root), step, name, score (log-probability from the prompt on),
                value (null where there is none), beam (whether a beam of as many candidates has it)
    candidate   node, name of the item, score, reward

Shapes:  B prompts   N nodes   C candidates
"""

import json
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from cluster.report.examples import FILE
from cluster.training.controller import Controller
from orchard.catalog.catalog import Catalog
from orchard.folders import atomic_write
from orchard.policy.item_tokenizer import sid_token
from orchard.types import ScoredTrees, SearchTrees
from rewards.registry import RewardContext
from rewards.rule import prefix

_NUM_SEARCHED = 64
"""Number of validation rows that examples are selected from."""
_TITLE_LENGTH = 60
"""Maximum number of characters of a title."""


async def save_search_examples(controller: Controller) -> None:
    """Search some validation rows as in training, and save the most informative ones."""
    run = controller.run
    rows = np.arange(min(_NUM_SEARCHED, len(run.valid)))
    if len(rows) == 0:
        return
    scored = await controller.search(run.valid, rows, seed=run.config.seed)
    beams = scored
    if run.config.rollout.search != "beam":
        beams = await controller.search(run.valid, rows, seed=run.config.seed, name="beam")
    shown = pick_examples(scored, run.catalog)
    examples = [
        describe(scored, beams.trees, int(prompt_index), run.catalog) for prompt_index in shown
    ]
    atomic_write(run.dir / FILE, json.dumps(examples) + "\n")


def pick_examples(scored: ScoredTrees, catalog: Catalog) -> Int64[np.ndarray, " B"]:
    """Select the two hits with the lowest-ranked targets and the nearest miss."""
    trees = scored.trees
    common = prefix(trees, RewardContext(catalog=catalog))  # shared prefix with the target, 0 to 1
    hit = np.flatnonzero(common == 1)
    # Prompts whose target is among their candidates, and the first such candidate of each.
    hit_prompt, first = np.unique(trees.prompt_of_candidate[hit], return_index=True)
    lowest_first = hit_prompt[np.argsort(-trees.rank[hit[first]], kind="stable")]
    closeness = np.zeros(len(trees))  # longest shared prefix of each prompt
    np.maximum.at(closeness, trees.prompt_of_candidate, common)
    missed = np.setdiff1d(np.arange(len(trees)), hit_prompt)
    nearest_first = missed[np.argsort(-closeness[missed], kind="stable")]
    return np.concatenate([lowest_first[:2], nearest_first[:1]])


def describe(
    scored: ScoredTrees, beams: SearchTrees, prompt_index: int, catalog: Catalog
) -> dict[str, Any]:
    """Describe the tree of a prompt as JSON values; `beams` holds the beam search trees."""
    tree, beam_tree = (trees.select(np.array([prompt_index])) for trees in (scored.trees, beams))
    # Whether the beam search contains the prefix of each node.
    in_beam: Bool[np.ndarray, " N"] = np.isin(tree.state, beam_tree.state)
    score = _scores(tree)
    value = tree.value if tree.value is not None else np.full(len(score), np.nan)
    bounds = scored.trees.candidate_start[prompt_index : prompt_index + 2].tolist()
    reward = scored.reward[slice(*bounds)]
    item = catalog.item_of_leaf[catalog.leaf_start[tree.leaf]]
    return {
        "row": int(tree.prompts.id[0]),
        "history": [_item_name(catalog, item_row) for item_row in tree.prompts.history.tolist()],
        "target": _item_name(catalog, int(tree.prompts.target[0])),
        "node": [
            {
                "parent": int(tree.parent[n]),
                "step": int(tree.step[n]),
                "name": _code_name(tree, n, catalog),
                "score": round(float(score[n]), 4),
                "value": None if np.isnan(value[n]) else round(float(value[n]), 4),
                "beam": bool(in_beam[n]),
            }
            for n in range(len(score))
        ],
        "candidate": [
            {
                "node": int(tree.candidate[c]),
                "name": _item_name(catalog, int(item[c])),
                "score": round(float(tree.score[c]), 4),
                "reward": round(float(reward[c]), 4),
            }
            for c in range(len(reward))
        ],
    }


def _scores(trees: SearchTrees) -> Float64[np.ndarray, " N"]:
    """Compute the log-probability of each prefix given its prompt."""
    total = np.concatenate([[0.0], np.cumsum(trees.logprob, dtype=np.float64)])
    score = np.diff(total[trees.token_start])  # log-probability of the tokens of each node
    for step in range(2, int(trees.step.max(initial=0)) + 1):
        nodes = np.flatnonzero(trees.step == step)
        score[nodes] += score[trees.parent[nodes]]
    return score


def _code_name(tree: SearchTrees, node: int, catalog: Catalog) -> str:
    """Return the displayed name of the last code of a node."""
    if tree.step[node] == 0:
        return "prompt"
    if tree.state[node] == SearchTrees.FREE_TEXT:
        return "thought"
    state = torch.from_numpy(tree.state[node : node + 1])
    # The level is not the step, since thought blocks count as steps.
    level = int(catalog.trie.depth_of(state)) - 1
    return sid_token(level, int(catalog.trie.code[state])).strip("<>")


def _item_name(catalog: Catalog, item: int) -> str:
    """Return the semantic ID and the shortened title of an item; the title alone for titles."""
    codes = [int(code) for code in catalog.plain_codes[item] if code >= 0]
    title = catalog.title[item]
    short = title
    if len(title) > _TITLE_LENGTH:
        short = f"{title[: _TITLE_LENGTH - 1]}\N{HORIZONTAL ELLIPSIS}"
    if catalog.code_token:
        return short
    spelled = " ".join(sid_token(level, code).strip("<>") for level, code in enumerate(codes))
    return f"{spelled}  {short}".strip()
