"""Save and restore the full training state, so that a resumed run continues exactly.

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
"""Name of the state file in a checkpoint folder."""
RECORD = "checkpoint_manager_snapshot.json"
"""File in which Ray Train lists the checkpoints of a storage folder."""
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
"""Error numbers of a storage that cannot take a checkpoint; a retry does not help."""


def folder_of(number: int) -> str:
    """Return the name of the folder of the checkpoint after a job."""
    return f"job_{number:06d}"


def save(trainer: Trainer, folder: Path, *, number: int, catalog: str, write: bool) -> None:
    """Write the state after job `number`; collective under FSDP, writes only with `write`."""
    state = {
        "number": number,
        "updates": trainer.updates,
        "catalogue": catalog,
        "schedule": trainer.schedule.state_dict(),
        **_tensors(trainer),
    }
    if write:
        # Through a Python file object: torch's own writer does not report a full disk.
        with (folder / FILE).open("wb") as file:
            torch.save(state, file)


def newest_complete(storage: Path) -> Path | None:
    """Return the newest checkpoint folder whose file is complete, or None.

    This recovers a storage whose record is damaged: Ray Train keeps the list of checkpoints in one
    file, which it writes in place.
    """
    complete = (folder for folder in storage.glob("job_*") if zipfile.is_zipfile(folder / FILE))
    return max(complete, default=None)


def is_incomplete(storage: Path) -> bool:
    """Check whether the record of checkpoints is unreadable, as after a crash or a full disk."""
    try:
        json.loads((storage / RECORD).read_text())
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False


def load(trainer: Trainer, folder: Path, *, catalog: str) -> int:
    """Restore the state in place and return the number of the last job done.

    Raises:
        CheckpointError: the file is missing, or was made with another catalog or model.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {FILE}; remove the folder to start anew")
    state = torch.load(path, map_location=trainer.device, weights_only=True)
    if state["catalogue"] != catalog:
        raise CheckpointError(
            f"checkpoint {folder} was made with catalog {state['catalogue'][:12]}, the run has "
            f"{catalog[:12]}; restore the items file or choose another run name"
        )
    try:
        _restore(trainer, state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {folder} does not fit the model of this run: {error}; restore the "
            "settings that it was made with, or choose another run name"
        ) from error
    trainer.schedule.load_state_dict(state["schedule"])
    trainer.updates = int(state["updates"])
    return int(state["number"])


def _is_sharded(trainer: Trainer) -> bool:
    """Check whether the parameters are sharded over the ranks (FSDP)."""
    return trainer.world > 1 and not isinstance(trainer.scorer, DistributedDataParallel)


def _tensors(trainer: Trainer) -> dict[str, Any]:
    """Collect the state of the policy, the optimizer and the copies, unsharded."""
    if not _is_sharded(trainer):
        return {
            "policy": trainer.policy.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "copies": {name: copy.policy.state_dict() for name, copy in trainer.copies.items()},
        }
    from torch.distributed.checkpoint import state_dict as sharded

    full = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    policy, optimizer = sharded.get_state_dict(trainer.scorer, trainer.optimizer, options=full)
    copies = {
        name: sharded.get_model_state_dict(copy, options=full)
        for name, copy in trainer.copies.items()
    }
    return {"policy": policy, "optimizer": optimizer, "copies": copies}


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
