"""A policy on the move: snapshot, digest, restore."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from orchard.errors import CheckpointError

Weights = Mapping[str, np.ndarray]
"""Parameter name (as in the Hugging Face checkpoint) to its float32 values."""


def snapshot(model: nn.Module) -> dict[str, np.ndarray]:
    """A copy of the parameters on the CPU; tied parameters appear once, under their first name.

    Collective where the parameters are sharded over workers.
    """
    return {
        name: _whole(parameter.detach()).to("cpu", torch.float32, copy=True).numpy()
        for name, parameter in model.named_parameters()
    }


def digest(weights: Weights) -> str:
    """SHA-256 over names, shapes and values, independent of the order of the mapping."""
    seal = hashlib.sha256()
    for name in sorted(weights):
        value = np.ascontiguousarray(weights[name])
        seal.update(f"{name}:{value.dtype}:{value.shape};".encode())
        seal.update(value.data)
    return seal.hexdigest()


def restore(model: nn.Module, weights: Weights) -> None:
    """Load a snapshot in place.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())
        raise CheckpointError(
            f"{len(odd)} parameters do not match the model, {odd[0]} among them; "
            "the weights belong to another model"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(weights[name].shape)} where the model has "
                    f"{tuple(parameter.shape)}; the weights belong to another model"
                )
            # Ray hands out read-only buffers; torch wants to own what it reads.
            parameter.copy_(torch.from_numpy(np.array(weights[name])))


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter itself, gathered from all workers where it is sharded."""
    gather = getattr(parameter, "full_tensor", None)
    return gather() if gather is not None else parameter
