"""Checkpoints of the learner: resumption, refusals and recovery."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from learner import checkpoint
from learner.trainer import Trainer
from orchard.errors import CheckpointError
from orchard.policy.weights import digest, snapshot
from orchard.testing import tiny_catalog, tiny_policy, tiny_prompts
from tests.fixtures.trainers import (
    BRISK,
    ITEMS,
    batch,
    make_trainer,
    replace_settings,
    save_checkpoint,
    windows,
)


@pytest.mark.slow
def test_a_resumed_learner_continues_bit_for_bit(tmp_path: Path) -> None:
    prompts = [tiny_prompts(ITEMS, [1, 4, 2], seed=seed) for seed in range(6)]
    straight = make_trainer()
    for group in prompts:
        straight.rl_step(batch(straight, group))

    first = make_trainer()
    for group in prompts[:3]:
        first.rl_step(batch(first, group))
    save_checkpoint(first, tmp_path, number=3, catalog=ITEMS.digest)
    second = make_trainer()
    assert checkpoint.load(second, tmp_path, catalog=ITEMS.digest) == 3
    for group in prompts[3:]:
        second.rl_step(batch(second, group))
    assert digest(snapshot(second.policy)) == digest(snapshot(straight.policy))
    assert second.updates == straight.updates


def test_a_checkpoint_of_another_catalog_or_model_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer()
    save_checkpoint(trainer, tmp_path, number=1, catalog=ITEMS.digest)
    with pytest.raises(CheckpointError, match="another"):
        checkpoint.load(trainer, tmp_path, catalog=replace(ITEMS, digest="0" * 64).digest)
    other = tiny_catalog(level_size=(5, 4, 9), num_items=40)
    model, tokenizer = tiny_policy(other)
    stranger = Trainer(model, tokenizer, BRISK, total_steps=1)
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.load(stranger, tmp_path, catalog=ITEMS.digest)
    with pytest.raises(CheckpointError, match=r"holds no learner\.pt"):
        checkpoint.load(trainer, tmp_path / "empty", catalog=ITEMS.digest)


@pytest.mark.slow
def test_an_extended_run_follows_the_rates_of_a_run_of_the_new_length(tmp_path: Path) -> None:
    config = replace_settings(BRISK, warmup=0.1, final_lr=0.1)

    def rates(trainer: Trainer, updates: int) -> list[float]:
        return [trainer.sft_step(windows())["lr"] for _ in range(updates)]

    short, long = make_trainer(config, total_steps=4), make_trainer(config, total_steps=12)
    expected = rates(long, 12)
    assert rates(short, 4)[-1] < expected[3]
    save_checkpoint(short, tmp_path, number=4, catalog=ITEMS.digest)
    extended = make_trainer(config, total_steps=12)
    checkpoint.load(extended, tmp_path, catalog=ITEMS.digest)
    assert rates(extended, 8) == expected[4:]


def test_a_checkpoint_that_is_cut_short_is_refused_in_a_sentence(tmp_path: Path) -> None:
    trainer, file = make_trainer(), tmp_path / checkpoint.FILE
    save_checkpoint(trainer, tmp_path, number=1, catalog=ITEMS.digest)
    assert checkpoint.damage(tmp_path) == ""
    whole = file.read_bytes()
    for content, reason in (
        (whole[: len(whole) // 2], "bytes"),
        (b"", "0 of"),
        (whole[:900] + b"zorg" + whole[904:], "has changed since it was written"),
    ):
        file.write_bytes(content)
        assert reason in checkpoint.damage(tmp_path)
    for content in (whole[: len(whole) // 2], b"", b"\x80", b"no checkpoint at all"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read .* restore it from a copy"):
            checkpoint.load(trainer, tmp_path, catalog=ITEMS.digest)


def test_a_checkpoint_of_another_version_is_refused_in_a_sentence(tmp_path: Path) -> None:
    trainer, file = make_trainer(), tmp_path / checkpoint.FILE
    save_checkpoint(trainer, tmp_path, number=1, catalog=ITEMS.digest, data="1" * 64)
    state = torch.load(file, weights_only=True)

    def changed(**values: object) -> None:
        new = {**state, **values}
        torch.save({name: value for name, value in new.items() if value is not None}, file)

    changed(format=99)
    with pytest.raises(CheckpointError, match="another version of Orchard: it has format 99"):
        checkpoint.load(trainer, tmp_path, catalog=ITEMS.digest)
    changed(optimizer=None, updates=None)
    with pytest.raises(CheckpointError, match="it lacks optimizer, updates"):
        checkpoint.load(trainer, tmp_path, catalog=ITEMS.digest)
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(trainer, tmp_path, catalog=ITEMS.digest)
    changed(format=None, data=None)  # as it was before it named either
    assert checkpoint.load(trainer, tmp_path, catalog=ITEMS.digest, data="2" * 64) == 1
    changed()
    with pytest.raises(CheckpointError, match="was made with training rows 111111111111"):
        checkpoint.load(trainer, tmp_path, catalog=ITEMS.digest, data="2" * 64)


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    trainer, record = make_trainer(), tmp_path / checkpoint.RECORD
    assert checkpoint.recover(tmp_path) is None
    for number in (2, 4):
        folder = tmp_path / checkpoint.folder_of(number)
        folder.mkdir()
        save_checkpoint(trainer, folder, number=number, catalog=ITEMS.digest)
    # Without a list, as after a run in one process.
    assert checkpoint.recover(tmp_path) == tmp_path / "job_000004"
    listed = json.dumps({"checkpoint_results": ["job_000002", "job_000004"]})
    record.write_text(listed)
    assert checkpoint.recover(tmp_path) is None
    assert record.is_file()
    record.write_text(listed[:40])
    assert checkpoint.recover(tmp_path) == tmp_path / "job_000004"
    assert not record.exists()
    record.write_text(listed)
    newest = tmp_path / "job_000004" / checkpoint.FILE
    newest.write_bytes(newest.read_bytes()[:-1])
    assert checkpoint.recover(tmp_path) == tmp_path / "job_000002"
    assert (tmp_path / "damaged_job_000004").is_dir()
    record.write_text(listed)
    (tmp_path / "job_000002" / checkpoint.FILE).unlink()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* holds no learner\.pt"):
        checkpoint.recover(tmp_path)
    assert record.is_file()


@pytest.mark.slow
def test_a_copy_stays_as_it_was_and_what_shares_memory_still_does(tmp_path: Path) -> None:
    trainer, twin = make_trainer(), make_trainer()
    group = tiny_prompts(ITEMS, [1, 4, 2])
    for each in (trainer, twin):
        each.rl_step(batch(each, group))
    state = checkpoint.snapshot(trainer, number=1, catalog=ITEMS.digest)
    trainer.rl_step(batch(trainer, group))  # goes on while the copy is written
    checkpoint.write(state, tmp_path / "early")
    save_checkpoint(twin, tmp_path / "late", number=1, catalog=ITEMS.digest)
    early, late = (
        torch.load(tmp_path / name / checkpoint.FILE, weights_only=True)
        for name in ("early", "late")
    )
    same = tree_map(
        lambda a, b: torch.equal(a, b) if isinstance(a, Tensor) else a == b, early, late
    )
    assert all(tree_leaves(same))
    tensors = [value for value in tree_leaves(state) if isinstance(value, Tensor)]
    trained = [
        value for value in tree_leaves(checkpoint._tensors(trainer)) if isinstance(value, Tensor)
    ]
    count = [
        len({value.untyped_storage().data_ptr() for value in each}) for each in (tensors, trained)
    ]
    assert count[0] == count[1]
    assert checkpoint.snapshot(trainer, number=1, catalog=ITEMS.digest, write=False) == {}


def test_a_storage_that_refuses_leaves_nothing_behind_and_gives_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = checkpoint.snapshot(make_trainer(), number=1, catalog=ITEMS.digest)
    reasons, writer, folder = list[str](), checkpoint.Writer(), tmp_path / "storage" / "job_000001"
    save = torch.save

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    writer.start(state, folder, reasons.append)
    writer.join()
    assert reasons == ["No space left on device"]
    assert list(folder.parent.iterdir()) == []
    monkeypatch.setattr(torch, "save", save)
    folder.mkdir()
    (folder / checkpoint.FILE).write_bytes(b"of a worker that was killed")
    for _ in range(2):  # the second time it is there
        writer.start(state, folder, reasons.append)
        writer.join()
    assert reasons[1:] == ["", ""]
    assert checkpoint.damage(folder) == ""
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
