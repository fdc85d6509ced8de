"""A policy's adapters apart from its weights, as a folder that `peft` loads onto the base model.

Policies are kept with their adapters merged (`orchard.policy.lora`). A merged weight differs from
the base's by a matrix of low rank, and the factors of that matrix are an adapter again.

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
"""Of merging in float32, as a share of a weight's largest element."""


def write(policy: PreTrainedModel, base: PreTrainedModel, settings: LoraConfig, out: Path) -> int:
    """Write what a policy adds to its base as a `peft` folder; returns the rank of its adapters.

    The rank is that of the settings after a warm start and twice as much after RL, which puts fresh
    adapters on the merged warm start. Embeddings, and a head of its own, are stored whole (peft's
    `modules_to_save`), for all their rows were trained.

    Args:
        policy: with merged weights, without a value head.
        base: is resized to the policy's tokens and given the adapters, in place.
        settings: of the run that made the policy.
        out: folder to write.

    Raises:
        CheckpointError: the two differ by more than that.
        ConfigError: as `lora.check`.
    """
    lora.check(base, settings)
    from peft import LoraConfig as Adapters
    from peft import get_peft_model

    base.resize_token_embeddings(head_weight(policy).shape[0], mean_resizing=False)
    old, new = weights.snapshot(base), weights.snapshot(policy)
    whole = _embeddings(policy)
    adapted = [n for n in new if n.split(".")[-2] in settings.targets and n.endswith(".weight")]
    _check_alike({n: v for n, v in old.items() if n not in (*whole, *adapted)}, new)
    added = {n: new[n].astype(np.float64) - old[n] for n in adapted}
    rank, found = _factorise(added, new, settings.rank)
    settled = Adapters(
        r=rank,
        lora_alpha=rank,
        target_modules=list(settings.targets),
        modules_to_save=[name.split(".")[-2] for name in whole],
        ensure_weight_tying=len(whole) == 1,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(base, settled, adapter_name=_NAME)
    modules = cast("dict[str, Any]", dict(base.named_modules()))
    with torch.no_grad():
        for name, (up, down) in found.items():
            module = modules[name.removesuffix(".weight")]
            module.lora_A[_NAME].weight.copy_(torch.from_numpy(down))
            module.lora_B[_NAME].weight.copy_(torch.from_numpy(up))
        for name in whole:
            own = modules[name.removesuffix(".weight")].modules_to_save[_NAME]
            own.weight.copy_(torch.from_numpy(new[name]))
    wrapped.save_pretrained(str(out), save_embedding_layers=False)
    return rank


def factors(
    matrix: Float64[np.ndarray, "M N"], rank: int
) -> tuple[Float64[np.ndarray, "M R"], Float64[np.ndarray, "R N"]]:
    """Two factors of alike size of the nearest matrix of that rank (Eckart and Young 1936)."""
    left, size, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(size[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _factorise(
    added: dict[str, np.ndarray], new: weights.Weights, rank: int
) -> tuple[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The rank of all differences, and the factors of each."""
    left_over = ""
    for most in (rank, 2 * rank):
        size = min(most, *(n for matrix in added.values() for n in matrix.shape))
        found = {name: factors(matrix, size) for name, matrix in added.items()}
        rest = (
            name
            for name, (up, down) in found.items()
            if np.abs(added[name] - up @ down).max() > _ROUNDING * np.abs(new[name]).max()
        )
        left_over = next(rest, "")
        if not left_over:
            return size, found
    raise CheckpointError(
        f"{left_over} differs from the base model's by a matrix of more than twice the rank of "
        f"model.lora.rank = {rank}; leave out --adapter and export the whole policy"
    )


def _embeddings(policy: PreTrainedModel) -> list[str]:
    """Names of the embeddings' weight and of the head's, where that is another."""
    tables = (cast(nn.Embedding, policy.get_input_embeddings()).weight, head_weight(policy))
    return [name for name, value in policy.named_parameters() if any(value is t for t in tables)]


def _check_alike(old: weights.Weights, new: weights.Weights) -> None:
    for name, value in old.items():
        if name not in new or not np.array_equal(value, new[name]):
            raise CheckpointError(
                f"{name} differs from the base model's, and no adapter is on it; leave out "
                "--adapter and export the whole policy"
            )
