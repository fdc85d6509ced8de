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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from orchard.config import RolloutConfig
from orchard.errors import EngineError
from orchard.model import head_weight
from orchard.trie import Trie
from orchard.types import PolicyVersion, Prompts
from orchard.vocabulary import Vocabulary
from orchard.weights import Weights, restore, snapshot
from rollout.candidates import Candidates
from rollout.engine import Engine, check_weights
from rollout.engine.requests import RequestEngine

if TYPE_CHECKING:
    from vllm import LLM

_log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process and dies with it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines and learner share the cores they are given
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmHolder:
    """Holds a policy in a vLLM engine inside this process, which it takes over for good."""

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        trie: Trie,
        vocabulary: Vocabulary,
        version: PolicyVersion,
        config: RolloutConfig,
        *,
        seed: int,
    ) -> None:
        """Load the policy saved in `folder`: `model`, whose weights `version` names.

        Raises:
            EngineError: vLLM is not installed, or cannot serve the policy within its memory.
        """
        self.version = version
        weights = snapshot(model)
        head = head_weight(model)
        self._head = next(name for name, weight in model.named_parameters() if weight is head)
        with torch.device("meta"):
            self._shapes = AutoModelForCausalLM.from_config(model.config)
        self.llm = _start(folder, config, seed)
        self._requests = RequestEngine(self.llm, trie, vocabulary, version)
        self._in_worker = config.decode == "worker" and self._can_search()
        if self._in_worker:
            self._call("orchard_attach", trie, vocabulary, version, weights[self._head])

    def install(self, version: PolicyVersion, weights: Weights) -> None:
        """Answer with these weights from now on; see `Holder.install`."""
        check_weights(version, weights)
        restore(self._shapes, weights)  # raises before vLLM has loaded half of them
        tensors = ((name, torch.from_numpy(np.array(value))) for name, value in weights.items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        self.llm.apply_model(_repack_head)
        if self._in_worker:
            self._call("orchard_install", version, weights[self._head])
        self._forget_prefixes()
        self.version = self._requests.version = version

    def run(self, find: Callable[[Engine, Prompts], Candidates], prompts: Prompts) -> Candidates:
        """Run a search next to the model; see `Holder.run`."""
        if not self._in_worker:
            return find(self._requests, prompts)
        if self.llm.llm_engine.has_unfinished_requests():
            raise EngineError(
                "vLLM is generating, and a search needs its key-value cache; "
                "search when the requests are finished"
            )
        try:
            return self._call("orchard_run", find, prompts)
        finally:
            self._forget_prefixes()

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

    def _call(self, method: str, *args: object) -> Any:
        """The answer of the first rank; all of them do the same."""
        return self.llm.collective_rpc(method, args=args)[0]

    def _forget_prefixes(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise EngineError(
                "vLLM still holds pages of unfinished requests; wait for them before a search"
            )


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
            worker_extension_cls="rollout.engine.worker.SearchExtension",
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
