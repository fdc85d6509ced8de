"""Generate free text with a Hugging Face causal language model, the reference for vLLM.

Shapes:  R texts   R1 = R + 1   S slots of the longest context   V tokens
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from orchard import ragged
from orchard.policy.attention import position_limit
from orchard.policy.model import head_weight
from rollout.engine.protocol import Completions, GenerationParams, check_context_length


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    key: Int64[np.ndarray, " R"],
    params: GenerationParams,
) -> Completions:
    """Generate a continuation of each context; see `InferenceEngine.generate`."""
    check_context_length(contexts, params, position_limit(model.config))
    device, num_rows = head_weight(model).device, len(contexts)
    count = np.array([len(context) for context in contexts])
    widest = int(count.max())
    # Left padding puts the last token of every context in the same slot.
    table, mask = np.zeros((num_rows, widest), np.int64), np.zeros((num_rows, widest), np.int64)
    for row, context in enumerate(contexts):
        table[row, widest - len(context) :], mask[row, widest - len(context) :] = context, 1
    token, visible = torch.from_numpy(table).to(device), torch.from_numpy(mask).to(device)
    position = (visible.cumsum(1) - 1).clamp(min=0)
    uniform = torch.from_numpy(_uniforms(key, params.limit)).to(device)
    stop = torch.tensor(list(params.stop), device=device)
    cache, live = DynamicCache(), torch.ones(num_rows, dtype=torch.bool, device=device)
    # Per step: the tokens, their log-probabilities, and whether each text was unfinished before it.
    tokens, logprobs, alive = list[Tensor](), list[Tensor](), list[Tensor]()
    for step in range(params.limit):
        hidden = model.base_model(
            input_ids=token,
            position_ids=position,
            attention_mask=visible,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logprob = _logprobs(cast(Tensor, hidden), head_weight(model), params.temperature)
        chosen = _choose(logprob, uniform[:, step], greedy=params.temperature == 0)
        tokens.append(chosen)
        logprobs.append(logprob.gather(1, chosen[:, None]).squeeze(1))
        alive.append(live)
        live = live & ~torch.isin(chosen, stop)
        if not bool(live.any()):
            break
        token, position = chosen[:, None], position[:, -1:] + 1
        visible = torch.cat([visible, torch.ones_like(token)], 1)
    kept = torch.stack(alive, 1).cpu().numpy()  # [R, steps]
    return Completions(
        token=torch.stack(tokens, 1).cpu().numpy()[kept].astype(np.int32),
        logprob=torch.stack(logprobs, 1).float().cpu().numpy()[kept],
        start=ragged.starts(kept.sum(1)),
    )


def _uniforms(key: Int64[np.ndarray, " R"], limit: int) -> Float64[np.ndarray, "R limit"]:
    """Draw a number in [0, 1) for each token of each text, which depends only on the text's key."""
    return np.stack(
        [np.random.Generator(np.random.Philox(key=int(seed))).random(limit) for seed in key]
    )


def _logprobs(
    hidden: Float[Tensor, "R D"], head: Float[Tensor, "V D"], temperature: float
) -> Float[Tensor, "R V"]:
    """Return the tempered log-probabilities of the next token, untempered at temperature 0."""
    logit = (hidden @ head.T).float()
    return (logit / (temperature or 1.0)).log_softmax(-1)


def _choose(
    logprob: Float[Tensor, "R V"], uniform: Float64[Tensor, " R"], *, greedy: bool
) -> Int64[Tensor, " R"]:
    """Choose the most likely token of each row, or draw one by inverting the CDF."""
    if greedy:
        return logprob.argmax(1)
    edge = logprob.double().exp().cumsum(1)
    drawn = torch.searchsorted(edge, (uniform * edge[:, -1])[:, None], right=True).squeeze(1)
    return drawn.clamp(max=logprob.shape[1] - 1)
