"""vLLM through its public interface: one request per frontier node.

Each request carries the whole prefix of its node and asks for one token, for the log-probabilities
of the legal ones. What prefixes have in common, vLLM's prefix cache computes once, page by page.
Slower than a search inside the worker, but it depends on nothing that vLLM does not promise.

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
"""Longest list of allowed tokens that every vLLM model runner takes."""


class RequestBackend:
    """Decodes with requests to a vLLM engine, which others may use in between."""

    def __init__(self, llm: "LLM", tokenizer: ItemTokenizer, version: PolicyVersion) -> None:
        """Ask `llm`, which holds the policy that `version` names."""
        self.tokenizer, self.version = tokenizer, version
        self._llm = llm
        self._prefix: list[list[int]] = []

    @property
    def trie(self) -> Trie:
        """The legal sequences."""
        return self.tokenizer.trie

    def prefill(self, prompts: Prompts) -> NextCodeLogprobs:
        """Read each prompt once and score the children of the root."""
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
        """Score the children of the nodes reached by the prefixes from number `first` on."""
        children = self.trie.children(node)
        token = self.tokenizer.token_of(children.node)
        legal = [token[a:b].tolist() for a, b in pairwise(children.start.tolist())]
        requests: list[TokensPrompt] = [
            {"prompt_token_ids": prefix} for prefix in self._prefix[first:]
        ]
        params = [_params(ids) for ids in legal]
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        state = torch.arange(first, len(self._prefix))
        answers = [cast("FlatLogprobs", output.outputs[0].logprobs) for output in outputs]
        return NextCodeLogprobs(
            state=state, logprob=_read(answers, children, token), children=children
        )


def _params(legal: list[int]) -> "SamplingParams":
    """Ask for the log-probability of each legal token."""
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


def _read(
    answers: "Sequence[FlatLogprobs]", children: Children, token: Int64[Tensor, " M"]
) -> Float32[Tensor, " M"]:
    """The answers of all requests in the order of the children, renormalised over them."""
    count = np.array([len(answer.token_ids) for answer in answers])
    found = np.concatenate([answer.token_ids for answer in answers])
    value = np.concatenate([answer.logprobs for answer in answers])
    width = int(max(found.max(), int(token.max()))) + 1
    wanted = (children.owner * width + token).numpy()
    order = wanted.argsort()
    given = np.repeat(np.arange(len(answers)), count) * width + found
    place = order[np.searchsorted(wanted[order], given).clip(max=len(order) - 1)]
    asked = wanted[place] == given
    logprob = np.full(len(wanted), np.nan)
    logprob[place[asked]] = value[asked]
    # Lists too long to be allowed one by one come normalised over the whole vocabulary.
    total = np.bincount(children.owner.numpy(), np.exp(logprob), minlength=len(answers))
    return torch.from_numpy(logprob - np.log(total)[children.owner.numpy()]).float()
