"""Benchmark searches and updates on one GPU, without Ray and vLLM.

Policies have random weights in the shapes of Qwen3: about 0.1 billion parameters, and Qwen3-0.6B
with its vocabulary of 151,936. The catalog has 100,000 items of three codes below 256. Ways are
compared on the same card in the same process. `python -m benchmarks.speed.gpu FILE` writes the
figures where the command line of Orchard is not installed.
"""

import copy
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.shared import hugging_face
from benchmarks.shared.measure import Report, Row, report
from benchmarks.speed.learner import random_prompts, with_hits
from learner.advantage.estimators import ESTIMATORS
from learner.batch.microbatch import micro_batches
from learner.batch.pack import flatten, pack
from learner.blocks import checkpoint_blocks
from learner.logprobs import choice_logprobs, score_choices, to_tensors
from learner.loss import policy_loss
from learner.tree_states import choose_attention
from learner.vocabulary import vocabulary_logprobs
from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.errors import EngineError
from orchard.policy.item_tokenizer import ItemTokenizer, compact_tokenizer, make_item_tokenizer
from orchard.policy.model import head_weight
from orchard.settings import LearnerConfig
from orchard.types import PolicyVersion, Prompts, ScoredTrees, TrainBatch
from rewards.score import score_trees
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees

VERSION = PolicyVersion(step=0, digest="")
CODES = (256, 256, 256)
GROUP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Shape of a policy."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {
    "0.1B": Shape(layers=12, width=768, inner=2048, heads=12, kv_heads=4, vocabulary=1024),
    "0.6B": Shape(layers=28, width=1024, inner=3072, heads=16, kv_heads=8, vocabulary=151_936),
}
TINY = Shape(layers=2, width=64, inner=128, heads=2, kv_heads=1, vocabulary=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Catalog and tokens, and the device that policies are on."""

    catalog: Catalog
    tokenizer: ItemTokenizer
    device: torch.device

    def policy(self, shape: Shape) -> PreTrainedModel:
        """Create a policy with random weights in float32."""
        config = Qwen3Config(
            vocab_size=max(shape.vocabulary, self.tokenizer.size), hidden_size=shape.width,
            intermediate_size=shape.inner, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=128 if shape.width >= 1024 else 64, max_position_embeddings=8192,
            tie_word_embeddings=True, eos_token_id=None, pad_token_id=self.tokenizer.pad,
        )  # fmt: skip
        torch.manual_seed(0)
        with self.device:
            return Qwen3ForCausalLM(config).eval()

    def prompts(self, count: int, length: int) -> Prompts:
        """Create prompts of random codes, whose targets are random items."""
        return random_prompts(self.tokenizer, count, length, np.random.default_rng(length))

    def trees(self, model: PreTrainedModel, count: int, length: int) -> ScoredTrees:
        """Return the scored beams of a policy, half of them with a hit."""
        prompts = self.prompts(count, length)
        engine = TorchEngine(model, self.tokenizer, VERSION)
        found = beam(engine, prompts, width=GROUP)
        trees = build_search_trees(prompts, found, self.tokenizer, VERSION)
        trees = with_hits(trees, self.catalog, np.random.default_rng(1))
        return score_trees(trees, self.catalog, {"rule": 1.0, "ranking": 1.0})


def run(quick: bool) -> Report:
    """Run all parts on the GPU; `quick` runs them with tiny shapes on the CPU if there is none."""
    if not torch.cuda.is_available() and not quick:
        raise EngineError("this bench needs a GPU, and torch sees none; --quick runs on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codes = np.random.default_rng(0).integers(CODES, size=(2_000 if quick else 100_000, 3))
    catalog = catalogs.from_codes(codes.tolist(), level_size=CODES)
    tokenizer = make_item_tokenizer(compact_tokenizer(catalog), catalog)
    world = World(catalog=catalog, tokenizer=tokenizer, device=device)
    shapes = {"tiny": TINY} if quick else SHAPES
    rows: list[Row] = []
    for part in (_equality, _updates, _searches, _vocabulary):
        begin = time.perf_counter()
        rows += part(world, shapes, quick=quick)
        print(f"{part.__name__[1:]}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    return report("gpu", [], rows)


def _equality(world: World, shapes: dict[str, Shape], *, quick: bool) -> list[Row]:
    """Compare ways to compute log-probabilities and gradients with float32 on the CPU."""
    shape = TINY if quick else replace(SHAPES["0.1B"], layers=4)
    policy = world.policy(shape).to("cpu")
    scored = world.trees(policy, 4, 64)
    batch = pack(scored, [ESTIMATORS["group"](scored, 1e-4)], world.tokenizer)
    expected = _loss_and_gradients(policy, batch, world.tokenizer, "dense", "float32")
    rows: list[Row] = []
    for attention in ("dense", "flex"):
        for dtype in ("float32", "bfloat16"):
            if world.device.type == "cpu" and (attention, dtype) != ("dense", "float32"):
                continue  # FlexAttention trains on GPUs alone
            ours = nn.Module.to(copy.deepcopy(policy), device=world.device)
            tokenizer = world.tokenizer.to(world.device)
            got = _loss_and_gradients(ours, batch, tokenizer, attention, dtype)
            gradient = max(
                float((a - b).norm() / b.norm()) for a, b in zip(got[1], expected[1], strict=True)
            )
            rows.append({
                "part": "equality", "way": f"{attention}, {dtype}",
                "logprob_gap": float((got[0] - expected[0]).abs().max()),
                "gradient_difference": gradient,
            })  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        ours = nn.Module.to(copy.deepcopy(policy), device=world.device, dtype=dtype)
        engine = TorchEngine(ours, world.tokenizer, VERSION)
        found = beam(engine, scored.trees.prompts, width=GROUP)
        exact = beam(TorchEngine(policy, world.tokenizer, VERSION), scored.trees.prompts,
                     width=GROUP)  # fmt: skip
        both = [np.intersect1d(found.leaf[rows_of], exact.leaf[rows_of]).size / GROUP
                for rows_of in np.split(np.arange(len(exact.leaf)), 4)]  # fmt: skip
        rows.append({
            "part": "equality", "way": f"search, {str(dtype).removeprefix('torch.')}",
            "same_candidates": float(np.mean(both)),
            "score_gap": float(np.abs(found.score - exact.score).max()),
        })  # fmt: skip
    return rows


def _loss_and_gradients(
    policy: PreTrainedModel, batch: TrainBatch, tokenizer: ItemTokenizer, attention: str, dtype: str
) -> tuple[Tensor, list[Tensor]]:
    """Return log-probabilities and gradients of a batch, on the CPU."""
    choose_attention(policy, attention)  # type: ignore[arg-type]
    device = head_weight(policy).device
    policy.zero_grad()
    on_device = to_tensors(batch, device)
    with _precision(device, dtype):
        scores = choice_logprobs(policy, on_device, tokenizer)
        loss, _ = policy_loss(*scores, on_device.behaviour_logprob, on_device, LearnerConfig())
    loss.backward()
    gradients = [p.grad.cpu() for p in policy.parameters() if p.grad is not None]
    return scores[0].detach().float().cpu(), gradients


@contextmanager
def _precision(device: torch.device, dtype: str) -> Iterator[None]:
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        yield


def _updates(world: World, shapes: dict[str, Shape], *, quick: bool) -> list[Row]:
    """Time updates, forward and backward, of packed trees and of separate sequences."""
    rows: list[Row] = []
    tokenizer = world.tokenizer.to(world.device)
    for name, shape in shapes.items():
        for length, count in [(64, 4)] if quick else [(300, 32), (2500, 8)]:
            policy = world.policy(shape)
            scored = world.trees(policy, count, length)
            credits = [ESTIMATORS["group"](scored, 1e-4)]
            packed = pack(scored, credits, world.tokenizer)
            flat = flatten(scored, credits, world.tokenizer)
            ways = {
                "packed, dense": (packed, "dense", False),
                "flat": (flat, "dense", False),
                "packed, flex": (packed, "flex", False),
                "packed, flex, checkpointed": (packed, "flex", True),
            }
            if world.device.type == "cpu":
                ways = {k: v for k, v in ways.items() if v[1] == "dense"}
            for way, (batch, attention, checkpointed) in ways.items():
                choose_attention(policy, attention)  # type: ignore[arg-type]
                if checkpointed:
                    checkpoint_blocks(policy)
                size = 8 if way == "flat" and length > 1000 else GROUP * 4
                parts = _parts(batch, size) if way == "flat" else [batch]
                tensors = [to_tensors(part, world.device) for part in parts]

                def update(
                    policy: PreTrainedModel = policy,
                    tensors: list[TrainBatch[Tensor]] = tensors,
                    way: str = way,
                ) -> None:
                    policy.zero_grad()
                    for part in tensors:
                        with _precision(world.device, "bfloat16"):
                            score = _flat_logprobs if way == "flat" else choice_logprobs
                            scores = score(policy, part, tokenizer)
                            loss, _ = policy_loss(
                                *scores, part.behaviour_logprob, part, LearnerConfig()
                            )
                        loss.backward()

                seconds, peak = _timed(world, update, repeats=3)
                rows.append({
                    "part": "updates", "policy": name, "prompt_tokens": length, "prompts": count,
                    "candidates": GROUP, "way": way, "seconds": seconds,
                    "tokens_per_s": batch.forward_tokens / seconds,
                    "flat_tokens_per_s": batch.flat_tokens / seconds, "peak_gib": peak,
                })  # fmt: skip
            del policy
    return rows


def _parts(batch: TrainBatch, size: int) -> list[TrainBatch]:
    """Split a batch into parts of `size` rows, as memory demands of separate sequences."""
    return list(micro_batches(batch, size * batch.token.shape[1]))


def _flat_logprobs(
    policy: PreTrainedModel, batch: TrainBatch[Tensor], tokenizer: ItemTokenizer
) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities of separate sequences with the model's own causal attention."""
    output = policy.base_model(input_ids=batch.token, use_cache=False)
    return score_choices(output.last_hidden_state, head_weight(policy), batch, tokenizer)


def _searches(world: World, shapes: dict[str, Shape], *, quick: bool) -> list[Row]:
    """Time searches in bfloat16, alone and in batches, and one of Hugging Face's beams."""
    rows: list[Row] = []
    allowed = hugging_face.allowed_tokens(world.tokenizer)
    for name, shape in shapes.items():
        policy = nn.Module.to(world.policy(shape), dtype=torch.bfloat16)
        engine = TorchEngine(policy, world.tokenizer, VERSION)
        for length in (64,) if quick else (300, 2500):
            for count in (1, 4) if quick else (1, 16):
                prompts = world.prompts(count, length)
                for width in (8,) if quick else (50, 128, 512):
                    search = partial(beam, engine, prompts, width=width)
                    seconds, peak = _timed(world, search, repeats=5)
                    prefill, _ = _timed(world, partial(engine.prefill, prompts), repeats=5)
                    rows.append({
                        "part": "searches", "policy": name, "prompt_tokens": length,
                        "prompts": count, "width": width, "seconds": seconds,
                        "prefill_s": prefill, "requests_per_s": count / seconds, "peak_gib": peak,
                    })  # fmt: skip
        token = torch.from_numpy(world.prompts(1, 64 if quick else 300).token.astype(np.int64))
        token = token[None].to(world.device)
        width = 8 if quick else 50
        generate = partial(hugging_face.beams, policy, token, allowed, width=width, levels=3)
        seconds, _ = _timed(world, generate, repeats=2)
        rows.append({
            "part": "searches", "policy": name, "prompt_tokens": token.shape[1], "prompts": 1,
            "width": width, "way": "generate with prefix_allowed_tokens_fn", "seconds": seconds,
            "requests_per_s": 1 / seconds,
        })  # fmt: skip
        del policy, engine
    return rows


def _vocabulary(world: World, shapes: dict[str, Shape], *, quick: bool) -> list[Row]:
    """Compare log-probabilities over a vocabulary of 151,936 at once and in parts."""
    queries, width, size = (64, 32, 5_000) if quick else (16_384, 1024, 151_936)
    torch.manual_seed(0)
    with world.device:
        hidden = torch.randn(queries, width, requires_grad=True)
        head = (0.02 * torch.randn(size, width)).requires_grad_()
        query = torch.arange(queries)
        token = torch.randint(size, (queries,))
    rows: list[Row] = []
    for way, bound in (("in parts", 2**26 if not quick else size * 8), ("at once", 2**62)):

        def update(bound: int = bound) -> None:
            hidden.grad = head.grad = None
            with _precision(world.device, "bfloat16"):
                logprob, _ = vocabulary_logprobs(hidden, head, query, token, max_logits=bound)
            logprob.sum().backward()

        try:
            seconds, peak = _timed(world, update, repeats=3)
        except torch.OutOfMemoryError:
            rows.append({"part": "vocabulary", "way": way, "queries": queries, "out": "of memory"})
            continue
        rows.append({"part": "vocabulary", "way": way, "queries": queries, "tokens": size,
                     "seconds": seconds, "peak_gib": peak})  # fmt: skip
    return rows


def _timed(world: World, call: Callable[[], object], *, repeats: int) -> tuple[float, float]:
    """Return the median seconds of a call after two warm-up calls, and the peak memory in GiB."""
    cuda = world.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = list[float]()
    for _ in range(repeats + 2):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return float(np.median(times[2:])), peak


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    result = json.dumps(run(quick), indent=1)
    if names := [name for name in sys.argv[1:] if not name.startswith("--")]:
        Path(names[0]).write_text(result + "\n")
    print(result)
