"""vLLM inside this process: the engine's life, its weights, and where its searches run.

`decode = worker` searches next to the model (`rollout.engine.worker`); `decode = requests` asks
through vLLM's public interface (`rollout.engine.requests`), slower and with equal results.

The key-value cache has one owner at a time. While a search runs it is the search's, and nothing
else may be under way; when the search ends, vLLM's record of what the cache held is thrown away,
so that generation starts from a clean one.
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
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import head_weight
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
    check_weights,
)
from rollout.engine.requests import RequestBackend

if TYPE_CHECKING:
    from vllm import LLM, TokensPrompt
    from vllm.logprobs import FlatLogprobs

_log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process and dies with it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines and learner share the cores they are given
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

_TOKENS_AT_ONCE = 8192
"""Of prompts in one forward pass, where none is longer."""


class VllmEngine:
    """Holds a policy in a vLLM engine inside this process, which it takes over for good."""

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
        """Load the policy saved in `folder`: `model`, whose weights `version` names.

        Raises:
            EngineError: vLLM is not installed, cannot serve the policy within its memory, or is to
                search by requests with a policy that has a value head.
        """
        self.version = version
        head = head_weight(model)
        self._width = head.shape[1]
        weights, value_head = value_heads.split(snapshot(model), self._width)
        self._head = next(name for name, weight in model.named_parameters() if weight is head)
        with torch.device("meta"):
            self._shapes = AutoModelForCausalLM.from_config(model.config)
        self._in_worker = config.decode == "worker"
        self._check_values(value_head)  # before vLLM takes its time to start
        self._ranks = max(1, int(config.gpus))
        # On a CPU the worker lives in this process, and nothing has to travel to it.
        self._sender = PayloadEncoder() if config.gpus else None
        longest = int(model.config.max_position_embeddings)
        self.llm = _start(folder, config, self._ranks, longest=longest, seed=seed)
        self._requests = RequestBackend(self.llm, tokenizer, version)
        if self._in_worker and not self._can_search():
            self._in_worker = False
            self._check_values(value_head)
        if self._in_worker:
            head = weights[self._head]
            self._call("orchard_attach", tokenizer, version, head, value_head)

    def load_weights(self, version: PolicyVersion, weights: Weights) -> None:
        """Answer with these weights from now on; see `InferenceEngine.load_weights`."""
        check_weights(version, weights)
        weights, value_head = value_heads.split(weights, self._width)
        self._check_values(value_head)
        restore(self._shapes, weights)  # raises before vLLM has loaded half of them
        tensors = ((name, torch.from_numpy(np.array(part))) for name, part in weights.items())
        # Other processes are sent all copies at once; in this one they are made one by one.
        sent = tensors if self._ranks == 1 else list(tensors)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": sent})
        self.llm.apply_model(_repack_head)
        if self._in_worker:
            self._call("orchard_load_weights", version, weights[self._head], value_head)
        self._forget_prefixes()
        self.version = self._requests.version = version

    def set_catalog(self, catalog: Catalog) -> None:
        """Search these items from now on; see `InferenceEngine.set_catalog`."""
        if self._in_worker:
            self._call("orchard_set_catalog", catalog)
        self._requests.tokenizer = self._requests.tokenizer.with_catalog(catalog)

    def run(
        self, find: Callable[[DecodingBackend, Prompts], Candidates], prompts: Prompts
    ) -> Candidates:
        """Run a search next to the model; see `SearchRunner.run`."""
        if not self._in_worker:
            return find(self._requests, prompts)
        if self.llm.llm_engine.has_unfinished_requests():
            raise EngineError(
                "vLLM is generating, and a search needs its key-value cache; "
                "search when the requests are finished"
            )
        search = find if self._sender is None else self._sender.encode(find)
        try:
            return self._call("orchard_run", search, prompts)
        finally:
            self._forget_prefixes()

    def generate(
        self, contexts: Sequence[Sequence[int]], key: Int64[np.ndarray, " R"], how: GenerationParams
    ) -> Completions:
        """Continue each context with text, all at once; see `Holder.write`.

        What contexts have in common, vLLM's prefix cache computes once, page by page.
        """
        from vllm import SamplingParams

        check_context_length(contexts, how, self.llm.llm_engine.model_config.max_model_len)
        requests: list[TokensPrompt] = [{"prompt_token_ids": list(one)} for one in contexts]
        params = [
            SamplingParams(
                max_tokens=how.limit,
                temperature=how.temperature,
                stop_token_ids=list(how.stop),
                ignore_eos=True,
                seed=int(one),
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                skip_clone=True,
            )
            for one in key
        ]
        outputs = [o.outputs[0] for o in self.llm.generate(requests, params, use_tqdm=False)]
        logprobs = [cast("FlatLogprobs", output.logprobs) for output in outputs]
        # Each position may list others, too; its own token is the first.
        first = [np.asarray(one.logprobs)[np.asarray(one.start_indices, int)] for one in logprobs]
        return Completions(
            token=np.concatenate([np.asarray(o.token_ids, np.int32) for o in outputs]),
            logprob=np.concatenate(first).astype(np.float32),
            start=ragged.starts(np.array([len(output.token_ids) for output in outputs])),
        )

    def _can_search(self) -> bool:
        """Whether vLLM's worker has all that a search needs; says so once where it has not."""
        missing: str = self._call("orchard_missing")
        if missing:
            _log.warning(
                "searching by requests, which is slower (rollout.decode = requests): %s; on a GPU, "
                "VLLM_USE_V2_MODEL_RUNNER=0 chooses the older model runner",
                missing,
            )
        return not missing

    def _check_values(self, value_head: ValueHead | None) -> None:
        if value_head is not None and not self._in_worker:
            raise EngineError(
                "the policy has a value head, and searches by requests cannot run it: vLLM's "
                "public interface gives no hidden states; search in the worker "
                '(rollout.decode = "worker"), set the engine to "torch", or set '
                "model.value_head = false"
            )

    def _call(self, method: str, *args: object) -> Any:
        """The answer of the first rank; all of them do the same."""
        return self.llm.collective_rpc(method, args=args)[0]

    def _forget_prefixes(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise EngineError(
                "vLLM still holds pages of unfinished requests; wait for them before a search"
            )


def _start(folder: Path, config: RolloutConfig, ranks: int, *, longest: int, seed: int) -> "LLM":
    """A vLLM engine for the policy in `folder`, which reads at most `longest` tokens.

    Raises:
        EngineError: it cannot be had.
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
    at_once = _TOKENS_AT_ONCE
    if config.gpus:
        memory = {"gpu_memory_utilization": config.gpu_memory}
    else:
        # Pages of 32 tokens are the smallest that the CPU kernels take. A prompt must not be cut: a
        # request with a seed would have its generator wound back, which torch does on GPUs alone.
        memory = {
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            "block_size": 32,
            "enable_chunked_prefill": False,
        }
        at_once = max(at_once, longest)
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
            max_num_batched_tokens=at_once,
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
