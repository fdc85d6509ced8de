"""Take, verify and restore snapshots of model weights."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from orchard.errors import CheckpointError

Weights = Mapping[str, np.ndarray]
"""Float32 values by parameter name, as in the Hugging Face checkpoint."""


def snapshot(model: nn.Module) -> dict[str, np.ndarray]:
    """Copy the parameters to the CPU; tied parameters appear once, under their first name.

    This is a collective operation if the parameters are sharded over workers.
    """
    return {
        name: _unsharded(parameter.detach()).to("cpu", torch.float32, copy=True).numpy()
        for name, parameter in model.named_parameters()
    }


def views(model: nn.Module) -> Weights:
    """Return the parameters of a float32 model on the CPU, without copying them."""
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def digest(weights: Weights) -> str:
    """Return the SHA-256 of names, shapes and values, independent of the order of the mapping."""
    sha256 = hashlib.sha256()
    for name in sorted(weights):
        value = np.ascontiguousarray(weights[name])
        sha256.update(f"{name}:{value.dtype}:{value.shape};".encode())
        sha256.update(value.data)
    return sha256.hexdigest()


def restore(model: nn.Module, weights: Weights) -> None:
    """Load a snapshot into a model in place.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        unmatched = sorted(parameters.keys() ^ weights.keys())
        raise CheckpointError(
            f"{len(unmatched)} parameters do not match the model, {unmatched[0]} among them; "
            "the weights belong to another model"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(weights[name].shape)} where the model has "
                    f"{tuple(parameter.shape)}; the weights belong to another model"
                )
            # Ray returns read-only buffers, which torch does not support; hence the copy.
            parameter.copy_(torch.from_numpy(np.array(weights[name])))


def _unsharded(parameter: torch.Tensor) -> torch.Tensor:
    """Return the parameter, gathered from all workers if it is sharded."""
    gather = getattr(parameter, "full_tensor", None)
    return gather() if gather is not None else parameter
