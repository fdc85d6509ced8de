"""Constrained tree decoding: Orchard's engines against what is used elsewhere, and the floor.

All decode the same prompts with the same weights, a fresh Qwen3 of the default sizes over 20,000
random items with three codes each, on one thread, and take turns. Hugging Face's beam search is
asked to renormalise under its constraint, so that it solves the same problem. vLLM's own beam
search is timed without one, which is less work: its public interface takes a grammar, not tokens
per beam, and xgrammar, which compiled the choice among 1,000 items in 0.6 s, had not compiled that
among 5,000 after a minute. The floor is the prompts' prefill and one forward pass of all beams per
further level, with no search at all.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.learner import VERSION, Setting, default_setting, random_prompts
from benchmarks.shared.hugging_face import Allowed, allowed_tokens, beams, legal_logits
from benchmarks.shared.measure import Report, Row, figure, interleaved, report
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
"""Prompts, tokens of each, codes of an item: of the figures that were asked for."""

Codes = set[tuple[int, ...]]
"""What was found for one prompt, as token ids."""


@dataclass(frozen=True, kw_only=True)
class Rivals:
    """What is needed to decode in each of the ways."""

    setting: Setting
    model: PreTrainedModel
    """A copy for this process; the setting's own went to vLLM."""
    holder: VllmEngine
    stock: dict[int, Any]
    """vLLM engines as they come, by block size."""
    allowed: Allowed


def run(quick: bool) -> Report:
    """Beams of 16 and 50 for 32 prompts of 128 tokens; `quick` takes 4 prompts and one width."""
    torch.set_num_threads(1)
    batch, repeats = (4, 3) if quick else (BATCH, 10)
    rivals = _rivals()
    rows: list[Row] = []
    figures = []
    for width in (16,) if quick else (16, 50):
        row, equal = _compare(rivals, batch, width, repeats)
        rows.append(row)
        at = f"B={batch}, P={LENGTH}, W={width}, L={LEVELS}, FP32, one thread"
        stock = min(float(row[f"vllm_beam_search_{block}_s"]) for block in rivals.stock)
        worker = float(row["worker_s"])
        figures += [
            figure(f"equal_beams_w{width}", equal, "share", asked="== 1",
                   note=f"in-worker = requests = torch = all three of Hugging Face, {at}"),
            figure(f"over_vllm_beam_search_w{width}", stock / worker, "x", asked=">= 5",
                   note=f"unconstrained, the faster of blocks {', '.join(map(str, rivals.stock))}; "
                   f"its grammars do not take so many items, {at}"),
            figure(f"over_hugging_face_w{width}", float(row["hf_generate_s"]) / worker, "x",
                   asked=">= 10", note=f"generate with prefix_allowed_tokens_fn, {at}"),
            figure(f"over_hugging_face_strong_w{width}", float(row["hf_strong_s"]) / worker, "x",
                   asked=">= 1.5", note=f"prompts computed once, dense masks, {at}"),
            figure(f"over_floor_w{width}", worker / float(row["floor_s"]), "x",
                   asked=f"<= {2 if width == 16 else 2.5}", note=f"no search at all, {at}"),
        ]  # fmt: skip
    return report("decode", figures, rows)


def _rivals() -> Rivals:
    setting = default_setting()
    folder = Path(tempfile.mkdtemp(prefix="orchard-decode-"))
    save_model_folder(setting.model, compact_tokenizer(setting.catalog), folder)
    _trie, vocabulary = setting.catalog.trie, setting.tokenizer
    config = RolloutConfig(threads=1, kv_cache_gib=1.0)
    holder = VllmEngine(folder, setting.model, vocabulary, VERSION, config, seed=0)
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
        holder=holder,
        stock=stock,
        allowed=allowed_tokens(vocabulary),
    )


def _compare(rivals: Rivals, batch: int, width: int, repeats: int) -> tuple[Row, float]:
    """Median seconds of every way, its work, and the share of prompts with equal beams."""
    setting = rivals.setting
    _trie, vocabulary = setting.catalog.trie, setting.tokenizer
    prompts = random_prompts(setting, batch, LENGTH, np.random.default_rng(batch))
    token = torch.from_numpy(prompts.token.astype(np.int64)).view(batch, LENGTH)
    find = partial(beam, width=width)
    reference = TorchEngine(rivals.model, vocabulary, VERSION)
    requests = RequestBackend(rivals.holder.llm, vocabulary, VERSION)

    def by_requests() -> Candidates:
        rivals.holder.llm.reset_prefix_cache()
        return find(requests, prompts)

    ways: dict[str, Callable[[], Any]] = {
        "worker": lambda: rivals.holder.run(find, prompts),
        "requests": by_requests,
        "torch": lambda: find(reference, prompts),
        "hf_generate": lambda: _generate(rivals, token, width),
        "hf_processor": lambda: _generate(rivals, token, width, processor=True),
        "hf_strong": lambda: _strong(rivals, token, width),
        **{
            f"vllm_beam_search_{block}": partial(_stock_search, llm, token, width)
            for block, llm in rivals.stock.items()
        },
        "floor": lambda: rivals.holder.llm.collective_rpc(_floor, args=(token, width)),
    }
    ours = rivals.holder.run(find, prompts)
    expected = _found(setting, ours)
    others = [_found(setting, ways[name]()) for name in ("requests", "torch")]
    others += [ways[name]() for name in ("hf_generate", "hf_processor", "hf_strong")]
    equal = [all(o[i] == expected[i] for o in others) for i in range(batch)]
    seconds = interleaved(ways, repeats=repeats)
    row: dict[str, str | int | float | bool] = {
        "prompts": batch,
        "width": width,
        "forward_tokens": ours.cost.forward_tokens,
        "prefill_tokens": ours.cost.prefill_tokens,
        "passes": ours.cost.passes,
        "hf_prefill_tokens": batch * width * LENGTH,
        "hf_forward_tokens": batch * width * (LEVELS - 1),
    }
    return row | {f"{name}_s": value for name, value in seconds.items()}, float(np.mean(equal))


def _found(setting: Setting, candidates: Candidates) -> list[Codes]:
    """The token ids of each prompt's candidates."""
    _trie, node = setting.catalog.trie, torch.from_numpy(candidates.node)
    token = setting.tokenizer.token_of(node.reshape(-1)).view(node.shape).tolist()
    bounds = candidates.start.tolist()
    return [{tuple(t) for t in token[a:b]} for a, b in pairwise(bounds)]


def _generate(rivals: Rivals, token: Tensor, width: int, *, processor: bool = False) -> list[Codes]:
    """Hugging Face's beam search, by its own hook for constraints or by a processor."""
    found = beams(
        rivals.model, token, rivals.allowed, width=width, levels=LEVELS, processor=processor
    )
    return [{tuple(c) for c in rows} for rows in found.tolist()]


@torch.inference_mode()
def _strong(rivals: Rivals, token: Tensor, width: int) -> list[Codes]:
    """What a careful user writes with Hugging Face: one prefill per prompt, then all beams."""
    model, batch, tokens = cast(Any, rivals.model), len(token), rivals.setting.tokenizer.size
    cache = DynamicCache()
    logits = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    score, codes = torch.zeros(batch, 1), token.new_zeros(batch, 1, 0)
    for level in range(LEVELS):
        alive = codes.shape[1]
        prefix = [tuple(one) for one in codes.reshape(batch * alive, level).tolist()]
        legal = legal_logits(logits, prefix, rivals.allowed)
        step = legal.log_softmax(-1).view(batch, alive, tokens)
        score, flat = (score[:, :, None] + step).view(batch, -1).topk(width)
        parent, code = flat // tokens, flat % tokens
        kept = codes.gather(1, parent[:, :, None].expand(-1, -1, level))
        codes = torch.cat([kept, code[:, :, None]], -1)
        if level == LEVELS - 1:
            break
        rows = (torch.arange(batch)[:, None] * alive + parent).reshape(-1)
        cache.reorder_cache(rows)
        logits = model(codes[:, :, -1].reshape(-1, 1), past_key_values=cache).logits[:, -1]
    return [{tuple(c) for c in rows} for rows in codes.tolist()]


def _stock_search(llm: Any, token: Tensor, width: int) -> object:
    """VLLM's own beam search, without a constraint, from an empty prefix cache."""
    from vllm.sampling_params import BeamSearchParams

    llm.reset_prefix_cache()
    params = BeamSearchParams(beam_width=width, max_tokens=LEVELS, ignore_eos=True)
    return llm.beam_search([{"prompt_token_ids": row} for row in token.tolist()], params)


@torch.inference_mode()
def _floor(worker: Any, token: Tensor, width: int) -> None:
    """Prefill and the further levels' forward passes of the same model on pages laid out before."""
    model = VllmModel(worker.model_runner)
    batch, length = token.shape
    size = model.page_size
    per = -(-(length + LEVELS) // size)
    table = 1 + torch.arange(batch * width * per, dtype=torch.int32).view(batch * width, per)
    model.forward(_pass(table[::width], token, 0, size))
    for level in range(1, LEVELS):
        code = token[:, :1].repeat_interleave(width, 0)
        for rows in _slices(batch * width, model.max_spans):
            model.forward(
                _pass(table[rows] % model.num_pages, code[rows], length + level - 1, size)
            )


def _slices(total: int, most: int) -> Iterable[slice]:
    return (slice(at, min(at + most, total)) for at in range(0, total, most))


def _pass(pages: Tensor, token: Tensor, done: int, size: int) -> ForwardBatch:
    """Spans of equal length behind `done` tokens."""
    rows, span = token.shape
    position = (done + torch.arange(span)).repeat(rows)
    row = torch.arange(rows).repeat_interleave(span)
    return ForwardBatch(
        token=token.reshape(-1),
        position=position,
        slot=pages[row, position // size].long() * size + position % size,
        start=torch.arange(rows + 1) * span,
        length=torch.full((rows,), done + span),
        pages=pages,
    )
