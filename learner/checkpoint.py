"""The full training state, so that a resumed run continues as if it had not stopped.

All randomness is a function of (seed, job number), so no generator state is saved.
"""

import errno
import json
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from learner.trainer import Trainer
from orchard.errors import CheckpointError

FILE = "learner.pt"
RECORD = "checkpoint_manager_snapshot.json"
"""Where Ray Train lists the checkpoints of a storage folder."""
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
"""What a storage answers that will not take a checkpoint, however often it is asked."""


def folder_of(number: int) -> str:
    """Name of the folder of the checkpoint after a job."""
    return f"job_{number:06d}"


def save(learner: Trainer, folder: Path, *, number: int, catalog: str, write: bool) -> None:
    """Write the state after job `number`; collective under FSDP, only `write` touches the disk."""
    state = {
        "number": number,
        "updates": learner.updates,
        "catalogue": catalog,
        "schedule": learner.schedule.state_dict(),
        **_tensors(learner),
    }
    if write:
        # Through a file of Python's own: torch's writer says nothing of a disk that is full.
        with (folder / FILE).open("wb") as file:
            torch.save(state, file)


def newest_whole(storage: Path) -> Path | None:
    """The newest checkpoint folder whose file was written to its end; None where there is none.

    For a storage whose record was torn: Ray Train keeps the list of checkpoints in one file, which
    it writes in place.
    """
    whole = (folder for folder in storage.glob("job_*") if zipfile.is_zipfile(folder / FILE))
    return max(whole, default=None)


def torn(storage: Path) -> bool:
    """If the record of checkpoints cannot be read, as a crash or a full disk may leave it."""
    try:
        json.loads((storage / RECORD).read_text())
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False


def load(learner: Trainer, folder: Path, *, catalog: str) -> int:
    """Restore in place; returns the number of the last job done.

    Raises:
        CheckpointError: the file is missing, or was made with another catalog or model.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {FILE}; remove the folder to start anew")
    state = torch.load(path, map_location=learner.device, weights_only=True)
    if state["catalogue"] != catalog:
        raise CheckpointError(
            f"checkpoint {folder} was made with catalog {state['catalogue'][:12]}, the run has "
            f"{catalog[:12]}; restore the items file or choose another run name"
        )
    try:
        _restore(learner, state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {folder} does not fit the model of this run: {error}; restore the "
            "settings that it was made with, or choose another run name"
        ) from error
    learner.schedule.load_state_dict(state["schedule"])
    learner.updates = int(state["updates"])
    return int(state["number"])


def _sharded(learner: Trainer) -> bool:
    return learner.world > 1 and not isinstance(learner.scorer, DistributedDataParallel)


def _tensors(learner: Trainer) -> dict[str, Any]:
    if not _sharded(learner):
        return {
            "policy": learner.policy.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "copies": {name: one.policy.state_dict() for name, one in learner.copies.items()},
        }
    from torch.distributed.checkpoint import state_dict as sharded

    whole = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    policy, optimizer = sharded.get_state_dict(learner.scorer, learner.optimizer, options=whole)
    copies = {
        name: sharded.get_model_state_dict(one, options=whole)
        for name, one in learner.copies.items()
    }
    return {"policy": policy, "optimizer": optimizer, "copies": copies}


def _restore(learner: Trainer, state: dict[str, Any]) -> None:
    if not _sharded(learner):
        learner.policy.load_state_dict(state["policy"])
        learner.optimizer.load_state_dict(state["optimizer"])
        for name, one in learner.copies.items():
            one.policy.load_state_dict(state["copies"][name])
        return
    from torch.distributed.checkpoint import state_dict as sharded

    whole = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    sharded.set_state_dict(
        learner.scorer,
        cast(Any, learner.optimizer),
        model_state_dict=state["policy"],
        optim_state_dict=state["optimizer"],
        options=whole,
    )
    for name, one in learner.copies.items():
        sharded.set_model_state_dict(one, state["copies"][name], options=whole)
