"""Registry of the inference engines that a run names.

To add an engine, write an `EngineFactory` in a module of its own and register it in `ENGINES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from orchard.errors import ConfigError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.registry import Facts, Registry
from orchard.settings import Config, RolloutConfig
from orchard.types import PolicyVersion
from rollout.engine.availability import check_vllm
from rollout.engine.protocol import InferenceEngine
from rollout.engine.torch import TorchEngine
from rollout.engine.vllm import VllmEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineContext:
    """Inputs from which an `EngineFactory` makes an engine."""

    folder: Path
    """Folder of the policy."""
    model: PreTrainedModel
    """Policy in the folder, which the engine may keep."""
    tokenizer: ItemTokenizer
    """Catalog and tokens of the policy."""
    version: PolicyVersion
    """Version of the weights of `model`."""
    config: RolloutConfig
    """Precision, memory and threads of the engine."""
    seed: int
    """Seed of the text that the engine generates."""
    prefix_bytes: int = 0
    """Bytes of keys and values that the engine may keep for prompts that continue earlier ones; an
    engine that cannot keeps none."""


EngineFactory = Callable[[EngineContext], InferenceEngine]
"""Factory of an engine from its context; raises EngineError if it cannot run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts(Facts):
    """Properties of an engine that a run looks up."""

    check_machine: Callable[[], None] | None = None
    """Check that the engine can run on this machine; raises EngineError."""
    own_process: bool = False
    """Whether the engine is a process of its own with a cache of `rollout.kv_cache_gib`."""


ENGINES: Registry[EngineFactory, EngineFacts] = Registry(
    "engine", ("rollout.engine", "evaluate.engine", "serve.engine"), EngineFacts()
)
"""Engines by their name in `rollout.engine`, `evaluate.engine` and `serve.engine`."""


def _no_head_by_requests(config: Config) -> None:
    """Refuse to run a value head on requests, for which vLLM gives no hidden states."""
    searches = "vllm" in (config.rollout.engine, config.evaluate.engine)
    if searches and config.model.value_head and config.rollout.decode == "requests":
        raise ConfigError(
            'rollout.decode = "requests" cannot run the head of model.value_head = true, for '
            'which vLLM gives no hidden states; set rollout.decode = "worker", or '
            'rollout.engine and evaluate.engine to "torch"',
            code="config.head_by_requests",
        )


@ENGINES.register(
    "vllm",
    EngineFacts(rules=(_no_head_by_requests,), check_machine=check_vllm, own_process=True),
)
def _vllm(ctx: EngineContext) -> InferenceEngine:
    return VllmEngine(ctx.folder, ctx.model, ctx.tokenizer, ctx.version, ctx.config, seed=ctx.seed)


@ENGINES.register("torch")
def _torch(ctx: EngineContext) -> InferenceEngine:
    device = "cuda" if ctx.config.gpus else "cpu"
    # `Module.to` explicitly: the model's own method has another signature.
    nn.Module.to(ctx.model, device=device, dtype=getattr(torch, ctx.config.dtype))
    return TorchEngine(ctx.model, ctx.tokenizer, ctx.version, prefix_bytes=ctx.prefix_bytes)
