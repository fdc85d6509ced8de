"""Check that a loaded model computes the same in a tree as token by token.

The learner lays a search tree into one row, and the torch engine extends branches of a tree in one
cache. Both are exact for causal attention with explicit masks and positions. They are wrong for
layers that read the slots one after another (linear attention, convolutions, recurrences), for
encoders, for positions that come from slots, and for heads that do more than multiply. Rather than
from names, `check_trees` finds this from the numbers.

Shapes:  P tokens of the prompt   L tokens of a branch   V tokens of the vocabulary
"""

import inspect
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from orchard.errors import EngineError
from orchard.policy.attention import longest_window, position_limit
from orchard.policy.model import head_weight, hidden_states

TOLERANCE = 1e-4
"""Maximum difference of a log-probability in float32, as a share of the standard deviation of the
log-probabilities; a policy with small weights has small differences."""
HALF_TOLERANCE = 0.5
"""The same in 16 bits, whose rounding hides small faults; the learner and the dry run check in
float32."""
_LEAST_SPREAD = 0.05
"""Standard deviation, in nats, below which rounding is not a share of it."""
_BRANCH = 4
_SHORTEST = 16
"""Minimum length of the prompt: more than the kernel of a convolution."""

_passed: set[tuple[object, ...]] = set()
"""Classes, configurations, precisions and devices that passed in this process."""


def check_trees(model: PreTrainedModel, *, tolerance: float | None = None) -> None:
    """Compare trees of two branches, packed and searched, with plain forward passes.

    The prompt is longer than any window of the model. A second, shorter prompt is padded. A model
    whose class and configuration passed in this process is not checked again: the arithmetic does
    not depend on the weights.

    Args:
        model: loaded policy, on its device and in its precision.
        tolerance: maximum difference of a log-probability, as a share of the standard deviation
            of the log-probabilities; by default that of the model's precision.

    Raises:
        EngineError: the model has no positions, cannot run a tree, or a log-probability differs
            from that of the plain forward pass.
    """
    config, head = model.config, head_weight(model)
    key = (type(model), config.to_json_string(), head.dtype, head.device.type)
    if key in _passed:
        return
    if tolerance is None:
        tolerance = TOLERANCE if head.dtype == torch.float32 else HALF_TOLERANCE
    limit = position_limit(config)
    if getattr(config.get_text_config(), "final_logit_softcapping", None):
        raise _refusal(model, "caps its logits, which the search over legal codes leaves out")
    length = min(max(_SHORTEST, longest_window(config) + 8), limit - _BRANCH)
    if length < 1:
        raise _refusal(model, f"has {limit} positions, too few for a prompt and {_BRANCH} codes")
    draws = np.random.Generator(np.random.Philox(key=7)).integers(
        len(head), size=length + 2 * _BRANCH
    )
    token = torch.from_numpy(draws).to(head.device)
    prompt, branches = token[:length], token[length:].reshape(2, _BRANCH)
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            plain = _plain(model, prompt, branches)
            bound = tolerance * max(float(plain.std()), _LEAST_SPREAD)
            for way, difference in _differences(model, plain, prompt, branches):
                if not difference <= bound:  # NaN included
                    raise _refusal(
                        model,
                        f"gives log-probabilities in {way} that differ by {difference:.2g} nats "
                        f"from its own forward pass (at most {bound:.2g})",
                    )
    except (EngineError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # models raise arbitrary exceptions for masks they do not support
        reason = str(error).partition("\n")[0]
        raise _refusal(model, f"cannot run a tree ({type(error).__name__}: {reason})") from error
    finally:
        model.train(was_training)
    _passed.add(key)


def _refusal(model: PreTrainedModel, what: str) -> EngineError:
    """Return the error of a model that trees do not support."""
    return EngineError(
        f"a model of type {model.config.model_type} {what}; searches and updates need a decoder "
        "with causal attention, explicit positions and a plain linear head: take one such as "
        "Qwen3, Llama, Mistral or Gemma 3"
    )


def _differences(
    model: PreTrainedModel,
    plain: Float[Tensor, "2 L1 V"],
    prompt: Int[Tensor, " P"],
    branches: Int[Tensor, "2 L"],
) -> Iterator[tuple[str, float]]:
    """Yield the maximum difference from plain passes of a packed tree and of two searches."""
    yield "a packed tree", _gap(_packed(model, prompt, branches), plain)
    short = prompt[-max(1, len(prompt) // 2) :]
    searched = _searched(model, [prompt, short], branches)
    yield "a search", _gap(searched[0], plain)
    yield "a search from a padded prompt", _gap(searched[1], _plain(model, short, branches))


def _gap(one: Float[Tensor, "2 L1 V"], other: Float[Tensor, "2 L1 V"]) -> float:
    return float((one - other).abs().max())


def _plain(
    model: PreTrainedModel, prompt: Int[Tensor, " P"], branches: Int[Tensor, "2 L"]
) -> Float[Tensor, "2 L1 V"]:
    """Return the model's own log-probabilities after the prompt and each token of each branch."""
    row = torch.cat([prompt.expand(2, -1), branches], 1)
    kept = branches.shape[1] + 1
    arguments: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = kept
    logits = cast(Tensor, cast(Any, model)(input_ids=row, **arguments).logits)
    return logits[:, -kept:].float().log_softmax(-1)


def _score(model: PreTrainedModel, hidden: Float[Tensor, "*S D"]) -> Float[Tensor, "*S V"]:
    """Return the log-probabilities of all tokens as `child_logprobs` computes logits."""
    return (hidden @ head_weight(model).T.to(hidden.dtype)).float().log_softmax(-1)


def _packed(
    model: PreTrainedModel, prompt: Int[Tensor, " P"], branches: Int[Tensor, "2 L"]
) -> Float[Tensor, "2 L1 V"]:
    """Return the same from one row that contains the prompt and both branches."""
    num, size, device = len(prompt), branches.shape[1], prompt.device
    slot = torch.arange(num + 2 * size, device=device)
    branch = torch.where(slot < num, -1, (slot - num) // size)  # -1 for the prompt
    visible = (slot <= slot[:, None]) & ((branch == -1) | (branch == branch[:, None]))
    position = torch.where(slot < num, slot, num + (slot - num) % size)
    row = torch.cat([prompt, branches.reshape(-1)])
    hidden = hidden_states(model, row[None], position[None], visible[None])[0]
    after = torch.arange(size, device=device) + num
    chosen = [torch.cat([slot[num - 1 : num], after + b * size]) for b in (0, 1)]
    return _score(model, hidden[torch.stack(chosen)])


def _searched(
    model: PreTrainedModel, prompts: list[Int[Tensor, " _"]], branches: Int[Tensor, "2 L"]
) -> list[Float[Tensor, "2 L1 V"]]:
    """Return the same for each prompt from a cache to which both branches are appended in turn."""
    widest, device = max(map(len, prompts)), branches.device
    pad = torch.tensor([widest - len(prompt) for prompt in prompts], device=device)
    token = torch.stack([torch.cat([p.new_zeros(widest - len(p)), p]) for p in prompts])
    slot = torch.arange(widest, device=device)
    position = slot - pad[:, None]
    in_prompt = position >= 0
    position = position.clamp(min=0)
    cache = DynamicCache()
    visible = in_prompt[:, None] & (slot <= slot[:, None])
    hidden = hidden_states(
        model, token, position, visible, cache=cache, key_position=position
    )  # of the prompts
    steps = [hidden[:, -1:].expand(-1, 2, -1)]  # after each step, at the end of each branch
    seen = in_prompt[:, None].expand(-1, 2, -1)  # slots that the end of each branch sees
    itself = torch.eye(2, dtype=torch.bool, device=device).expand(len(prompts), 2, 2)
    for step in range(branches.shape[1]):
        new = (widest - pad + step)[:, None].expand(-1, 2)
        position, seen = torch.cat([position, new], 1), torch.cat([seen, itself], 2)
        tokens = branches[:, step].expand(len(prompts), 2)
        steps.append(hidden_states(model, tokens, new, seen, cache=cache, key_position=position))
    return list(_score(model, torch.stack(steps, 2)))
