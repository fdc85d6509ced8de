"""Generate free text with a Hugging Face causal language model, the reference for vLLM.

Shapes:  R texts   R1 = R + 1   V tokens   D hidden width
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel

from orchard import ragged
from orchard.policy.attention import position_limit
from orchard.policy.model import head_weight
from rollout.engine.contexts import ContextCache
from rollout.engine.protocol import Completions, GenerationParams, check_context_length


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    key: Int64[np.ndarray, " R"],
    params: GenerationParams,
    cache: ContextCache | None = None,
) -> Completions:
    """Generate a continuation of each context; see `InferenceEngine.generate`.

    `cache` holds the contexts and their texts afterwards, for contexts that continue them.
    """
    check_context_length(contexts, params, position_limit(model.config))
    cache = cache or ContextCache()
    hidden, rows = cache.open(model, contexts)
    device, num_rows = hidden.device, len(contexts)
    uniform = torch.from_numpy(_uniforms(key, params.limit)).to(device)
    stop = torch.tensor(list(params.stop), device=device)
    live = torch.ones(num_rows, dtype=torch.bool, device=device)
    # Per step: the tokens, their log-probabilities, and whether each text was unfinished before and
    # after it.
    tokens, logprobs, alive, kept = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    for step in range(params.limit):
        if step:
            hidden = rows.append(model, tokens[-1][:, None], live[:, None])
            kept.append(live)
        logprob = _logprobs(hidden, head_weight(model), params.temperature)
        chosen = _choose(logprob, uniform[:, step], greedy=params.temperature == 0)
        tokens.append(chosen)
        logprobs.append(logprob.gather(1, chosen[:, None]).squeeze(1))
        alive.append(live)
        live = live & ~torch.isin(chosen, stop)
        if not bool(live.any()):
            break
    token = torch.stack(tokens, 1).cpu().numpy().astype(np.int32)  # [R, steps]
    is_text = torch.stack(alive, 1).cpu().numpy()
    if kept:
        cached = torch.stack(kept, 1).cpu().numpy()  # [R, steps - 1]
        for row in range(num_rows):
            rows.token[row] += token[row, :-1][cached[row]].tobytes()
    cache.keep(rows)
    return Completions(
        token=token[is_text],
        logprob=torch.stack(logprobs, 1).float().cpu().numpy()[is_text],
        start=ragged.starts(is_text.sum(1)),
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
