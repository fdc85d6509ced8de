"""Export the adapters of a policy as a folder that `peft` loads onto the base model.

Policies are saved with merged adapters (`orchard.policy.lora`). A merged weight differs from the
base weight by a matrix of low rank, whose factors are an adapter again.

Shapes:  M rows of a weight   N columns   R rank
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float64
from torch import nn
from transformers import PreTrainedModel

from orchard.errors import CheckpointError
from orchard.policy import lora, weights
from orchard.policy.model import head_weight
from orchard.settings import LoraConfig

_NAME = "default"
_ROUNDING = 16 * float(np.finfo(np.float32).eps)
"""Rounding error of merging in float32, as a share of the largest element of a weight."""


def write(policy: PreTrainedModel, base: PreTrainedModel, settings: LoraConfig, out: Path) -> int:
    """Write the difference between a policy and its base as a `peft` folder; return the rank.

    The rank is that of the settings after SFT, and twice as much after RL, which adds new adapters
    to the merged SFT policy. Embeddings, and an untied head, are stored in full (peft's
    `modules_to_save`), because all their rows were trained.

    Args:
        policy: the policy with merged weights and without a value head.
        base: the base model, which is resized to the policy's tokens and receives the adapters, in
            place.
        settings: LoRA settings of the run that trained the policy.
        out: folder to write.

    Raises:
        CheckpointError: policy and base differ in other weights, or by a higher rank.
        ConfigError: see `lora.check`.
    """
    lora.check(base, settings)
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    base.resize_token_embeddings(head_weight(policy).shape[0], mean_resizing=False)
    old, new = weights.snapshot(base), weights.snapshot(policy)
    embeddings = _embeddings(policy)
    adapted = [n for n in new if n.split(".")[-2] in settings.targets and n.endswith(".weight")]
    _check_equal({n: v for n, v in old.items() if n not in (*embeddings, *adapted)}, new)
    delta = {n: new[n].astype(np.float64) - old[n] for n in adapted}
    rank, factors_of = _factorize(delta, new, settings.rank)
    peft_config = PeftLoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(settings.targets),
        modules_to_save=[name.split(".")[-2] for name in embeddings],
        ensure_weight_tying=len(embeddings) == 1,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(base, peft_config, adapter_name=_NAME)
    modules = cast("dict[str, Any]", dict(base.named_modules()))
    with torch.no_grad():
        for name, (up, down) in factors_of.items():
            module = modules[name.removesuffix(".weight")]
            module.lora_A[_NAME].weight.copy_(torch.from_numpy(down))
            module.lora_B[_NAME].weight.copy_(torch.from_numpy(up))
        for name in embeddings:
            saved = modules[name.removesuffix(".weight")].modules_to_save[_NAME]
            saved.weight.copy_(torch.from_numpy(new[name]))
    wrapped.save_pretrained(str(out), save_embedding_layers=False)
    return rank


def factors(
    matrix: Float64[np.ndarray, "M N"], rank: int
) -> tuple[Float64[np.ndarray, "M R"], Float64[np.ndarray, "R N"]]:
    """Return balanced factors of the nearest matrix of the rank (Eckart and Young 1936)."""
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(singular[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _factorize(
    delta: dict[str, np.ndarray], new: weights.Weights, rank: int
) -> tuple[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the common rank of all weight differences and the factors of each.

    Raises:
        CheckpointError: a difference has more than twice the given rank.
    """
    inexact = ""
    for max_rank in (rank, 2 * rank):
        size = min(max_rank, *(n for matrix in delta.values() for n in matrix.shape))
        factors_of = {name: factors(matrix, size) for name, matrix in delta.items()}
        # Weights whose difference exceeds the factors by more than rounding.
        inexact_names = (
            name
            for name, (up, down) in factors_of.items()
            if np.abs(delta[name] - up @ down).max() > _ROUNDING * np.abs(new[name]).max()
        )
        inexact = next(inexact_names, "")
        if not inexact:
            return size, factors_of
    raise CheckpointError(
        f"{inexact} differs from the base model's by a matrix of more than twice the rank of "
        f"model.lora.rank = {rank}; leave out --adapter and export the whole policy"
    )


def _embeddings(policy: PreTrainedModel) -> list[str]:
    """Return the names of the embedding weight and, if it is not tied, of the head weight."""
    tables = (cast(nn.Embedding, policy.get_input_embeddings()).weight, head_weight(policy))
    return [name for name, value in policy.named_parameters() if any(value is t for t in tables)]


def _check_equal(old: weights.Weights, new: weights.Weights) -> None:
    """Raise CheckpointError if a weight of `old` differs in `new`."""
    for name, value in old.items():
        if name not in new or not np.array_equal(value, new[name]):
            raise CheckpointError(
                f"{name} differs from the base model's, and no adapter is on it; leave out "
                "--adapter and export the whole policy"
            )
