"""vLLM through its public interface: one request per frontier node.

Each request carries the whole prefix of its node and asks for one token, for the log-probabilities
of the legal ones. What prefixes have in common, vLLM's prefix cache computes once, page by page.

Shapes:  B prompts   F frontier nodes   F1 = F + 1   N tokens of their spans   M legal children
"""

import logging
import os
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from orchard.config import RolloutConfig
from orchard.errors import EngineError
from orchard.trie import ROOT, Children, Trie
from orchard.types import PolicyVersion, Prompts
from orchard.vocabulary import Vocabulary
from orchard.weights import Weights, restore
from rollout.engine import Expansion, check_length, check_weights

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.logprobs import FlatLogprobs

MAX_ALLOWED = 1024
"""Longest list of allowed tokens that every vLLM model runner takes."""

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process and dies with it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines and learner share the cores they are given
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine:
    """Decodes with a vLLM engine inside this process; takes it over for good."""

    def __init__(
        self,
        folder: Path,
        trie: Trie,
        vocabulary: Vocabulary,
        version: PolicyVersion,
        config: RolloutConfig,
        *,
        seed: int,
    ) -> None:
        """Load the policy saved in `folder`, which is what `version` names.

        Raises:
            EngineError: vLLM is not installed, or cannot serve the policy within its memory.
        """
        self.trie, self.vocabulary, self.version = trie, vocabulary, version
        with torch.device("meta"):
            self._shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        self._llm = _start(folder, config, seed)
        self._prefix: list[list[int]] = []

    def install(self, version: PolicyVersion, weights: Weights) -> None:
        """Answer with these weights from now on; see `Engine.install`."""
        check_weights(version, weights)
        restore(self._shapes, weights)  # raises before vLLM has loaded half of them
        tensors = ((name, torch.from_numpy(np.array(value))) for name, value in weights.items())
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        self._llm.apply_model(_repack_head)
        assert self._llm.reset_prefix_cache()
        self.version, self._prefix = version, []

    def prefill(self, prompts: Prompts) -> Expansion:
        """Read each prompt once and score the children of the root."""
        check_length(prompts, self.trie, self._llm.llm_engine.model_config.max_model_len)
        token = prompts.token.tolist()
        self._prefix = [token[a:b] for a, b in pairwise(prompts.token_start.tolist())]
        return self._expand(0, torch.full((len(prompts),), ROOT))

    def extend(
        self,
        state: Int64[Tensor, " F"],
        token: Int64[Tensor, " N"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
    ) -> Expansion:
        """Append a span to each state and score the children of `node`, the trie node after it."""
        first, tokens = len(self._prefix), token.tolist()
        spans = pairwise(start.tolist())
        self._prefix += [
            self._prefix[parent] + tokens[a:b]
            for parent, (a, b) in zip(state.tolist(), spans, strict=True)
        ]
        return self._expand(first, node)

    def _expand(self, first: int, node: Int64[Tensor, " F"]) -> Expansion:
        """Score the children of the nodes reached by the prefixes from number `first` on."""
        children = self.trie.children(node)
        token = self.vocabulary.token_of(self.trie, children.node)
        legal = [token[a:b].tolist() for a, b in pairwise(children.start.tolist())]
        requests: list[TokensPrompt] = [
            {"prompt_token_ids": prefix} for prefix in self._prefix[first:]
        ]
        params = [_params(ids) for ids in legal]
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        state = torch.arange(first, len(self._prefix))
        answers = [cast("FlatLogprobs", output.outputs[0].logprobs) for output in outputs]
        return Expansion(state=state, logprob=_read(answers, children, token), children=children)


def _start(folder: Path, config: RolloutConfig, seed: int) -> "LLM":
    """A vLLM engine for the policy in `folder`; raises EngineError where it cannot be had."""
    os.environ.update(_ENVIRONMENT)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        from vllm import LLM
    except ImportError as error:
        raise EngineError(f"vLLM is not usable ({error}); set rollout.engine = torch") from error
    memory: dict[str, Any]
    if config.gpus:
        memory = {"gpu_memory_utilization": config.gpu_memory}
    else:  # pages of 32 tokens are the smallest that the CPU kernels take
        memory = {"kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30), "block_size": 32}
    try:
        return LLM(
            str(folder),
            dtype=config.dtype,
            seed=seed,
            skip_tokenizer_init=True,
            enforce_eager=True,
            use_tqdm_on_load=False,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            max_logprobs=-1,
            max_model_len=-1,
            max_num_seqs=1024,
            max_num_batched_tokens=8192,
            **memory,
        )
    except (RuntimeError, ValueError) as error:
        raise EngineError(
            f"vLLM cannot serve {folder}: {error}; see rollout.kv_cache_gib and rollout.gpu_memory"
        ) from error


def _repack_head(model: nn.Module) -> None:
    """Let a tied head see new weights.

    On a CPU each layer multiplies by a packed copy of its weights, made when they are loaded. A
    head tied to the embeddings is loaded with them, under their name, so that vLLM renews the
    embeddings' copy and leaves the head's as it was. Some models have no such second module.
    """
    head: Any = getattr(model, "lm_head", None)
    if head is not None:
        head.quant_method.process_weights_after_loading(head)


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
