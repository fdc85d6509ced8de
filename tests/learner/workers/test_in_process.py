"""The learner in the driver's process: jobs, checkpoints, and what stays of an earlier group."""

import asyncio
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from learner import checkpoint
from learner.spec import LearnerSpec, pack_probe
from learner.workers.in_process import InProcessTrainer
from orchard.errors import CheckpointError
from orchard.policy import transfer
from orchard.settings import CheckpointConfig, Config, DataConfig, LearnerConfig
from orchard.testing import tiny_setup
from orchard.types import TrainBatch, Update


@pytest.fixture
def spec(tmp_path: Path) -> LearnerSpec:
    tiny = tiny_setup()
    config = Config(
        name="tiny", data=DataConfig(path=tmp_path), checkpoint=CheckpointConfig(keep=2),
        learner=LearnerConfig(lr=1e-2, warmup=0.0, threads=torch.get_num_threads()),
    )  # fmt: skip
    return LearnerSpec(
        config=config, phase="train", policy=tiny.save(tmp_path / "policy"),
        tokenizer=tiny.tokenizer, sequences=None, traces=None, tasks=None, total_steps=9,
        probe=tiny.prompts,
    )  # fmt: skip


def batch_of(spec: LearnerSpec) -> TrainBatch:
    assert spec.probe is not None
    return pack_probe(spec, spec.probe)


async def made(learner: InProcessTrainer, batch: TrainBatch, number: int) -> list[Update]:
    """Start, then update so many times, with a checkpoint of each update."""
    updates = [await learner.start()]
    for _ in range(number):
        updates.append(await learner.update(batch))
        await learner.save()
    return updates


def test_what_is_published_stays_as_it_was(spec: LearnerSpec, tmp_path: Path) -> None:
    learner = InProcessTrainer(spec, storage=tmp_path, written=lambda number: None)
    updates = asyncio.run(made(learner, batch_of(spec), 2))
    assert [update.policy.step for update in updates] == [0, 1, 2]
    assert len({update.policy.digest for update in updates}) == 3
    for update in updates:
        assert transfer.digest(update.weights.ref) == update.policy.digest
    assert asyncio.run(learner.again(2)) is updates[-1]


def test_a_learner_goes_on_from_the_newest_whole_checkpoint(
    spec: LearnerSpec, tmp_path: Path
) -> None:
    batch, written = batch_of(spec), list[int]()
    whole = asyncio.run(
        made(InProcessTrainer(spec, storage=tmp_path / "whole", written=written.append), batch, 4)
    )
    assert written == [1, 2, 3, 4]
    parts = InProcessTrainer(spec, storage=tmp_path / "parts", written=written.append)
    asyncio.run(made(parts, batch, 3))
    asyncio.run(parts.close())
    folder = tmp_path / "parts" / "learner-train"
    assert sorted(path.name for path in folder.iterdir()) == ["job_000002", "job_000003"]
    (folder / "job_000003" / checkpoint.FILE).write_bytes(b"cut short")
    (folder / checkpoint.RECORD).write_text('["job_000001"]')  # of a group on Ray before it
    again = InProcessTrainer(spec, storage=tmp_path / "parts", written=written.append)
    updates = asyncio.run(made(again, batch, 2))
    assert [update.policy for update in updates] == [update.policy for update in whole[2:]]
    assert not (folder / checkpoint.RECORD).exists()
    for update, expected in zip(updates, whole[2:], strict=True):
        assert update.probe_logprobs is not None
        assert np.array_equal(update.probe_logprobs, expected.probe_logprobs)


def test_a_full_disk_is_a_warning_until_the_end(
    spec: LearnerSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(state: object, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    learner = InProcessTrainer(spec, storage=tmp_path, written=lambda number: None)
    with caplog.at_level(logging.WARNING, "orchard"):
        asyncio.run(made(learner, batch_of(spec), 1))
    assert "checkpoint of job 1 cannot be written" in caplog.text
    assert "No space left on device" in caplog.text
    with pytest.raises(CheckpointError, match="the same command resumes"):
        asyncio.run(learner.close(save=True))
