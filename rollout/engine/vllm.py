"""vLLM engine inside this process: start it, load weights into it, and run searches on it.

`decode = worker` searches inside the worker (`rollout.engine.worker`); `decode = requests` uses
vLLM's public interface (`rollout.engine.requests`), which is slower and gives equal results.

The key-value cache has one owner at a time. While a search runs, the search owns it and no request
may be in progress; when the search ends, vLLM's prefix cache is reset, so that generation does not
read pages that the search has overwritten.
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Int64
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.errors import EngineError
from orchard.policy import value_head as value_heads
from orchard.policy.attention import position_limit
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import head_weight
from orchard.policy.tree_check import check_trees
from orchard.policy.value_head import ValueHead
from orchard.policy.weights import Weights, restore, snapshot
from orchard.settings import RolloutConfig
from orchard.types import PolicyVersion, Prompts
from rollout.candidates import Candidates
from rollout.engine.availability import check_vllm
from rollout.engine.payload import PayloadEncoder
from rollout.engine.protocol import (
    Completions,
    DecodingBackend,
    GenerationParams,
    check_context_length,
)
from rollout.engine.requests import RequestBackend

if TYPE_CHECKING:
    from vllm import LLM, TokensPrompt
    from vllm.logprobs import FlatLogprobs

_log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # run the engine in this process, and end with it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines and learner share the available cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

_MAX_BATCHED_TOKENS = 8192
"""Maximum number of tokens in one forward pass, unless a CPU prompt may be longer."""


class VllmEngine:
    """Inference engine on vLLM, which runs inside this process until the process ends."""

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: ItemTokenizer,
        version: PolicyVersion,
        config: RolloutConfig,
        *,
        seed: int,
    ) -> None:
        """Start vLLM with the policy in `folder`: `model`, which has the weights of `version`.

        Raises:
            EngineError: vLLM is not installed, cannot serve the policy within its memory, or would
                search by requests with a policy that has a value head; or trees do not reproduce
                the model (`check_trees`).
        """
        check_trees(model)  # by the same arithmetic, and before vLLM's slow start
        self.version = version
        head = head_weight(model)
        self._width = head.shape[1]
        weights, value_head = value_heads.split(snapshot(model), self._width)
        self._head = next(name for name, weight in model.named_parameters() if weight is head)
        with torch.device("meta"):
            self._shapes = AutoModelForCausalLM.from_config(model.config)
        self._in_worker = config.decode == "worker"
        self._check_values(value_head)  # before vLLM's slow start
        self._ranks = max(1, int(config.gpus))
        # On a CPU the worker runs in this process, so that searches need no encoding.
        self._encoder = PayloadEncoder() if config.gpus else None
        longest = position_limit(model.config)
        self.llm = _start(folder, config, self._ranks, longest=longest, seed=seed)
        self._requests = RequestBackend(self.llm, tokenizer, version)
        if self._in_worker and not self._can_search():
            self._in_worker = False
            self._check_values(value_head)
        if self._in_worker:
            head = weights[self._head]
            self._call("orchard_attach", tokenizer, version, head, value_head)

    def load_weights(self, version: PolicyVersion, weights: Weights) -> None:
        """Load the weights of a version; see `InferenceEngine.load_weights`."""
        weights, value_head = value_heads.split(weights, self._width)
        self._check_values(value_head)
        restore(self._shapes, weights)  # raises before vLLM has loaded half of them
        tensors = ((name, torch.from_numpy(np.array(part))) for name, part in weights.items())
        # With several ranks all tensors are pickled together; with one they are copied one by one.
        weights_iterator = tensors if self._ranks == 1 else list(tensors)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights_iterator})
        self.llm.apply_model(_repack_head)
        if self._in_worker:
            self._call("orchard_load_weights", version, weights[self._head], value_head)
        self._reset_prefix_cache()
        self.version = self._requests.version = version

    def set_catalog(self, catalog: Catalog) -> None:
        """Replace the catalog to search; see `InferenceEngine.set_catalog`."""
        if self._in_worker:
            self._call("orchard_set_catalog", catalog)
        self._requests.tokenizer = self._requests.tokenizer.with_catalog(catalog)

    def run(
        self, search_fn: Callable[[DecodingBackend, Prompts], Candidates], prompts: Prompts
    ) -> Candidates:
        """Run a search in the worker or by requests; see `SearchRunner.run`."""
        if not self._in_worker:
            return search_fn(self._requests, prompts)
        if self.llm.llm_engine.has_unfinished_requests():
            raise EngineError(
                "vLLM is generating, and a search needs its key-value cache; "
                "search when the requests are finished"
            )
        search = search_fn if self._encoder is None else self._encoder.encode(search_fn)
        try:
            return self._call("orchard_run", search, prompts)
        finally:
            self._reset_prefix_cache()

    def generate(
        self,
        contexts: Sequence[Sequence[int]],
        key: Int64[np.ndarray, " R"],
        params: GenerationParams,
    ) -> Completions:
        """Generate a continuation of each context; see `InferenceEngine.generate`.

        vLLM's prefix cache computes common prefixes of the contexts once, page by page.
        """
        from vllm import SamplingParams

        check_context_length(contexts, params, self.llm.llm_engine.model_config.max_model_len)
        requests: list[TokensPrompt] = [{"prompt_token_ids": list(ids)} for ids in contexts]
        sampling_params = [
            SamplingParams(
                max_tokens=params.limit,
                temperature=params.temperature,
                stop_token_ids=list(params.stop),
                ignore_eos=True,
                seed=int(seed),
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                skip_clone=True,
            )
            for seed in key
        ]
        responses = self.llm.generate(requests, sampling_params, use_tqdm=False)
        outputs = [response.outputs[0] for response in responses]
        logprobs = [cast("FlatLogprobs", output.logprobs) for output in outputs]
        # A position may list other tokens, too; the generated token is the first.
        chosen = [
            np.asarray(text.logprobs)[np.asarray(text.start_indices, int)] for text in logprobs
        ]
        return Completions(
            token=np.concatenate([np.asarray(o.token_ids, np.int32) for o in outputs]),
            logprob=np.concatenate(chosen).astype(np.float32),
            start=ragged.starts(np.array([len(output.token_ids) for output in outputs])),
        )

    def _can_search(self) -> bool:
        """Return whether vLLM's worker supports searches; log a warning if not."""
        missing: str = self._call("orchard_missing")
        if missing:
            _log.warning(
                "searching by requests, which is slower (rollout.decode = requests): %s; on a GPU, "
                "VLLM_USE_V2_MODEL_RUNNER=0 chooses the older model runner",
                missing,
            )
        return not missing

    def _check_values(self, value_head: ValueHead | None) -> None:
        """Raise EngineError if there is a value head and searches run by requests."""
        if value_head is not None and not self._in_worker:
            raise EngineError(
                "the policy has a value head, and searches by requests cannot run it: vLLM's "
                "public interface gives no hidden states; search in the worker "
                '(rollout.decode = "worker"), set the engine to "torch", or set '
                "model.value_head = false"
            )

    def _call(self, method: str, *args: object) -> Any:
        """Call a worker method on all ranks and return the result of the first one."""
        return self.llm.collective_rpc(method, args=args)[0]

    def _reset_prefix_cache(self) -> None:
        """Reset vLLM's prefix cache; raise EngineError if a request is unfinished."""
        if not self.llm.reset_prefix_cache():
            raise EngineError(
                "vLLM still holds pages of unfinished requests; wait for them before a search"
            )


def _start(folder: Path, config: RolloutConfig, ranks: int, *, longest: int, seed: int) -> "LLM":
    """Start a vLLM engine for the policy in `folder`, whose maximum length is `longest` tokens.

    Raises:
        EngineError: vLLM is not usable, or cannot serve the policy.
    """
    os.environ.update(_ENVIRONMENT)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    logging.getLogger("torch").setLevel(logging.ERROR)
    check_vllm()
    try:
        from vllm import LLM
    except ImportError as error:
        raise EngineError(f"vLLM is not usable ({error}); set rollout.engine = torch") from error
    memory: dict[str, Any]
    max_batched_tokens = _MAX_BATCHED_TOKENS
    if config.gpus:
        memory = {"gpu_memory_utilization": config.gpu_memory}
    else:
        # Pages of 32 tokens are the smallest that the CPU kernels support. Prompts must not be
        # chunked: a request with a seed would have its generator rewound, which torch supports on
        # GPUs only.
        memory = {
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            "block_size": 32,
            "enable_chunked_prefill": False,
        }
        max_batched_tokens = max(max_batched_tokens, longest)
    try:
        return LLM(
            str(folder),
            dtype=config.dtype,
            seed=seed,
            tensor_parallel_size=ranks,
            skip_tokenizer_init=True,
            enforce_eager=True,
            worker_extension_cls="rollout.engine.worker.SearchExtension",
            use_tqdm_on_load=False,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            max_logprobs=-1,
            max_model_len=-1,
            max_num_seqs=1024,
            # One group of pages for layers with and without windows; the kernels apply windows.
            disable_hybrid_kv_cache_manager=True,
            max_num_batched_tokens=max_batched_tokens,
            **memory,
        )
    except (RuntimeError, ValueError) as error:
        raise EngineError(
            f"vLLM cannot serve {folder}: {error}; see rollout.kv_cache_gib and rollout.gpu_memory"
        ) from error


def _repack_head(model: nn.Module) -> None:
    """Repack the weights of a tied head after a weight update.

    On a CPU each layer multiplies by a packed copy of its weights, made when they are loaded. A
    head tied to the embeddings is loaded with them, under their name, so that vLLM renews the
    packed copy of the embeddings only. Some models have no separate head module.
    """
    head: Any = getattr(model, "lm_head", None)
    if head is not None:
        head.quant_method.process_weights_after_loading(head)
