"""The loop of a learner's worker: what it publishes after each job, without a cluster."""

import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from learner import checkpoint
from learner.spec import LearnerSpec, pack_probe
from learner.workers import ray_trainer
from learner.workers.job_queue import Job, Result
from orchard.policy import model, transfer
from orchard.policy.transfer import WeightTransfer
from orchard.policy.weights import Weights
from orchard.settings import (
    ClusterConfig,
    Config,
    DataConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
)
from orchard.testing import tiny_setup
from orchard.types import StoredTransfer, Update


class Queue:
    """Queue that hands out jobs, and keeps the updates it is given as bytes."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs, self.updates = iter(jobs), list[Update]()
        self.told, self.written = list[str](), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(type(self), f"do_{name}").__get__(self))

    def do_get_job(self, number: int, *, saved: int) -> bytes:
        assert number > saved
        return pickle.dumps(next(self.jobs))

    def do_put_result(self, result: Result) -> bytes:
        assert result.number == len(self.updates)
        self.updates.append(result.update)
        return pickle.dumps(None)

    def do_state_copied(self, number: int) -> bytes:
        self.told.append(f"copied {number}")
        return pickle.dumps(None)

    def do_checkpoint_written(self, number: int, reason: str) -> None:
        assert reason == ""
        self.written.set()

    def do_checkpoint_listed(self, number: int) -> bytes:
        self.told.append(f"listed {number}")
        return pickle.dumps(None)


def opened(stored: StoredTransfer) -> Weights:
    packed: WeightTransfer = pickle.loads(stored.ref)
    transfer.check_digest(packed, stored.digest)
    return transfer.unpack(packed, pickle.loads(stored.base_ref) if stored.base_ref else None)


def worked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, form: str, ema: float, save: bool = False
) -> Queue:
    """Run two updates in a worker, the second one without weights to evaluate.

    With `save`, a checkpoint is requested between them and listed at the end.
    """
    tiny = tiny_setup()
    monkeypatch.setattr(ray_trainer.ray, "put", pickle.dumps)
    monkeypatch.setattr(ray_trainer.ray, "get", pickle.loads)
    storage = SimpleNamespace(experiment_fs_path=str(folder / "storage"), storage_filesystem=None)
    alone = SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1, get_storage=lambda: storage
    )
    monkeypatch.setattr(ray_trainer.ray.train, "get_context", lambda: alone)
    monkeypatch.setattr(ray_trainer.ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(ray_trainer, "get_device", lambda: torch.device("cpu"))
    config = Config(
        name="tiny",
        data=DataConfig(path=folder),
        model=ModelConfig(lora=LoraConfig(rank=2)),
        learner=LearnerConfig(lr=1e-2, warmup=0.0, ema_decay=ema, threads=torch.get_num_threads()),
        cluster=ClusterConfig(publish_format=form),  # type: ignore[arg-type]
    )
    spec = LearnerSpec(
        config=config, phase="train", policy=tiny.save(folder), tokenizer=tiny.tokenizer,
        sequences=None, traces=None, tasks=None, total_steps=9, probe=tiny.prompts,
    )  # fmt: skip
    batch = pickle.dumps(pack_probe(spec, tiny.prompts))
    jobs = [Job(kind="update", batch=(batch,), needs_eval=needs) for needs in (True, False)]
    stop = Job(kind="stop", written=1 if save else 0)
    queue = Queue([jobs[0], Job(kind="save"), jobs[1], stop] if save else [*jobs, stop])
    ray_trainer.worker_loop({"spec": spec, "queue": queue, "unlisted": None})
    return queue


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "adapter"])
def test_updates_carry_references_of_what_to_search_evaluate_and_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, ema: float
) -> None:
    whole = worked(tmp_path, monkeypatch, "float32", ema).updates
    updates = worked(tmp_path, monkeypatch, form, ema).updates
    assert [update.policy.step for update in updates] == [0, 1, 2]
    first = model.load(tmp_path).state_dict()
    for update, expected in zip(updates, whole, strict=True):
        assert update.policy.digest == update.weights.digest
        assert isinstance(update.weights.ref, bytes)
        assert update.probe_logprobs is not None
        assert np.array_equal(update.probe_logprobs, expected.probe_logprobs)
        found, right = opened(update.weights), opened(expected.weights)
        assert found.keys() == right.keys() <= first.keys()
        for name, value in right.items():
            rtol = 2**-8 if form == "bfloat16" else 0.0
            np.testing.assert_allclose(found[name], value, rtol=rtol)
    for update, expected in zip(updates[:2], whole, strict=False):
        (version, weights), (_, kept) = update.to_evaluate, update.to_keep
        assert version.digest == weights.digest
        if form != "bfloat16" or ema:
            assert kept is weights
        exact = opened(expected.to_keep[1])
        assert all(np.array_equal(value, exact[name]) for name, value in opened(kept).items())
        assert pickle.loads(update.adapter).keys() == pickle.loads(expected.adapter).keys()
    last = updates[2]
    assert last.adapter is last.eval_weights is last.exact_weights is None
    assert not np.array_equal(opened(updates[0].weights)["model.embed_tokens.weight"],
                              opened(last.weights)["model.embed_tokens.weight"])  # fmt: skip


def test_a_checkpoint_is_of_the_job_it_was_copied_after_whatever_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported, write = list[Any](), checkpoint.write
    learnt = threading.Event()

    def late_write(state: dict[str, Any], folder: Path) -> None:
        assert learnt.wait(60)  # for the next update
        write(state, folder)

    def put_result(queue: Queue, result: Result) -> bytes:
        queue.updates.append(result.update)
        if result.number == 2:
            learnt.set()
            assert queue.written.wait(60)
        return pickle.dumps(None)

    monkeypatch.setattr(checkpoint, "write", late_write)
    monkeypatch.setattr(Queue, "do_put_result", put_result)
    monkeypatch.setattr(
        ray_trainer.ray.train, "report", lambda metrics, **how: reported.append((metrics, how))
    )
    queue = worked(tmp_path, monkeypatch, "float32", 0.5, save=True)
    assert queue.told == ["copied 1", "listed 1"]
    ((metrics, how),) = reported
    folder = tmp_path / "storage" / "job_000001"
    assert (metrics, how["checkpoint"].path) == ({"number": 1}, str(folder))
    assert checkpoint.damage(folder) == ""
    state = torch.load(folder / checkpoint.FILE, weights_only=True)
    assert (state["number"], state["updates"]) == (1, 1)
    # The base of adapters does not move; its codes' rows are trained.
    name = "model.embed_tokens.weight"
    first, last = (opened(update.weights)[name] for update in queue.updates[1:])
    assert not np.array_equal(first, last)
    assert np.array_equal(state["policy"][name].numpy(), first)
