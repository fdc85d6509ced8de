"""Decode through vLLM's public interface, with one request per frontier node.

Each request contains the whole prefix of its node and generates one token, to get the
log-probabilities of the legal ones. vLLM's prefix cache computes common prefixes once, page by
page. This is slower than a search inside the worker, but uses only vLLM's public interface.

Shapes:  F frontier nodes   F1 = F + 1   N tokens of their spans   M legal children
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from orchard.catalog.trie import ROOT, Children, Trie
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.types import PolicyVersion, Prompts
from rollout.engine.protocol import NextCodeLogprobs, check_prompt_length

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.logprobs import FlatLogprobs

MAX_ALLOWED = 1024
"""Maximum length of a list of allowed tokens that every vLLM model runner accepts."""


class RequestBackend:
    """Decoding backend that sends requests to a vLLM engine, which may serve others as well."""

    def __init__(self, llm: "LLM", tokenizer: ItemTokenizer, version: PolicyVersion) -> None:
        """Decode with `llm`, which has loaded the policy of `version`."""
        self.tokenizer, self.version = tokenizer, version
        self._llm = llm
        self._prefix: list[list[int]] = []

    @property
    def trie(self) -> Trie:
        """Trie of the legal code sequences."""
        return self.tokenizer.trie

    def prefill(self, prompts: Prompts) -> NextCodeLogprobs:
        """Run prefill on the prompts and score the children of the root."""
        check_prompt_length(prompts, self.trie, self._llm.llm_engine.model_config.max_model_len)
        token = prompts.token.tolist()
        self._prefix = [token[a:b] for a, b in pairwise(prompts.token_start.tolist())]
        return self._expand(0, torch.full((len(prompts),), ROOT))

    def extend(
        self,
        state: Int64[Tensor, " F"],
        token: Int64[Tensor, " N"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
    ) -> NextCodeLogprobs:
        """Append a span to each state and score the children of `node`, the trie node after it."""
        first, tokens = len(self._prefix), token.tolist()
        spans = pairwise(start.tolist())
        self._prefix += [
            self._prefix[parent] + tokens[a:b]
            for parent, (a, b) in zip(state.tolist(), spans, strict=True)
        ]
        return self._expand(first, node)

    def _expand(self, first: int, node: Int64[Tensor, " F"]) -> NextCodeLogprobs:
        """Score the children of `node`, the trie nodes of the prefixes from index `first` on."""
        children = self.trie.children(node)
        token = self.tokenizer.token_of(children.node)
        legal = [token[a:b].tolist() for a, b in pairwise(children.start.tolist())]
        requests: list[TokensPrompt] = [
            {"prompt_token_ids": prefix} for prefix in self._prefix[first:]
        ]
        params = [_params(ids) for ids in legal]
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        state = torch.arange(first, len(self._prefix))
        logprobs = [cast("FlatLogprobs", output.outputs[0].logprobs) for output in outputs]
        return NextCodeLogprobs(
            state=state, logprob=_child_logprobs(logprobs, children, token), children=children
        )


def _params(legal: list[int]) -> "SamplingParams":
    """Make the parameters of a request for the log-probability of each legal token.

    A list too long to be allowed requests the whole vocabulary instead.
    """
    from vllm import SamplingParams

    few = len(legal) <= MAX_ALLOWED
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        allowed_token_ids=legal if few else None,
        logprobs=len(legal) if few else -1,
        flat_logprobs=True,
        detokenize=False,
        skip_clone=True,
    )


def _child_logprobs(
    responses: "Sequence[FlatLogprobs]", children: Children, token: Int64[Tensor, " M"]
) -> Float32[Tensor, " M"]:
    """Return the responses' log-probabilities in the order of the children, renormalized."""
    count = np.array([len(response.token_ids) for response in responses])
    token_id = np.concatenate([response.token_ids for response in responses])
    value = np.concatenate([response.logprobs for response in responses])
    width = int(max(token_id.max(), int(token.max()))) + 1
    # Keys (node, token) of the children, and of the responses' entries.
    child_key = (children.owner * width + token).numpy()
    order = child_key.argsort()
    key = np.repeat(np.arange(len(responses)), count) * width + token_id
    # Child of each entry, valid if `legal`: responses may contain other tokens.
    child = order[np.searchsorted(child_key[order], key).clip(max=len(order) - 1)]
    legal = child_key[child] == key
    logprob = np.full(len(child_key), np.nan)
    logprob[child[legal]] = value[legal]
    # Lists too long to be allowed are normalized over the whole vocabulary.
    total = np.bincount(children.owner.numpy(), np.exp(logprob), minlength=len(responses))
    return torch.from_numpy(logprob - np.log(total)[children.owner.numpy()]).float()
