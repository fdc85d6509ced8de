"""A few prompts and what was found for them, for people to look at.

Kept as `examples.json` in the run folder. One file holds a list with, for each example,

    row         of the validation split            history, target      names of items, oldest first
    node        parent (-1 at the root), step, name, score (log-probability from the prompt on),
                value (null where there is none), beam (if a beam of as many candidates holds it)
    candidate   node, name of the item, score, reward

Shapes:  B prompts   N nodes   C candidates
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from cluster.training.controller import Controller
from orchard.catalog.catalog import Catalog
from orchard.folders import atomic_write
from orchard.policy.item_tokenizer import sid_token
from orchard.types import ScoredTrees, SearchTrees
from rewards.registry import RewardContext
from rewards.rule import prefix

FILE = "examples.json"
_LOOKED_THROUGH = 64
"""Validation rows that examples are chosen from."""
_TITLE = 60
"""Characters of a title that are shown."""


async def save_search_examples(controller: Controller) -> None:
    """Search some validation rows as the training does, and keep the most telling ones."""
    run = controller.run
    rows = np.arange(min(_LOOKED_THROUGH, len(run.valid)))
    if len(rows) == 0:
        return
    kind = run.config.rollout.search
    found = await controller.search(run.valid, rows, seed=run.config.seed, kind=kind)
    beams = found
    if kind != "beam":
        beams = await controller.search(run.valid, rows, seed=run.config.seed, kind="beam")
    shown = pick_examples(found, run.catalog)
    examples = [describe(found, beams.trees, int(at), run.catalog) for at in shown]
    atomic_write(run.dir / FILE, json.dumps(examples) + "\n")


def read_examples(run_dir: Path) -> list[dict[str, Any]]:
    """The kept examples, none where there are none; raises ValueError on a damaged file."""
    path = run_dir / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def pick_examples(scored: ScoredTrees, catalog: Catalog) -> Int64[np.ndarray, " B"]:
    """The prompts whose target was found furthest down the list, two of them, and one near miss."""
    trees = scored.trees
    common = prefix(trees, RewardContext(catalog=catalog))
    hit = np.flatnonzero(common == 1)
    found, first = np.unique(trees.prompt_of_candidate[hit], return_index=True)
    lowest_first = found[np.argsort(-trees.rank[hit[first]], kind="stable")]
    closeness = np.zeros(len(trees))
    np.maximum.at(closeness, trees.prompt_of_candidate, common)
    missed = np.setdiff1d(np.arange(len(trees)), found)
    nearest_first = missed[np.argsort(-closeness[missed], kind="stable")]
    return np.concatenate([lowest_first[:2], nearest_first[:1]])


def describe(scored: ScoredTrees, beams: SearchTrees, at: int, catalog: Catalog) -> dict[str, Any]:
    """The tree of prompt `at` in plain words and numbers; `beams` has what a beam found for it."""
    tree, held = (trees.select(np.array([at])) for trees in (scored.trees, beams))
    in_beam: Bool[np.ndarray, " N"] = np.isin(tree.state, held.state)
    score = _scores(tree)
    value = tree.value if tree.value is not None else np.full(len(score), np.nan)
    reward = scored.reward[slice(*scored.trees.candidate_start[at : at + 2].tolist())]
    item = catalog.item_of_leaf[catalog.leaf_start[tree.leaf]]
    return {
        "row": int(tree.prompts.id[0]),
        "history": [_item_name(catalog, one) for one in tree.prompts.history.tolist()],
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
    """Log-probability of each prefix given its prompt."""
    total = np.concatenate([[0.0], np.cumsum(trees.logprob, dtype=np.float64)])
    score = np.diff(total[trees.token_start])
    for step in range(2, int(trees.step.max(initial=0)) + 1):
        at = np.flatnonzero(trees.step == step)
        score[at] += score[trees.parent[at]]
    return score


def _code_name(tree: SearchTrees, node: int, catalog: Catalog) -> str:
    if tree.step[node] == 0:
        return "prompt"
    if tree.state[node] == SearchTrees.FREE_TEXT:
        return "thought"
    state = torch.from_numpy(tree.state[node : node + 1])
    level = int(catalog.trie.depth_of(state)) - 1  # blocks of thought count as steps, too
    return sid_token(level, int(catalog.trie.code[state])).strip("<>")


def _item_name(catalog: Catalog, item: int) -> str:
    """The semantic ID, and the title where it is known."""
    codes = [int(code) for code in catalog.plain_codes[item] if code >= 0]
    title = catalog.title[item]
    short = title if len(title) <= _TITLE else f"{title[: _TITLE - 1]}\N{HORIZONTAL ELLIPSIS}"
    if catalog.code_token:
        return short
    spelt = " ".join(sid_token(level, one).strip("<>") for level, one in enumerate(codes))
    return f"{spelt}  {short}".strip()
