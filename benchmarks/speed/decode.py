"""Benchmark constrained tree decoding: Orchard's engines, the common alternatives, and a floor.

All decode the same prompts with the same weights, a fresh Qwen3 of the default sizes over 20,000
random items with three codes each, on one thread, with interleaved repeats. Hugging Face's beam
search renormalizes under its constraint, so that it solves the same problem. vLLM's own beam
search is timed without a constraint, which is less work: its public interface takes a grammar, not
tokens per beam, and xgrammar, which compiled the choice among 1,000 items in 0.6 s, had not
compiled that among 5,000 after a minute. The floor is the prefill of the prompts and one forward
pass of all beams per further level, without a search.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.shared.hugging_face import Allowed, allowed_tokens, beams, strong_beams
from benchmarks.shared.measure import Report, Row, figure, interleaved, report
from benchmarks.speed.learner import VERSION, Setting, default_setting, random_prompts
from orchard.policy.item_tokenizer import compact_tokenizer
from orchard.settings import RolloutConfig
from orchard.testing import save_model_folder
from rollout.candidates import Candidates
from rollout.engine.paged import ForwardBatch
from rollout.engine.requests import RequestBackend
from rollout.engine.torch import TorchEngine
from rollout.engine.vllm import VllmEngine
from rollout.engine.worker import VllmModel
from rollout.search.beam import beam

BATCH, LENGTH, LEVELS = 32, 128, 3
"""Number of prompts, tokens per prompt and codes per item of the reported figures."""

Codes = set[tuple[int, ...]]
"""Candidates of one prompt as token ids."""


@dataclass(frozen=True, kw_only=True)
class Rivals:
    """Models and engines of the compared methods."""

    setting: Setting
    model: PreTrainedModel
    """Policy for the methods that run in this process."""
    engine: VllmEngine
    stock: dict[int, Any]
    """Unmodified vLLM engines by block size."""
    allowed: Allowed


def run(quick: bool) -> Report:
    """Decode 32 prompts with beams of 16 and 50; `quick` takes 4 prompts and one width."""
    torch.set_num_threads(1)
    batch, repeats = (4, 3) if quick else (BATCH, 10)
    rivals = _rivals()
    rows: list[Row] = []
    figures = []
    for width in (16,) if quick else (16, 50):
        row, equal = _compare(rivals, batch, width, repeats)
        rows.append(row)
        conditions = f"B={batch}, P={LENGTH}, W={width}, L={LEVELS}, FP32, one thread"
        stock = min(float(row[f"vllm_beam_search_{block}_s"]) for block in rivals.stock)
        worker = float(row["worker_s"])
        figures += [
            figure(f"equal_beams_w{width}", equal, "share", asked="== 1",
                   note=f"in-worker = requests = torch = all three of Hugging Face, {conditions}"),
            figure(f"over_vllm_beam_search_w{width}", stock / worker, "x", asked=">= 5",
                   note=f"unconstrained, the faster of blocks {', '.join(map(str, rivals.stock))}; "
                   f"its grammars do not take so many items, {conditions}"),
            figure(f"over_hugging_face_w{width}", float(row["hf_generate_s"]) / worker, "x",
                   asked=">= 10", note=f"generate with prefix_allowed_tokens_fn, {conditions}"),
            figure(f"over_hugging_face_strong_w{width}", float(row["hf_strong_s"]) / worker, "x",
                   asked=">= 1.5", note=f"prompts computed once, dense masks, {conditions}"),
            figure(f"over_floor_w{width}", worker / float(row["floor_s"]), "x",
                   asked=f"<= {2 if width == 16 else 2.5}", note=f"no search at all, {conditions}"),
        ]  # fmt: skip
    return report("decode", figures, rows)


def _rivals() -> Rivals:
    """Create the engines of all methods with the same weights."""
    setting = default_setting()
    folder = Path(tempfile.mkdtemp(prefix="orchard-decode-"))
    save_model_folder(setting.model, compact_tokenizer(setting.catalog), folder)
    tokenizer = setting.tokenizer
    config = RolloutConfig(threads=1, kv_cache_gib=1.0)
    engine = VllmEngine(folder, setting.model, tokenizer, VERSION, config, seed=0)
    from vllm import LLM

    stock = {
        block: LLM(
            str(folder), dtype="float32", enforce_eager=True, block_size=block, max_num_seqs=1024,
            max_num_batched_tokens=8192, max_logprobs=-1, kv_cache_memory_bytes=2**30,
            max_model_len=256,
        )
        for block in (32, 128)
    }  # fmt: skip
    torch.set_num_threads(1)  # vLLM sets its own
    return Rivals(
        setting=setting,
        model=setting.model,
        engine=engine,
        stock=stock,
        allowed=allowed_tokens(tokenizer),
    )


def _compare(rivals: Rivals, batch: int, width: int, repeats: int) -> tuple[Row, float]:
    """Measure the median seconds of every method, and the share of prompts with equal beams."""
    setting = rivals.setting
    tokenizer = setting.tokenizer
    prompts = random_prompts(tokenizer, batch, LENGTH, np.random.default_rng(batch))
    token = torch.from_numpy(prompts.token.astype(np.int64)).view(batch, LENGTH)
    search_fn = partial(beam, width=width)
    reference = TorchEngine(rivals.model, tokenizer, VERSION)
    requests = RequestBackend(rivals.engine.llm, tokenizer, VERSION)

    def by_requests() -> Candidates:
        rivals.engine.llm.reset_prefix_cache()
        return search_fn(requests, prompts)

    ways: dict[str, Callable[[], Any]] = {
        "worker": lambda: rivals.engine.run(search_fn, prompts),
        "requests": by_requests,
        "torch": lambda: search_fn(reference, prompts),
        "hf_generate": lambda: _generate(rivals, token, width),
        "hf_processor": lambda: _generate(rivals, token, width, processor=True),
        "hf_strong": lambda: _strong(rivals, token, width),
        **{
            f"vllm_beam_search_{block}": partial(_stock_search, llm, token, width)
            for block, llm in rivals.stock.items()
        },
        "floor": lambda: rivals.engine.llm.collective_rpc(_floor, args=(token, width)),
    }
    orchard_candidates = rivals.engine.run(search_fn, prompts)
    expected = _found(setting, orchard_candidates)
    other_codes = [_found(setting, ways[name]()) for name in ("requests", "torch")]
    other_codes += [ways[name]() for name in ("hf_generate", "hf_processor", "hf_strong")]
    equal = [all(o[i] == expected[i] for o in other_codes) for i in range(batch)]
    seconds = interleaved(ways, repeats=repeats)
    row: dict[str, str | int | float | bool] = {
        "prompts": batch,
        "width": width,
        "forward_tokens": orchard_candidates.cost.forward_tokens,
        "prefill_tokens": orchard_candidates.cost.prefill_tokens,
        "passes": orchard_candidates.cost.passes,
        "hf_prefill_tokens": batch * width * LENGTH,
        "hf_forward_tokens": batch * width * (LEVELS - 1),
    }
    return row | {f"{name}_s": value for name, value in seconds.items()}, float(np.mean(equal))


def _found(setting: Setting, candidates: Candidates) -> list[Codes]:
    """Return the token ids of each prompt's candidates."""
    node = torch.from_numpy(candidates.node)
    token = setting.tokenizer.token_of(node.reshape(-1)).view(node.shape).tolist()
    bounds = candidates.start.tolist()
    return [{tuple(t) for t in token[a:b]} for a, b in pairwise(bounds)]


def _generate(rivals: Rivals, token: Tensor, width: int, *, processor: bool = False) -> list[Codes]:
    """Run Hugging Face's beam search, constrained by its hook or by a logits processor."""
    codes = beams(
        rivals.model, token, rivals.allowed, width=width, levels=LEVELS, processor=processor
    )
    return [{tuple(c) for c in rows} for rows in codes.tolist()]


def _strong(rivals: Rivals, token: Tensor, width: int) -> list[Codes]:
    """Run an optimized beam search on Hugging Face's model: one prefill per prompt, then beams."""
    codes = strong_beams(rivals.model, token, rivals.allowed, width=width, levels=LEVELS)
    return [{tuple(c) for c in rows} for rows in codes.tolist()]


def _stock_search(llm: Any, token: Tensor, width: int) -> object:
    """Run vLLM's own beam search, without a constraint, from an empty prefix cache."""
    from vllm.sampling_params import BeamSearchParams

    llm.reset_prefix_cache()
    params = BeamSearchParams(beam_width=width, max_tokens=LEVELS, ignore_eos=True)
    return llm.beam_search([{"prompt_token_ids": row} for row in token.tolist()], params)


@torch.inference_mode()
def _floor(worker: Any, token: Tensor, width: int) -> None:
    """Run the prefill and one forward pass per further level on preallocated pages."""
    model = VllmModel(worker.model_runner)
    batch, length = token.shape
    page_size = model.page_size
    pages_per_row = -(-(length + LEVELS) // page_size)
    page_table = 1 + torch.arange(batch * width * pages_per_row, dtype=torch.int32).view(
        batch * width, pages_per_row
    )
    model.forward(_pass(page_table[::width], token, 0, page_size))
    for level in range(1, LEVELS):
        code = token[:, :1].repeat_interleave(width, 0)
        for rows in _slices(batch * width, model.max_spans):
            model.forward(
                _pass(page_table[rows] % model.num_pages, code[rows], length + level - 1, page_size)
            )


def _slices(total: int, max_rows: int) -> Iterable[slice]:
    """Split `total` rows into slices of at most `max_rows`."""
    return (slice(start, min(start + max_rows, total)) for start in range(0, total, max_rows))


def _pass(pages: Tensor, token: Tensor, num_cached: int, page_size: int) -> ForwardBatch:
    """Build a batch of spans of equal length after `num_cached` tokens each."""
    num_rows, span_length = token.shape
    position = (num_cached + torch.arange(span_length)).repeat(num_rows)
    row = torch.arange(num_rows).repeat_interleave(span_length)
    return ForwardBatch(
        token=token.reshape(-1),
        position=position,
        slot=pages[row, position // page_size].long() * page_size + position % page_size,
        start=torch.arange(num_rows + 1) * span_length,
        length=torch.full((num_rows,), num_cached + span_length),
        pages=pages,
    )
