"""Run searches inside vLLM's worker, on its model, paged cache and attention kernels.

vLLM mixes `SearchExtension` into its worker class. A batch is one remote call: in a tensor-parallel
group every rank runs the same deterministic search on its own copy of the trie and the head.

Shapes:  T tokens of a pass   F pages   D hidden width
"""

import logging
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from orchard.catalog.catalog import Catalog
from orchard.errors import EngineError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.value_head import ValueHead
from orchard.types import PolicyVersion, Prompts
from rollout.candidates import Candidates
from rollout.engine.paged import CacheFullError, ForwardBatch, PagedBackend
from rollout.engine.payload import PayloadDecoder, SearchPayload, split_search
from rollout.engine.protocol import SearchFn

_log = logging.getLogger(__name__)

_PARTS = ("model", "vllm_config", "attn_groups", "kv_cache_config", "kv_caches")
"""Attributes of vLLM's model runner that a search uses."""

_SPLITS = (
    "pipeline_parallel_size",
    "data_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)
"""Kinds of parallelism that searches do not support: no rank has the whole model or cache."""


class VllmModel:
    """Paged model of a vLLM worker, called without vLLM's scheduler."""

    def __init__(self, runner: Any) -> None:
        """Wrap the worker's model runner, for which `missing` must return an empty string."""
        self._runner = runner
        self._cache: list[Tensor] = list({c.data_ptr(): c for c in runner.kv_caches}.values())
        self.page_size = int(runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        self.num_pages = int(runner.kv_cache_config.num_blocks)
        scheduler = runner.vllm_config.scheduler_config
        self.max_tokens = int(scheduler.max_num_batched_tokens)
        self.max_spans = int(scheduler.max_num_seqs)
        self.max_length = int(runner.vllm_config.model_config.max_model_len)

    @property
    def device(self) -> torch.device:
        """Device of the cache."""
        return self._cache[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the hidden states."""
        return self._runner.vllm_config.model_config.dtype

    def forward(self, work: ForwardBatch) -> Float[Tensor, "T D"]:
        """Return the last hidden states of the tokens and write their keys and values."""
        from vllm.forward_context import set_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        runner, start, length = self._runner, work.start.int(), work.length.int()
        common = CommonAttentionMetadata(
            query_start_loc=start,
            query_start_loc_cpu=start.cpu(),
            seq_lens=length,
            seq_lens_cpu_upper_bound=length.cpu(),
            num_reqs=len(length),
            num_actual_tokens=len(work.token),
            max_query_len=int(work.start.diff().max()),
            max_seq_len=int(length.max()),
            block_table_tensor=work.pages,
            slot_mapping=work.slot,
            positions=work.position,
            causal=True,
        )
        metadata: dict[str, Any] = {}
        slots: dict[str, Tensor] = {}
        for group in runner.attn_groups[0]:
            built = group.build_metadata(common)
            for layer in group.layer_names:
                metadata[layer], slots[layer] = built, work.slot
        with set_forward_context(
            metadata, runner.vllm_config, num_tokens=len(work.token), slot_mapping=slots
        ):
            hidden: Tensor = runner.model(
                input_ids=work.token,
                positions=work.position,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        return hidden

    def copy_pages(self, source: Int64[Tensor, " F"], target: Int64[Tensor, " F"]) -> None:
        """Copy pages; the targets are distinct, and none of them is a source."""
        for cache in self._cache:
            # Kernels may use smaller blocks than the pages of the cache.
            pages = cache.unflatten(0, (self.num_pages, -1))
            pages[target] = pages[source]


def missing(runner: Any) -> str:
    """Return why the model runner does not support searches, or an empty string if it does."""
    absent = [part for part in _PARTS if getattr(runner, part, None) is None]
    if absent:
        return f"its model runner has no {', '.join(absent)}"
    groups = runner.kv_cache_config.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if len(groups) != 1 or not set(kinds) <= {"FullAttentionSpec", "SlidingWindowSpec"}:
        return f"the policy's cache is {len(groups)} groups of {', '.join(kinds)}"
    split = [part for part in _SPLITS if getattr(runner.vllm_config.parallel_config, part, 1) > 1]
    return f"vLLM runs with {', '.join(split)} above 1" if split else ""


def _heads(
    model: VllmModel, head: Shaped[np.ndarray, "tokens D"], value_head: ValueHead | None
) -> tuple[Float[Tensor, "tokens D"], ValueHead | None]:
    """Return both heads on the model's device, in its precision."""
    if value_head is not None:
        value_head = value_head.to(model.device, model.dtype)
    return torch.from_numpy(np.array(head)).to(model.device, model.dtype), value_head


class SearchExtension:
    """Worker methods for searches, which vLLM adds to its worker class; called on every rank."""

    model_runner: Any
    orchard_engine: PagedBackend
    orchard_parcels: PayloadDecoder
    orchard_batch: int

    def orchard_missing(self) -> str:
        """Return why this worker does not support searches, or an empty string if it does."""
        return missing(self.model_runner)

    def orchard_attach(
        self,
        tokenizer: ItemTokenizer,
        version: PolicyVersion,
        head: Shaped[np.ndarray, "tokens D"],
        value_head: ValueHead | None,
    ) -> None:
        """Prepare to search with the loaded policy, whose output matrix is `head`."""
        model = VllmModel(self.model_runner)
        self.orchard_engine = PagedBackend(
            model,
            tokenizer.to(model.device),
            version,
            *_heads(model, head, value_head),
        )
        self.orchard_parcels = PayloadDecoder(model.device)
        self.orchard_batch = 1 << 31

    def orchard_load_weights(
        self,
        version: PolicyVersion,
        head: Shaped[np.ndarray, "tokens D"],
        value_head: ValueHead | None,
    ) -> None:
        """Update version and heads after vLLM has loaded new weights."""
        heads = _heads(VllmModel(self.model_runner), head, value_head)
        self.orchard_engine.load_weights(version, *heads)

    def orchard_set_catalog(self, catalog: Catalog) -> None:
        """Replace the catalog to search."""
        engine = self.orchard_engine
        device = engine.trie.code.device
        engine.tokenizer = engine.tokenizer.with_catalog(catalog).to(device)

    def orchard_run(self, search: SearchFn | SearchPayload, prompts: Prompts) -> Candidates:
        """Run a search, overwriting vLLM's cache; split batches that do not fit into it.

        Raises:
            EngineError: the search of a single prompt does not fit, or the search raises it.
        """
        decode = self.orchard_parcels.decode
        search_fn = decode(search) if isinstance(search, SearchPayload) else search
        parts: list[Candidates] = []
        done = 0
        while done < len(prompts):
            rows = np.arange(done, min(done + self.orchard_batch, len(prompts)))
            try:
                part_fn = split_search(search_fn, rows)
                parts.append(part_fn(self.orchard_engine, prompts.select(rows)))
                done += len(rows)
            except CacheFullError as full:
                self._halve(len(rows), full)
        return Candidates.concatenate(parts)

    def _halve(self, num_prompts: int, full: CacheFullError) -> None:
        """Halve the batch size; raise EngineError if the batch is a single prompt."""
        if num_prompts == 1:
            raise EngineError(
                f"the search of one prompt needs more than {full.num_pages} pages of key-value "
                f"cache ({full.needed} so far); raise rollout.kv_cache_gib or rollout.gpu_memory, "
                "or lower rollout.group_size"
            ) from full
        self.orchard_batch = num_prompts // 2
        _log.warning(
            "%d prompts at once need more than %d pages of key-value cache; searching %d at a time "
            "from now on (raise rollout.kv_cache_gib or rollout.gpu_memory to search more)",
            num_prompts,
            full.num_pages,
            self.orchard_batch,
        )
