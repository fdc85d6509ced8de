"""Low-rank adapters (LoRA, arXiv 2106.09685), through the `peft` library.

Only the learner knows of adapters. What leaves it, to search with and to be saved, is merged: a
weight W becomes W + (alpha / rank) B A, under the names that the policy has without adapters.

Embeddings are trained whole, for the tokens of codes are new to a text model; so is a value head.
"""

from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from orchard.errors import ConfigError
from orchard.policy import value_head, weights
from orchard.settings import LoraConfig

_NAME = "default"


def attach(model: PreTrainedModel, settings: LoraConfig, *, seed: int) -> None:
    """Give the policy fresh adapters, with which it computes the same as before; in place.

    Raises:
        ConfigError: as `check`.
    """
    if settings.rank == 0:
        return
    check(model, settings)
    from peft import LoraConfig as Adapters
    from peft import inject_adapter_in_model

    adapters = Adapters(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(adapters, model, adapter_name=_NAME)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(module, nn.Module):
            module.requires_grad_(True)
    if (head := value_head.value_head_of(model)) is not None:
        head.requires_grad_(True)


def check(model: nn.Module, settings: LoraConfig) -> None:
    """Raise ConfigError where adapters are asked for and cannot be had.

    `peft` is not installed, or a target is the name of no linear module of the policy.
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


def snapshot(model: nn.Module) -> dict[str, np.ndarray]:
    """As `orchard.policy.weights.snapshot`, with adapters merged.

    Collective where the parameters are sharded over workers: what is merged was gathered first.
    """
    values = weights.snapshot(model)
    modules = cast("dict[str, Any]", dict(model.named_modules()))
    adapters = {name: one for name, one in modules.items() if hasattr(one, "get_delta_weight")}
    for name, module in adapters.items():
        up, down = (values[f"{name}.lora_{part}.{_NAME}.weight"] for part in "BA")
        delta = np.float32(module.scaling[_NAME]) * (up @ down)
        for key in [key for key in values if key.startswith(f"{name}.")]:
            part = values.pop(key)
            own = key.removeprefix(f"{name}.base_layer.")
            if own == key:
                continue  # of the adapter itself
            if own == "weight":
                part = part + delta
            values[f"{name}.{own}"] = part
    return values
