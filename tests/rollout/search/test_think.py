"""Thinking: what samples look like, where they stop, and that they are what the policy wrote."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.advantage.estimators import compute_advantages
from learner.batch.pack import pack
from learner.logprobs import choice_logprobs, to_tensors
from orchard import ragged
from orchard.errors import DataError, EngineError
from orchard.policy.item_tokenizer import THINK, compact_tokenizer, think_tokens
from orchard.settings import LearnerConfig, RolloutConfig
from orchard.testing import TinySetup, tiny_thinking_setup, tiny_title_tokenizer
from orchard.types import ScoredTrees, SearchTrees
from rewards.steps import add_step_rewards
from rollout.actor import RolloutWorker
from rollout.engine.protocol import Completions, GenerationParams
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.think import think

THINKING = {"search": "think", "engine": "torch", "group_size": 4, "threads": 1}


@pytest.fixture(scope="module")
def world() -> TinySetup:
    return tiny_thinking_setup()


@pytest.fixture(scope="module")
def folder(world: TinySetup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.save(tmp_path_factory.mktemp("policy"))


def rollout_worker(world: TinySetup, folder: Path, **changes: object) -> RolloutWorker:
    settings = THINKING | {"think": {"block_tokens": 6}} | changes
    config = RolloutConfig.model_validate(settings)
    return RolloutWorker(config, folder, world.tokenizer, seed=0)


def gap(world: TinySetup, trees: SearchTrees, temperature: float = 1.0) -> float:
    """Largest difference between what was stored and what the learner computes."""
    zero = np.zeros(len(trees.leaf), np.float32)
    judged = add_step_rewards(ScoredTrees(trees=trees, reward=zero, parts={}), world.catalog)
    credits = compute_advantages(judged, LearnerConfig(estimator="sapo"))
    batch = to_tensors(pack(judged, credits, world.tokenizer))
    with torch.no_grad():
        found, _ = choice_logprobs(world.model, batch, world.tokenizer, temperature=temperature)
    assert len(found) > 4 * len(trees.leaf)
    return float((found - batch.behaviour_logprob).abs().max())


def spans(trees: SearchTrees, path: np.ndarray) -> list[list[int]]:
    """Tokens of the nodes of a path."""
    bounds = [(trees.token_start[n], trees.token_start[n + 1]) for n in path if n >= 0]
    return [trees.token[a:b].tolist() for a, b in bounds]


@pytest.mark.slow
@pytest.mark.parametrize(
    "think", [{"width": 1}, {"width": 3}, {"width": 3, "codes": "beam"}], ids=str
)
def test_a_sample_is_a_block_per_code_and_then_the_codes(
    world: TinySetup, folder: Path, think: dict[str, object]
) -> None:
    tags = world.tokenizer.think
    assert tags is not None
    trees = rollout_worker(world, folder, think={"block_tokens": 6} | think).search(
        world.prompts, 3
    )
    assert np.diff(trees.candidate_start).tolist() == [4 * int(str(think["width"]))] * 3
    for path, leaf in zip(trees.paths(), trees.leaf, strict=True):
        *blocks, _, _, _ = spans(trees, path)
        for block in blocks:
            assert block[0] == tags.open
            assert block[-1] == tags.close
            assert block.count(tags.close) == 1
            assert 2 <= len(block) <= 8
        ended = [tags.end in block for block in blocks]
        assert not any(ended[:-1])
        assert len(blocks) == 3 or ended[-1]
        assert tuple(trees.state[path[3:]]) == world.leaf_path[leaf]
    assert trees.forced[trees.token == tags.open].any()
    counts = trees.cost.counts
    assert counts["thoughts"] == 12
    assert counts["malformed_thoughts"] == (~trees.well_formed(3)).sum() / int(str(think["width"]))
    assert gap(world, trees) < 1e-5


@pytest.mark.slow
def test_draws_depend_on_prompt_and_sample_alone(world: TinySetup, folder: Path) -> None:
    one = rollout_worker(world, folder)
    whole, again = one.search(world.prompts, 3), one.search(world.prompts, 3)
    np.testing.assert_array_equal(whole.token, again.token)
    part = one.search(world.prompts.select(np.array([2])), 3)
    np.testing.assert_array_equal(part.token, whole.select(np.array([2])).token)
    assert one.search(world.prompts, 4).token.tolist() != whole.token.tolist()
    blocks = whole.paths()[:, 0]
    first = {tuple(spans(whole, np.array([b]))[0]) for b in blocks[:4]}
    assert len(first) > 1


def test_text_drawn_at_a_temperature_is_scored_at_it(world: TinySetup, folder: Path) -> None:
    trees = rollout_worker(world, folder, temperature=0.6, think={"block_tokens": 6}).search(
        world.prompts, 1
    )
    text = ragged.row_of(trees.token_start)
    only = replace(trees, forced=trees.forced | (trees.state[text] != SearchTrees.FREE_TEXT))
    zero = np.zeros(len(trees.leaf), np.float32)
    judged = add_step_rewards(ScoredTrees(trees=only, reward=zero, parts={}), world.catalog)
    credits = compute_advantages(judged, LearnerConfig(estimator="sapo"))
    batch = to_tensors(pack(judged, credits, world.tokenizer))
    for heat, close in ((0.6, True), (1.0, False)):
        with torch.no_grad():
            found, _ = choice_logprobs(world.model, batch, world.tokenizer, temperature=heat)
        assert (float((found - batch.behaviour_logprob).abs().max()) < 1e-5) is close


def test_frequencies_of_first_tokens_are_those_of_the_softmax(world: TinySetup) -> None:
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    context = world.prompts.token[: world.prompts.token_start[1]].tolist()
    how = GenerationParams(stop=(4,), limit=1, temperature=1.0)
    texts = engine.generate([context] * 4000, np.arange(4000), how)
    with torch.no_grad():
        expected = world.model(torch.tensor([context])).logits[0, -1].softmax(0).numpy()
    found = np.bincount(texts.token, minlength=len(expected)) / 4000
    assert np.abs(found - expected).max() < 0.03


def script(texts: Sequence[Sequence[int]]) -> tuple[list[list[int]], object]:
    """A writer that writes what it is told, and the contexts that it was given."""
    seen: list[list[int]] = []
    queue = iter(texts)

    def write(
        contexts: Sequence[Sequence[int]], key: np.ndarray, how: GenerationParams
    ) -> Completions:
        assert len(contexts) == len(key)
        seen.extend(list(context) for context in contexts)
        rows = [list(next(queue))[: how.limit] for _ in contexts]
        return Completions(
            token=np.concatenate([np.array(row, np.int32) for row in rows]),
            logprob=np.full(sum(map(len, rows)), -1, np.float32),
            start=ragged.starts(np.array([len(row) for row in rows])),
        )

    return seen, write


def test_a_block_that_never_closes_is_closed_by_force_and_counted(world: TinySetup) -> None:
    tags = world.tokenizer.think
    assert tags is not None
    long, short = [30] * 9, [31, tags.close]
    seen, write = script([short, long, long, short, [tags.close], short])
    prompts = world.prompts.select(np.array([0]))
    thoughts = think(
        write, prompts, tags, count=2, num_blocks=3, block_tokens=5, temperature=1.0, seed=0
    )  # fmt: skip  # pyright: ignore
    assert thoughts.cost.counts["cut_blocks"] == 2
    assert thoughts.cost.counts["malformed_thoughts"] == 0
    blocks = [part.tolist() for part in np.split(thoughts.token, thoughts.token_start[1:-1])]
    cut = [tags.open, *[30] * 5, tags.close]
    assert blocks == [
        [tags.open, *short], cut, [tags.open, tags.close],
        cut, [tags.open, *short], [tags.open, *short],
    ]  # fmt: skip
    forced = [part.tolist() for part in np.split(thoughts.forced, thoughts.token_start[1:-1])]
    assert forced[1] == [True, *[False] * 5, True]
    assert forced[0] == [True, False, False]
    assert (thoughts.logprob == np.where(thoughts.forced, 0, -1)).all()
    # Injected tags are in the context of what follows.
    assert seen[2][-len([*short]) - 2 :] == [tags.open, *short, tags.open]
    assert seen[3][-8:] == [*cut, tags.open]


def test_a_text_that_ends_within_a_block_leaves_too_few_blocks(world: TinySetup) -> None:
    tags = world.tokenizer.think
    assert tags is not None
    done = [tags.close]
    _, write = script([[31, tags.end], done, done, done])
    prompts = world.prompts.select(np.array([0]))
    thoughts = think(
        write, prompts, tags, count=2, num_blocks=3, block_tokens=5, temperature=1.0, seed=0
    )  # fmt: skip  # pyright: ignore
    assert np.diff(thoughts.block_start).tolist() == [1, 3]
    assert thoughts.cost.counts["malformed_thoughts"] == 1
    assert thoughts.token[:4].tolist() == [tags.open, 31, tags.end, tags.close]
    assert thoughts.forced[:4].tolist() == [True, False, False, True]


@pytest.mark.slow
def test_evaluation_thinks_greedily_and_then_searches_the_beam(
    world: TinySetup, folder: Path
) -> None:
    one = rollout_worker(world, folder)
    thoughtful, plain = one.rank(world.prompts, 5, thinking=True), one.rank(world.prompts, 5)
    assert np.diff(thoughtful.start).tolist() == [5, 5, 5]
    assert not np.array_equal(thoughtful.score, plain.score)
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    for row in range(3):
        context = world.prompts.select(np.array([row])).token.tolist()
        for _ in range(3):
            context.append(3)
            for _ in range(6):
                with torch.no_grad():
                    context.append(int(world.model(torch.tensor([context])).logits[0, -1].argmax()))
                if context[-1] in (4, 2):
                    break
            if context[-1] == 2:
                context.append(4)
                break
            if context[-1] != 4:
                context.append(4)
        alone = replace(
            world.prompts.select(np.array([row])),
            token=np.array(context, np.int32),
            token_start=np.array([0, len(context)]),
        )
        expected = beam(engine, alone, width=5)
        np.testing.assert_array_equal(
            expected.leaf, thoughtful.leaf[thoughtful.start[row] : thoughtful.start[row + 1]]
        )


def test_tags_must_be_single_tokens(world: TinySetup) -> None:
    with pytest.raises(DataError, match=f"reads {THINK} as 1 tokens and has none for it"):
        think_tokens(compact_tokenizer(world.catalog))
    with pytest.raises(DataError, match=f"reads {THINK} as 7 tokens and has none for it"):
        think_tokens(tiny_title_tokenizer())


def test_thinking_without_tags_or_room_is_refused(world: TinySetup, folder: Path) -> None:
    mute = replace(world, tokenizer=replace(world.tokenizer, think=None))
    with pytest.raises(EngineError, match="no tags for thinking"):
        rollout_worker(mute, folder).search(world.prompts, 0)
    with pytest.raises(EngineError, match="lower rollout.think.block_tokens"):
        rollout_worker(world, folder, think={"block_tokens": 5000}).search(world.prompts, 0)
