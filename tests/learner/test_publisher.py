"""Publishing: what a version is stored as, and that every format says the same weights."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.batch.sft import pack_examples
from learner.publisher import ObjectStore, Publisher
from learner.trainer import Trainer
from orchard.data.sft_tasks import SftExamples
from orchard.policy import lora, transfer, value_head
from orchard.policy.transfer import TransferFormat, WeightTransfer
from orchard.policy.weights import Weights, snapshot
from orchard.settings import LearnerConfig, LoraConfig, RolloutConfig
from orchard.testing import tiny_setup
from orchard.types import PolicyVersion, StoredTransfer
from rollout.actor import RolloutWorker

ON = LoraConfig(rank=3, targets=("q_proj", "down_proj"))


class Store:
    """Object store that copies what it is given, as a process of its own would."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        """Bytes of each stored value."""

    def put(self, value: object) -> bytes:
        stored = pickle.dumps(value)
        self.sizes.append(len(stored))
        return stored

    def functions(self) -> ObjectStore:
        return ObjectStore(put=self.put, get=pickle.loads)


def opened(stored: StoredTransfer | None) -> Weights:
    """Weights of a stored transfer, after its digest was checked."""
    assert stored is not None
    packed: WeightTransfer = pickle.loads(stored.ref)
    transfer.check_digest(packed, stored.digest)
    return transfer.unpack(packed, pickle.loads(stored.base_ref) if stored.base_ref else None)


def taught(format: TransferFormat, store: Store, *, updates: int = 3) -> tuple[Trainer, list[Any]]:
    """Train adapters, embeddings and a value head; return the trainer and what was published."""
    tiny = tiny_setup()
    lora.attach(tiny.model, ON, seed=0)
    value_head.attach(tiny.model, seed=0)
    publisher = Publisher(tiny.model, format, store.functions(), writes=True)
    config = LearnerConfig(lr=1e-2, logprob="full")
    trainer = Trainer(tiny.model, tiny.tokenizer, config, total_steps=9, ema_decay=0.5)
    prompts = tiny.tokenizer.encode_history(np.arange(4, 10), np.array([0, 1, 3, 4, 6]))
    no_text = np.zeros(0, np.int32), np.zeros(5, np.int64)
    examples = SftExamples(prompt=prompts, answer=no_text, target=np.arange(4))
    version = PolicyVersion(step=0, digest="")
    batch = pack_examples(examples, tiny.tokenizer, version, forced=True)
    published: list[Any] = [publisher.publish(trainer.policy)]
    for _ in range(updates):
        trainer.sft_step(batch)
        published.append(publisher.publish(trainer.policy))
    return trainer, [*published, publisher.publish(trainer.eval_policy, exact=True)]


@pytest.mark.parametrize("format", ["float32", "adapter"])
def test_what_arrives_is_the_merged_policy_bit_for_bit(format: TransferFormat) -> None:
    trainer, published = taught(format, Store())
    for model, stored in ((trainer.policy, published[-2]), (trainer.eval_policy, published[-1])):
        arrived, expected = opened(stored), lora.snapshot(model)
        assert arrived.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(arrived[name].view(np.uint32), value.view(np.uint32))
    versions = {stored.digest for stored in published}
    assert len(versions) == len(published)


def test_a_version_is_not_changed_by_the_updates_after_it() -> None:
    first = taught("float32", Store(), updates=0)[1][0]
    later = taught("float32", Store())[1][0]
    assert first.digest == later.digest
    assert all(np.array_equal(opened(first)[n], value) for n, value in opened(later).items())


def test_rounded_versions_are_kept_exact_beside() -> None:
    store = Store()
    trainer, published = taught("bfloat16", store)
    expected = lora.snapshot(trainer.policy)
    rounded, exact = opened(published[-2]), opened(published[-1])
    assert all(np.array_equal(value, lora.snapshot(trainer.eval_policy)[n])
               for n, value in exact.items())  # fmt: skip
    assert any(not np.array_equal(rounded[name], value) for name, value in expected.items())
    for name, value in expected.items():
        np.testing.assert_allclose(rounded[name], value, rtol=2**-8)
    assert store.sizes[0] < 0.6 * store.sizes[-1]


def test_a_rank_that_does_not_write_stores_nothing() -> None:
    for format in ("float32", "adapter"):
        store, tiny = Store(), tiny_setup()
        lora.attach(tiny.model, ON, seed=0)
        publisher = Publisher(tiny.model, format, store.functions(), writes=False)
        assert publisher.publish(tiny.model) is None
        assert publisher.store({"a": 1}) is None
        assert store.sizes == []


@pytest.fixture
def make_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], RolloutWorker]:
    """Return a function that starts a holder, which reads what a `Store` has."""
    monkeypatch.setattr("rollout.actor.ray.get", pickle.loads)
    tiny = tiny_setup()
    folder, config = tiny.save(tmp_path), RolloutConfig(engine="torch")
    return lambda: RolloutWorker(config, folder, tiny.tokenizer, 0)


def loaded(holder: RolloutWorker) -> Weights:
    """Weights that a holder searches with."""
    return snapshot(holder._engine._model)  # pyright: ignore


def send(holder: RolloutWorker, stored: StoredTransfer) -> None:
    """Load a stored version into a holder."""
    holder.load_weights(PolicyVersion(step=1, digest=stored.digest), stored)


@pytest.mark.slow
def test_a_hundred_versions_by_adapters_leave_the_holder_where_one_whole_one_does(
    make_holder: Callable[[], RolloutWorker],
) -> None:
    store = Store()
    _, published = taught("adapter", store, updates=100)
    whole = taught("float32", Store(), updates=100)[1]
    holder, late, plain = (make_holder() for _ in range(3))
    for stored in published[:-1]:
        send(holder, stored)
    send(late, published[-2])  # the first that it gets
    send(plain, whole[-2])
    expected = loaded(plain)
    for one in (holder, late):
        found = loaded(one)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_a_holder_of_another_base_says_so_and_takes_the_whole_base(
    make_holder: Callable[[], RolloutWorker], caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    _, published = taught("adapter", store)
    holder = make_holder()
    send(holder, published[-2])
    expected = loaded(holder)
    other = WeightTransfer(tensors={n: value + 1 for n, value in expected.items()})
    adapters = pickle.loads(published[-2].ref).adapters
    packed = WeightTransfer(tensors={}, adapters=adapters, base=transfer.digest(other))
    stored = StoredTransfer(digest=transfer.digest(packed), ref=store.put(packed))
    message = "arrived where base .* is held; publish the full weights"
    with pytest.raises(transfer.BaseMismatchError, match=message):
        send(holder, stored)
    assert all(np.array_equal(loaded(holder)[n], value) for n, value in expected.items())
    send(holder, StoredTransfer(digest=stored.digest, ref=stored.ref, base_ref=store.put(other)))
    assert "its full weights follow" in caplog.text
    for name, value in transfer.unpack(packed, other).items():
        np.testing.assert_array_equal(loaded(holder)[name], value)
    send(holder, published[-2])  # and back
    assert all(np.array_equal(loaded(holder)[n], value) for n, value in expected.items())
