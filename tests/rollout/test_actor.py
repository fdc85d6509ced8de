"""The actor, with either engine in a process of its own, against the reference engine here."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from orchard.errors import DataError, EngineError, WeightMismatchError
from orchard.policy import weights
from orchard.policy.transfer import digest, pack
from orchard.settings import RolloutConfig
from orchard.testing import TinySetup, tiny_setup
from orchard.types import PolicyVersion, StoredTransfer
from rollout.actor import RolloutWorker
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.probe import LogprobProbe
from rollout.search.beam import beam
from rollout.search.draws import sample
from rollout.search.sampling import beam_sample, dynamic

# More codes at the root than vLLM takes in one list of allowed tokens, and prompts of 1 to 46
# tokens, which end anywhere in its pages of 32.
WIDE = {"level_size": (1100, 2, 3), "num_items": 4000, "lengths": (0, 12, 3, 15, 10, 7)}
CONFIG = RolloutConfig(
    search="sample", group_size=9, temperature=1.3, batch_size=4, threads=1, kv_cache_gib=0.125
)


@pytest.fixture(scope="module")
def wide() -> TinySetup:
    return tiny_setup(**WIDE)


@pytest.fixture
def reference(wide: TinySetup) -> TorchEngine:
    model = copy.deepcopy(wide.model)  # it takes over new weights in place
    return TorchEngine(model, wide.tokenizer, wide.version)


@pytest.fixture(
    scope="module",
    params=[
        "torch",
        pytest.param("worker", marks=[pytest.mark.vllm, pytest.mark.slow]),
        pytest.param("requests", marks=[pytest.mark.vllm, pytest.mark.slow]),
    ],
)
def actor(
    request: pytest.FixtureRequest,
    ray_cluster: None,
    wide: TinySetup,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    folder = wide.save(tmp_path_factory.mktemp("policy"))
    engine = "torch" if request.param == "torch" else "vllm"
    decode = "worker" if request.param == "torch" else request.param
    config = CONFIG.model_copy(update={"engine": engine, "decode": decode})
    remote: Any = ray.remote(RolloutWorker)
    handle = remote.options(num_cpus=1).remote(config, folder, wide.tokenizer, 0)
    yield handle
    ray.kill(handle)


def assert_same(ours: Candidates, reference: Candidates) -> None:
    assert ours.start.tolist() == reference.start.tolist()
    assert ours.leaf.tolist() == reference.leaf.tolist()
    assert np.array_equal(ours.node, reference.node)
    assert np.allclose(ours.logprob, reference.logprob, atol=1e-4)


@pytest.mark.ray
@pytest.mark.parametrize("beams", [1, 7, 40])
def test_ranks_are_those_of_the_reference(
    actor: Any, wide: TinySetup, reference: TorchEngine, beams: int
) -> None:
    ours: Candidates = ray.get(actor.rank.remote(wide.prompts, beams))
    expected = beam(reference, wide.prompts, width=beams)
    assert_same(ours, expected)
    assert ours.cost.prefill_tokens == expected.cost.prefill_tokens
    assert ours.cost.forward_tokens == expected.cost.forward_tokens
    assert ours.cost.seconds > 0


@pytest.mark.ray
def test_trees_are_those_of_the_reference(
    actor: Any, wide: TinySetup, reference: TorchEngine
) -> None:
    trees = ray.get(actor.search.remote(wide.prompts, 3))
    expected = sample(reference, wide.prompts, count=9, temperature=1.3, seed=3)
    assert trees.leaf.tolist() == expected.leaf.tolist()
    assert np.allclose(trees.score, expected.score, atol=1e-4)
    assert trees.catalog == wide.catalog.digest
    assert str(trees.policy) == str(wide.version)


@pytest.mark.ray
def test_new_weights_are_searched_with_once_they_are_verified(
    actor: Any, wide: TinySetup, reference: TorchEngine
) -> None:
    first = weights.snapshot(wide.model)
    new = {name: value[::-1].copy() for name, value in first.items()}
    unlike = PolicyVersion(step=9, digest="0badcafe" * 8)
    with pytest.raises(EngineError, match="arrived where 0badcafe were published; publish them"):
        ray.get(actor.load_weights.remote(unlike, pack(new)))
    assert_same(ray.get(actor.rank.remote(wide.prompts, 5)), beam(reference, wide.prompts, width=5))
    for step, content in ((8, new), (9, first)):
        packed = pack(content)
        version = PolicyVersion(step=step, digest=digest(packed))
        stored = StoredTransfer(digest=version.digest, ref=ray.put(packed))
        assert str(ray.get(actor.load_weights.remote(version, stored))) == str(version)
        reference.load_weights(version, content)
        assert_same(
            ray.get(actor.rank.remote(wide.prompts, 5)), beam(reference, wide.prompts, width=5)
        )
        assert str(ray.get(actor.search.remote(wide.prompts, 0)).policy) == str(version)


@pytest.mark.ray
def test_a_holder_that_computes_something_else_than_the_learner_searches_nothing(
    actor: Any, wide: TinySetup, reference: TorchEngine
) -> None:
    best = [int(each.argmax()) for each in wide.leaf_logprob]
    score = [each[leaf] for each, leaf in zip(wide.leaf_logprob, best, strict=True)]
    right = LogprobProbe(
        prompts=replace(wide.prompts, id=np.arange(len(best))),
        leaf=np.array(best),
        score=np.array(score, np.float32),
        tolerance=1e-4,
    )
    wrong = replace(right, score=right.score + np.float32([0.01, *[0.0] * (len(best) - 1)]))
    values = pack(weights.snapshot(wide.model))
    version = PolicyVersion(step=0, digest=digest(values))
    with pytest.raises(WeightMismatchError, match=r"0\.01 nats from the learner's where 0\.0001"):
        ray.get(actor.load_weights.remote(version, values, wrong))
    for method, argument in (("rank", 5), ("search", 0)):
        with pytest.raises(WeightMismatchError, match="failed its probe here"):
            ray.get(getattr(actor, method).remote(wide.prompts, argument))
    ray.get(actor.load_weights.remote(version, values, right))
    assert_same(ray.get(actor.rank.remote(wide.prompts, 5)), beam(reference, wide.prompts, width=5))


def rollout_worker(world: TinySetup, folder: Path, **options: object) -> RolloutWorker:
    config = CONFIG.model_copy(update={"engine": "torch", **options})
    return RolloutWorker(config, folder, world.tokenizer, 0)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_change_nothing_but_the_work(
    wide: TinySetup, reference: TorchEngine, tmp_path: Path, batch_size: int
) -> None:
    ours = rollout_worker(wide, wide.save(tmp_path), batch_size=batch_size).rank(wide.prompts, 5)
    assert_same(ours, beam(reference, wide.prompts, width=5))


def test_the_configured_beam_grows_trees_of_distinct_leaves(
    wide: TinySetup, tmp_path: Path
) -> None:
    trees = rollout_worker(wide, wide.save(tmp_path), search="beam", group_size=6).search(
        wide.prompts, 0
    )
    assert np.diff(trees.candidate_start).tolist() == [6] * len(wide.prompts)
    for prompt in range(len(wide.prompts)):
        assert len({*trees.leaf[trees.prompt_of_candidate == prompt].tolist()}) == 6


def test_a_folder_without_a_policy_is_named(wide: TinySetup, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no config\.json"):
        rollout_worker(wide, tmp_path)


@pytest.mark.parametrize("search", ["beam", "beam_sample", "sample", "dynamic"])
def test_the_configured_search_grows_the_trees(
    wide: TinySetup, reference: TorchEngine, tmp_path: Path, search: str
) -> None:
    trees = rollout_worker(wide, wide.save(tmp_path), search=search).search(wide.prompts, 3)
    draws = {"temperature": 1.3, "seed": 3}
    expected = {
        "beam": lambda: beam(reference, wide.prompts, width=9),
        "beam_sample": lambda: beam_sample(reference, wide.prompts, width=9, **draws),
        "sample": lambda: sample(reference, wide.prompts, count=9, **draws),
        "dynamic": lambda: dynamic(reference, wide.prompts, wide.catalog, count=9, **draws),
    }[search]()
    assert trees.candidate_start.tolist() == expected.start.tolist()
    assert trees.leaf.tolist() == expected.leaf.tolist()
    assert np.allclose(trees.score, expected.score, atol=1e-5)
