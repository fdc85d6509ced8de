"""The full training state, so that a resumed run continues as if it had not stopped.

All randomness is a function of (seed, job number), so no generator state is saved.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from learner.step import Learner
from orchard.errors import CheckpointError

FILE = "learner.pt"


def save(learner: Learner, folder: Path, *, number: int, catalogue: str, write: bool) -> None:
    """Write the state after job `number`; collective under FSDP, only `write` touches the disk."""
    state = {
        "number": number,
        "updates": learner.updates,
        "catalogue": catalogue,
        "schedule": learner.schedule.state_dict(),
        **_tensors(learner),
    }
    if write:
        torch.save(state, folder / FILE)


def load(learner: Learner, folder: Path, *, catalogue: str) -> int:
    """Restore in place; returns the number of the last job done.

    Raises:
        CheckpointError: the file is missing, or was made with another catalogue or model.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {FILE}; remove the folder to start anew")
    state = torch.load(path, map_location=learner.device, weights_only=True)
    if state["catalogue"] != catalogue:
        raise CheckpointError(
            f"checkpoint {folder} was made with catalogue {state['catalogue'][:12]}, the run has "
            f"{catalogue[:12]}; restore the items file or choose another run name"
        )
    try:
        _restore(learner, state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {folder} does not fit the model of this run: {error}"
        ) from error
    learner.schedule.load_state_dict(state["schedule"])
    learner.updates = int(state["updates"])
    return int(state["number"])


def _sharded(learner: Learner) -> bool:
    return learner.world > 1 and not isinstance(learner.scorer, DistributedDataParallel)


def _tensors(learner: Learner) -> dict[str, Any]:
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


def _restore(learner: Learner, state: dict[str, Any]) -> None:
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
