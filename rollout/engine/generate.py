"""Free text from a Hugging Face causal language model: the reference for what vLLM writes.

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
from orchard.policy.model import head_weight
from rollout.engine.protocol import Completions, GenerationParams, check_context_length


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    key: Int64[np.ndarray, " R"],
    how: GenerationParams,
) -> Completions:
    """Continue each context; see `Holder.write`."""
    check_context_length(contexts, how, int(model.config.max_position_embeddings))
    device, num_rows = head_weight(model).device, len(contexts)
    count = np.array([len(one) for one in contexts])
    widest = int(count.max())
    # Padded on the left, the last token of every context is in the same slot.
    table, mask = np.zeros((num_rows, widest), np.int64), np.zeros((num_rows, widest), np.int64)
    for row, one in enumerate(contexts):
        table[row, widest - len(one) :], mask[row, widest - len(one) :] = one, 1
    token, visible = torch.from_numpy(table).to(device), torch.from_numpy(mask).to(device)
    position = (visible.cumsum(1) - 1).clamp(min=0)
    uniform = torch.from_numpy(_uniforms(key, how.limit)).to(device)
    stop = torch.tensor(list(how.stop), device=device)
    cache, live = DynamicCache(), torch.ones(num_rows, dtype=torch.bool, device=device)
    written, logprobs, alive = list[Tensor](), list[Tensor](), list[Tensor]()
    for step in range(how.limit):
        hidden = model.base_model(
            input_ids=token,
            position_ids=position,
            attention_mask=visible,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logprob = _logprobs(cast(Tensor, hidden), head_weight(model), how.temperature)
        chosen = _choose(logprob, uniform[:, step], greedy=how.temperature == 0)
        written.append(chosen)
        logprobs.append(logprob.gather(1, chosen[:, None]).squeeze(1))
        alive.append(live)
        live = live & ~torch.isin(chosen, stop)
        if not bool(live.any()):
            break
        token, position = chosen[:, None], position[:, -1:] + 1
        visible = torch.cat([visible, torch.ones_like(token)], 1)
    kept = torch.stack(alive, 1).cpu().numpy()
    return Completions(
        token=torch.stack(written, 1).cpu().numpy()[kept].astype(np.int32),
        logprob=torch.stack(logprobs, 1).float().cpu().numpy()[kept],
        start=ragged.starts(kept.sum(1)),
    )


def _uniforms(key: Int64[np.ndarray, " R"], limit: int) -> Float64[np.ndarray, "R limit"]:
    """Numbers in [0, 1) for each token of each text, from its key and nothing else."""
    return np.stack(
        [np.random.Generator(np.random.Philox(key=int(one))).random(limit) for one in key]
    )


def _logprobs(
    hidden: Float[Tensor, "R D"], head: Float[Tensor, "V D"], temperature: float
) -> Float[Tensor, "R V"]:
    logit = (hidden @ head.T).float()
    return (logit / (temperature or 1.0)).log_softmax(-1)


def _choose(
    logprob: Float[Tensor, "R V"], uniform: Float64[Tensor, " R"], *, greedy: bool
) -> Int64[Tensor, " R"]:
    """The likeliest token of each row, or one drawn by inverting the CDF."""
    if greedy:
        return logprob.argmax(1)
    edge = logprob.double().exp().cumsum(1)
    drawn = torch.searchsorted(edge, (uniform * edge[:, -1])[:, None], right=True).squeeze(1)
    return drawn.clamp(max=logprob.shape[1] - 1)
