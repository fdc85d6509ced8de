"""Search examples, as numbers and as a drawing."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.report.report import gather, page
from cluster.training.search_examples import describe, pick_examples
from orchard.policy import value_head
from orchard.settings import VedConfig
from orchard.testing import tiny_catalog, tiny_policy, tiny_prompts
from orchard.types import PolicyVersion, ScoredTrees
from rewards.score import score_trees
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.ved.search import ved
from rollout.search_trees import build_search_trees

ITEMS = tiny_catalog(num_items=60, level_size=(6, 5, 6))
PROMPTS = tiny_prompts(ITEMS, [1, 3, 2, 2, 4])
WEIGHTS = {"rule": 1.0, "ranking": 1.0}


@pytest.fixture(scope="module")
def found() -> tuple[ScoredTrees, ScoredTrees]:
    """Scored trees of a guided search and of a beam search."""
    model, vocabulary = tiny_policy(ITEMS)
    value_head.attach(model, seed=0)
    version = PolicyVersion(step=0, digest="")
    engine = TorchEngine(model, vocabulary, version)
    guided = ved(engine, PROMPTS, VedConfig(budget=17, width=4), count=8, seed=0)
    both = [
        build_search_trees(PROMPTS, one, vocabulary, version)
        for one in (guided, beam(engine, PROMPTS, width=8))
    ]
    return score_trees(both[0], ITEMS, WEIGHTS), score_trees(both[1], ITEMS, WEIGHTS)


def test_an_example_says_what_the_tree_holds(found: tuple[ScoredTrees, ScoredTrees]) -> None:
    scored, beams = found
    trees = scored.trees
    for prompt_index in range(len(trees)):
        example = json.loads(json.dumps(describe(scored, beams.trees, prompt_index, ITEMS)))
        kept = slice(*trees.candidate_start[prompt_index : prompt_index + 2].tolist())
        assert len(example["candidate"]) == kept.stop - kept.start
        beam_states = set(
            beams.trees.state[
                slice(*beams.trees.node_start[prompt_index : prompt_index + 2].tolist())
            ].tolist()
        )
        states = trees.state[
            slice(*trees.node_start[prompt_index : prompt_index + 2].tolist())
        ].tolist()
        for index, node in enumerate(example["node"]):
            assert node["parent"] < index
            assert node["beam"] == (states[index] in beam_states)
        for candidate, expected in zip(example["candidate"], trees.score[kept], strict=True):
            end = example["node"][candidate["node"]]
            assert end["score"] == pytest.approx(candidate["score"], abs=1e-3)
            assert candidate["score"] == pytest.approx(float(expected), abs=1e-3)
            # The name of an item spells the codes on the way to it.
            assert candidate["name"].split()[end["step"] - 1] == end["name"]


def test_the_hits_furthest_down_and_one_miss_are_told(
    found: tuple[ScoredTrees, ScoredTrees],
) -> None:
    scored, _ = found
    trees = scored.trees
    hits = {int(p) for p in trees.prompt_of_candidate[scored.parts["rule"] > 0]}
    shown = pick_examples(scored, ITEMS).tolist()
    assert len(set(shown)) == len(shown)
    assert sum(prompt in hits for prompt in shown) == min(2, len(hits))
    assert sum(prompt not in hits for prompt in shown) == 1


def test_a_drawing_names_every_candidate(
    found: tuple[ScoredTrees, ScoredTrees], tmp_path: Path
) -> None:
    scored, beams = found
    example = describe(scored, beams.trees, 0, ITEMS)
    findings = gather(tmp_path)
    html = page(replace(findings, examples=[example]))
    assert html.count("<svg") == 1
    text = re.sub(r"<[^>]*>", " ", html)
    for candidate in example["candidate"]:
        assert candidate["name"] in text
    assert "Search trees" not in page(findings)


def test_with_hits_alone_or_misses_alone_there_are_fewer_examples(
    found: tuple[ScoredTrees, ScoredTrees],
) -> None:
    trees = found[0].trees
    hits = np.unique(trees.prompt_of_candidate[found[0].parts["rule"] > 0])
    for rows in (hits, np.setdiff1d(np.arange(len(trees)), hits)):
        some = trees.select(rows)
        alone = ScoredTrees(trees=some, reward=np.zeros(len(some.leaf), np.float32), parts={})
        assert set(pick_examples(alone, ITEMS).tolist()) <= set(range(len(rows)))
        assert len(pick_examples(alone, ITEMS)) == min(len(rows), 2 if rows is hits else 1)
