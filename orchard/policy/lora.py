"""Train low-rank adapters (LoRA, arXiv 2106.09685) with the `peft` library.

Only the learner uses adapters. Published and saved weights are merged: a weight W becomes
W + (alpha / rank) B A, under the parameter names of the policy without adapters. The factors are
saved beside the merged policy, for an export of the adapters alone.

Embeddings and the value head are trained in full, because the code tokens are new to a text model.

Shapes:  M rows of a weight   N columns   R rank
"""

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float32
from torch import nn
from transformers import PreTrainedModel

from orchard.errors import ConfigError
from orchard.policy import value_head, weights
from orchard.policy.model import head_weight
from orchard.policy.weights import Weights
from orchard.settings import LoraConfig

_NAME = "default"
"""Name of the adapter in the peft modules."""
_UP, _DOWN = ".lora_B.weight", ".lora_A.weight"
"""Endings of the names of the factors (M, R) and (R, N) of a module's weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFactors:
    """Adapter of one weight, which adds `scaling * up @ down` to it."""

    up: Float32[np.ndarray, "M R"]
    down: Float32[np.ndarray, "R N"]
    scaling: float


def attach(model: PreTrainedModel, settings: LoraConfig, *, seed: int) -> None:
    """Add new adapters to the policy in place; they do not change its outputs initially.

    Raises:
        ConfigError: see `check`.
    """
    if settings.rank == 0:
        return
    check(model, settings)
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    peft_config = PeftLoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config, model, adapter_name=_NAME)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(module, nn.Module):
            module.requires_grad_(True)
    if (head := value_head.value_head_of(model)) is not None:
        head.requires_grad_(True)


def check(model: nn.Module, settings: LoraConfig) -> None:
    """Raise ConfigError if the settings request adapters that cannot be created.

    This is the case if `peft` is not installed or a target names no linear module of the policy.
    """
    if settings.rank == 0:
        return
    if find_spec("peft") is None:
        raise ConfigError(
            f"model.lora.rank = {settings.rank} needs the library peft; install it, or set it to 0"
        )
    linear = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in settings.targets:
        if name not in linear:
            raise ConfigError(
                f"model.lora.targets names {name}, which no linear module of "
                f"{type(model).__name__} is called; choose from {', '.join(sorted(linear))}"
            )


def merge(
    weight: Float32[np.ndarray, "M N"], adapter: AdapterFactors
) -> Float32[np.ndarray, "M N"]:
    """Return a weight with an adapter added to it."""
    return weight + np.float32(adapter.scaling) * (adapter.up @ adapter.down)


def snapshot(model: nn.Module) -> dict[str, np.ndarray]:
    """Copy the parameters to the CPU like `orchard.policy.weights.snapshot`, with adapters merged.

    This is a collective operation if the parameters are sharded over workers: they are gathered
    before they are merged.
    """
    return {name: np.array(value) for name, value in merged(model).items()}


def merged(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the parameters like `snapshot`, uncopied where nothing is merged into them.

    These share the memory of a float32 model on the CPU.
    """
    values, adapters = parts(model)
    return values | {name: merge(values[name], adapter) for name, adapter in adapters.items()}


def parts(
    model: nn.Module, names: Collection[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, AdapterFactors]]:
    """Return the parameters below the adapters, and the adapters of all adapted weights.

    Both are named as in the policy without adapters, and share the memory of a float32 model on the
    CPU. Collective, like `snapshot`, if the parameters are sharded.

    Args:
        model: policy with or without adapters.
        names: parameters to return, as the model names them, besides the adapters; all by default.
    """
    modules = cast("dict[str, Any]", dict(model.named_modules()))
    adapted = {name: m for name, m in modules.items() if hasattr(m, "get_delta_weight")}
    own = {f"{name}.lora_{part}.{_NAME}.weight" for name in adapted for part in "AB"}
    values = weights.current(model, None if names is None else {*names, *own})
    adapters = {
        f"{name}.weight": AdapterFactors(
            up=values.pop(f"{name}.lora_B.{_NAME}.weight"),
            down=values.pop(f"{name}.lora_A.{_NAME}.weight"),
            scaling=float(module.scaling[_NAME]),
        )
        for name, module in adapted.items()
    }
    return {name.replace(".base_layer.", "."): value for name, value in values.items()}, adapters


def factors(model: nn.Module) -> Weights:
    """Copy the factors of all adapters to the CPU; their product is what an adapter adds.

    Collective, like `snapshot`, if the parameters are sharded. Empty without adapters.
    """
    result: dict[str, np.ndarray] = {}
    for name, module in cast("dict[str, Any]", dict(model.named_modules())).items():
        if hasattr(module, "get_delta_weight"):
            up, down = (
                weights.snapshot(part[_NAME])["weight"] for part in (module.lora_B, module.lora_A)
            )
            result |= {name + _UP: np.float32(module.scaling[_NAME]) * up, name + _DOWN: down}
    return result


def stack(first: Weights, second: Weights) -> Weights:
    """Return the factors of the sum of two sets of adapters, of the sum of their ranks."""
    return {
        name: np.concatenate([first[name], second[name]], axis=1 if name.endswith(_UP) else 0)
        for name in second
    }


def export(policy: PreTrainedModel, adapter: Weights, out: Path, *, base: str) -> None:
    """Write adapters as a folder that `peft` loads onto the base model.

    Embeddings, and an untied head, are stored in full (peft's `modules_to_save`), because all their
    rows were trained.

    Args:
        policy: merged policy without a value head; it receives the adapters, in place.
        adapter: factors of what the policy's weights add to those of the base.
        out: folder to write.
        base: name or folder of the base model.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    tables = (cast(nn.Embedding, policy.get_input_embeddings()).weight, head_weight(policy))
    in_full = [
        name.split(".")[-2]
        for name, value in policy.named_parameters()
        if any(value is table for table in tables)
    ]
    adapted = [name.removesuffix(_UP) for name in adapter if name.endswith(_UP)]
    rank = adapter[adapted[0] + _DOWN].shape[0]
    peft_config = PeftLoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted({name.split(".")[-1] for name in adapted}),
        modules_to_save=in_full,
        ensure_weight_tying=len(in_full) == 1,
        task_type="CAUSAL_LM",
    )
    policy.name_or_path = base
    wrapped = get_peft_model(policy, peft_config, adapter_name=_NAME)
    modules = cast("dict[str, Any]", dict(policy.named_modules()))
    with torch.no_grad():
        for name in adapted:
            modules[name].lora_A[_NAME].weight.copy_(torch.from_numpy(adapter[name + _DOWN]))
            modules[name].lora_B[_NAME].weight.copy_(torch.from_numpy(adapter[name + _UP]))
    wrapped.save_pretrained(str(out), save_embedding_layers=False)
    shutil.copymode(out / "adapter_config.json", out / "adapter_model.safetensors")
