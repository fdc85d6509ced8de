"""Take, verify and restore snapshots of model weights."""

import hashlib
from collections.abc import Collection, Mapping

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


def current(model: nn.Module, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Return parameters like `snapshot`, those of `names` alone where it is given, uncopied.

    Float32 parameters on the CPU share the memory of the model, and change with it.
    """
    return {
        name: _unsharded(parameter.detach()).to("cpu", torch.float32).numpy()
        for name, parameter in model.named_parameters()
        if names is None or name in names
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


def restore(model: nn.Module, weights: Weights, names: Collection[str] | None = None) -> None:
    """Load a snapshot into a model in place; with `names`, only the parameters of these names.

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
            if names is not None and name not in names:
                continue
            value = weights[name]
            if parameter.shape != value.shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(value.shape)} where the model has "
                    f"{tuple(parameter.shape)}; the weights belong to another model"
                )
            if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
                np.copyto(parameter.numpy(), value)
            else:
                # Ray returns read-only buffers, which torch does not support; hence the copy.
                parameter.copy_(torch.from_numpy(np.array(value)))


def _unsharded(parameter: torch.Tensor) -> torch.Tensor:
    """Return the parameter, gathered from all workers if it is sharded."""
    gather = getattr(parameter, "full_tensor", None)
    return gather() if gather is not None else parameter
