"""Save and restore the full training state, so that a resumed run continues exactly.

The training loop waits for the copy of the state alone; a thread writes it. All randomness is a
function of (seed, job number), so no generator state is saved.
"""

import copy
import json
import logging
import os
import re
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from blake3 import blake3
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from learner.trainer import Trainer
from orchard.errors import CheckpointError
from orchard.folders import atomic_dir
from orchard.optim import continue_schedule

FILE = "learner.pt"
"""Name of the state file in a checkpoint folder."""
ABOUT = "learner.json"
"""Name of the file with the size and the digest of the state file; older checkpoints have none."""
FORMAT = 2
"""Version of the content of the state file; version 1 names neither itself nor the data."""
RECORD = "checkpoint_manager_snapshot.json"
"""File in which Ray Train lists the checkpoints of a storage folder."""


def folder_of(number: int) -> str:
    """Return the name of the folder of the checkpoint after a job."""
    return f"job_{number:06d}"


def snapshot(
    trainer: Trainer, *, number: int, catalog: str, data: str = "", write: bool = True
) -> dict[str, Any]:
    """Copy the state after job `number` into this process's memory; collective under FSDP.

    `catalog` and `data` are the digests of the items and of the training rows. Without `write`,
    nothing is copied. A copy is as large as the policy, its optimizer and its averages together.
    """
    tensors = _tensors(trainer)
    if not write:
        return {}
    return {
        "format": FORMAT,
        "number": number,
        "updates": trainer.updates,
        "catalogue": catalog,
        "data": data,
        "schedule": copy.deepcopy(trainer.schedule.state_dict()),
        **_copied(tensors, {}),
    }


def write(state: Mapping[str, Any], folder: Path) -> None:
    """Write a snapshot as a checkpoint folder, which appears under its name once it is whole.

    Raises:
        OSError: the storage does not take it; nothing of it is left there.
    """
    with atomic_dir(folder) as parts:
        # Through a Python file object: torch's own writer does not report a full disk.
        with (parts / FILE).open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        about = {"format": FORMAT, "bytes": (parts / FILE).stat().st_size, "blake3": _hash(parts)}
        (parts / ABOUT).write_text(json.dumps(about) + "\n")


class Writer:
    """Writer of one checkpoint at a time in a thread of its own."""

    def __init__(self) -> None:
        """Create a writer with nothing to write."""
        self._thread: threading.Thread | None = None

    def start(self, state: Mapping[str, Any], folder: Path, done: Callable[[str], object]) -> None:
        """Write a snapshot, and pass "" or the reason why it cannot be written to `done`."""

        def work() -> None:
            try:
                if not folder.is_dir() or damage(folder):  # else of a group that has ended
                    write(state, folder)
            except OSError as error:
                done(os.strerror(error.errno) if error.errno else str(error))
            except Exception as error:  # the run goes on, whatever it was
                done(" ".join(str(error).split())[:200] or type(error).__name__)
            else:
                done("")

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()


def unwritten(number: int, storage: Path, reason: str, *, whole: int) -> str:
    """Say why the checkpoint of a job cannot be written, and of which job the newest one is."""
    return (
        f"the checkpoint of job {number} cannot be written below {storage}: {reason}; "
        f"the one of job {whole} is whole, make room (docs/runbooks/disk-full.md)"
    )


def damage(folder: Path) -> str:
    """Return what is wrong with the files of a checkpoint; "" if they are as they were written."""
    path = folder / FILE
    if not path.is_file():
        return f"it holds no {FILE}"
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        size, digest = int(about["bytes"]), str(about["blake3"])
    except FileNotFoundError:  # of an earlier version
        return "" if zipfile.is_zipfile(path) else f"its {FILE} is cut short or no checkpoint"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {ABOUT} cannot be read ({error})"
    if (found := path.stat().st_size) != size:
        return f"its {FILE} has {found:,} of {size:,} bytes"
    return "" if _hash(folder) == digest else f"its {FILE} has changed since it was written"


def newest_complete(storage: Path) -> Path | None:
    """Return the newest checkpoint folder whose files are as they were written, or None."""
    folders = sorted(storage.glob("job_*"), reverse=True)
    return next((folder for folder in folders if not damage(folder)), None)


def recover(storage: Path) -> Path | None:
    """Check the newest checkpoint of a storage; return the one to start from in its place, if any.

    Ray Train keeps the list of checkpoints in one file, which it writes in place. Where that file
    is unreadable, or the newest checkpoint that it lists is damaged, the list is removed and the
    newest whole checkpoint is returned; the steps after it are run again.

    Raises:
        CheckpointError: checkpoints were listed, and none of them is whole.
    """
    try:
        text = (storage / RECORD).read_text(errors="replace")
    except FileNotFoundError:  # of a run in one process, or killed before its first list
        return newest_complete(storage)
    listed = sorted(set(re.findall(r"job_\d{6}", text)))
    reason = damage(storage / listed[-1]) if listed else ""
    try:
        json.loads(text)
        if not reason:
            return None
    except ValueError:
        reason = reason or "the list of checkpoints cannot be read"
    whole = newest_complete(storage)
    if whole is None and listed:
        raise CheckpointError(
            f"none of the checkpoints in {storage} is whole ({listed[-1]}: {reason}); restore the "
            "folder from a copy, remove it to restart this phase, or take another run name"
        )
    if whole is not None:
        logging.getLogger("orchard").warning(
            "the newest checkpoint in %s cannot be used: %s; the run continues from %s",
            storage, reason, whole.name,
        )  # fmt: skip
    for folder in storage.glob("job_*"):
        if whole is None or folder.name > whole.name:
            folder.rename(folder.with_name(f"damaged_{folder.name}"))
    (storage / RECORD).unlink()
    return whole


def load(trainer: Trainer, folder: Path, *, catalog: str, data: str = "") -> int:
    """Restore the state in place and return the number of the last job done.

    The learning rate goes on in the schedule of `trainer`, whatever the length of the saved one.

    Raises:
        CheckpointError: the file is missing or unreadable, was written by another version, or was
            made with another catalog, other training rows or another model.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {FILE}; remove the folder to start over")
    try:
        state: dict[str, Any] = torch.load(path, map_location=trainer.device, weights_only=True)
        version = int(state.get("format", 1))
    except Exception as error:  # whatever a reader says to bytes that are no checkpoint
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({' '.join(str(error).split())[:200]}): it is "
            "damaged or no checkpoint; restore it from a copy, or remove its folder"
        ) from error
    missing = {"number", "updates", "catalogue", "schedule", "policy", "optimizer"} - state.keys()
    if version > FORMAT or missing:
        found = f"has format {version}, this one reads up to {FORMAT}"
        found = f"lacks {', '.join(sorted(missing))}" if missing else found
        raise CheckpointError(
            f"checkpoint {folder} was written by another version of Orchard: it {found}; continue "
            "with that version, or choose another run name and set model.path to the run's policy"
        )
    if data and state.get("data") and state["data"] != data:
        raise CheckpointError(
            f"checkpoint {folder} was made with training rows {state['data'][:12]}, the run has "
            f"{data[:12]}; restore the training files or choose another run name"
        )
    if state["catalogue"] != catalog:
        raise CheckpointError(
            f"checkpoint {folder} was made with catalog {state['catalogue'][:12]}, the run has "
            f"{catalog[:12]}; restore the items file or choose another run name"
        )
    try:
        _restore(trainer, state)
        continue_schedule(trainer.schedule, state["schedule"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {folder} does not fit the model of this run: {error}; restore the "
            "settings that it was made with, or choose another run name"
        ) from error
    trainer.updates = int(state["updates"])
    return int(state["number"])


def _hash(folder: Path) -> str:
    """Return the BLAKE3 digest of the state file of a folder."""
    hasher = blake3(max_threads=blake3.AUTO)
    return hasher.update_mmap(folder / FILE).hexdigest()


def _is_sharded(trainer: Trainer) -> bool:
    """Check whether the parameters are sharded over the ranks (FSDP)."""
    return trainer.world > 1 and not isinstance(trainer.scorer, DistributedDataParallel)


def _tensors(trainer: Trainer) -> dict[str, Any]:
    """Collect the state of the policy, the optimizer and the copies, unsharded."""
    if not _is_sharded(trainer):
        return {
            "policy": trainer.policy.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "copies": {name: held.policy.state_dict() for name, held in trainer.copies.items()},
        }
    from torch.distributed.checkpoint import state_dict as sharded

    full = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    policy, optimizer = sharded.get_state_dict(trainer.scorer, trainer.optimizer, options=full)
    copies = {
        name: sharded.get_model_state_dict(held, options=full)
        for name, held in trainer.copies.items()
    }
    return {"policy": policy, "optimizer": optimizer, "copies": copies}


def _copied(value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    """Copy nested tensors into host memory; tensors that share memory still do."""
    if isinstance(value, Tensor):
        if not value.numel():
            return value.detach().cpu().clone()
        memory = value.untyped_storage()
        if memory.data_ptr() not in storages:
            storages[memory.data_ptr()] = memory.cpu() if value.is_cuda else memory.clone()
        empty = torch.empty(0, dtype=value.dtype)
        shape = value.storage_offset(), value.size(), value.stride()
        return empty.set_(storages[memory.data_ptr()], *shape)
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {name: _copied(part, storages) for name, part in items}
    if isinstance(value, list | tuple):
        parts = [_copied(part, storages) for part in cast(Sequence[Any], value)]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def _restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Load the tensors of `_tensors` back into the trainer."""
    if not _is_sharded(trainer):
        trainer.policy.load_state_dict(state["policy"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        for name, copy in trainer.copies.items():
            copy.policy.load_state_dict(state["copies"][name])
        return
    from torch.distributed.checkpoint import state_dict as sharded

    full = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    sharded.set_state_dict(
        trainer.scorer,
        cast(Any, trainer.optimizer),
        model_state_dict=state["policy"],
        optim_state_dict=state["optimizer"],
        options=full,
    )
    for name, copy in trainer.copies.items():
        sharded.set_model_state_dict(copy, state["copies"][name], options=full)
