"""Generate thoughts, and search codes after them: the search `think`.

A thought is K blocks of free text per sample; block k of all samples is generated at once.

A sample is `<think> text </think>` K times, and then K codes. The opening tags are forced, as is
the closing tag of a block that has reached its maximum length; forced tokens are forwarded but get
no gradient. A policy that generates the end token within a block stops thinking: the closing tag is
forced and no block follows. Its codes are still searched, so that it has an item, but the sample
has too few blocks and gets no advantage for them (`learner.advantage.sapo`).

Shapes:  B prompts   S samples
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter

import numpy as np
from jaxtyping import Int64

from orchard import ragged
from orchard.errors import EngineError
from orchard.policy.item_tokenizer import ItemTokenizer, ThinkTokens
from orchard.settings import RolloutConfig
from orchard.types import Cost, Prompts, SearchTrees
from rollout.engine.protocol import Completions, GenerationParams, InferenceEngine, SearchFn
from rollout.search.batches import search_in_batches
from rollout.search.beam import beam
from rollout.search.draws import sample
from rollout.search.thoughts import Thoughts, attach_thoughts
from rollout.search_trees import build_search_trees

Generate = Callable[[Sequence[Sequence[int]], np.ndarray, GenerationParams], Completions]
"""Text generator with the signature of `rollout.engine.protocol.InferenceEngine.generate`."""


@dataclass
class _Sample:
    """Sample that is being generated."""

    context: list[int]
    token: list[int] = field(default_factory=list[int])
    logprob: list[float] = field(default_factory=list[float])
    forced: list[bool] = field(default_factory=list[bool])
    lengths: list[int] = field(default_factory=list[int])
    """Number of tokens of each block so far."""

    def add(self, token: Sequence[int], logprob: Sequence[float], *, forced: bool) -> None:
        """Append tokens to the last block."""
        self.context += token
        self.token += token
        self.logprob += logprob
        self.forced += [forced] * len(token)
        self.lengths[-1] += len(token)


def think(
    generate: Generate,
    prompts: Prompts,
    tags: ThinkTokens,
    *,
    count: int,
    num_blocks: int,
    block_tokens: int,
    temperature: float,
    seed: int,
) -> Thoughts:
    """Generate `count` independent thoughts of `num_blocks` blocks per prompt.

    Args:
        generate: text generation with the policy, as `InferenceEngine.generate`.
        prompts: prompts to continue.
        tags: tokens that open a block, close a block, and end a text.
        count: thoughts per prompt.
        num_blocks: blocks per thought, one for each code of an item.
        block_tokens: maximum number of generated tokens of a block, including its closing tag.
        temperature: sampling temperature; 0 is greedy.
        seed: random seed; draws depend on it, the prompt's id and the sample's index.

    Raises:
        EngineError: a thought exceeds the policy's positions.
    """
    token = np.split(prompts.token, prompts.token_start[1:-1])
    samples = [_Sample(context=ids.tolist()) for ids in token for _ in range(count)]
    keys = draw_keys(prompts.id, count, num_blocks, seed)
    params = GenerationParams(
        stop=(tags.close, tags.end), limit=block_tokens, temperature=temperature
    )
    # Samples that have not ended, blocks cut at their limit, and forward passes.
    live, cut, passes = list(range(len(samples))), 0, 0
    for block in range(num_blocks):
        for row in live:
            samples[row].lengths.append(0)
            samples[row].add([tags.open], [0.0], forced=True)
        texts = generate([samples[row].context for row in live], keys[live, block], params)
        passes += int(np.diff(texts.start).max())
        for row, a, b in zip(live, texts.start[:-1], texts.start[1:], strict=True):
            samples[row].add(texts.token[a:b].tolist(), texts.logprob[a:b].tolist(), forced=False)
            if (last := int(texts.token[b - 1])) != tags.close:
                cut += last != tags.end
                samples[row].add([tags.close], [0.0], forced=True)
        ends = texts.token[texts.start[1:] - 1] == tags.end
        live = [row for row, ended in zip(live, ends, strict=True) if not ended]
        if not live:
            break
    num_tokens = sum(len(sample.token) for sample in samples)
    malformed = sum(len(sample.lengths) != num_blocks for sample in samples)
    lengths = [np.array(sample.lengths) for sample in samples]
    return Thoughts(
        sample_start=np.arange(len(prompts) + 1) * count,
        block_start=ragged.starts(np.array([len(length) for length in lengths])),
        token=np.concatenate([np.array(sample.token, np.int32) for sample in samples]),
        token_start=ragged.starts(np.concatenate(lengths)),
        logprob=np.concatenate([np.array(sample.logprob, np.float32) for sample in samples]),
        forced=np.concatenate([np.array(sample.forced) for sample in samples]),
        cost=Cost(
            forward_tokens=num_tokens,
            prefill_tokens=len(prompts.token),
            passes=passes,
            counts={
                "thoughts": len(samples),
                "thought_tokens": num_tokens,
                "cut_blocks": cut,
                "malformed_thoughts": malformed,
            },
        ),
    )


def draw_keys(
    prompt_id: Int64[np.ndarray, " B"], count: int, num_blocks: int, seed: int
) -> Int64[np.ndarray, "S num_blocks"]:
    """Draw the random seed of each block of each sample, which depends on (seed, prompt id)."""
    return np.concatenate(
        [
            np.random.Generator(np.random.Philox(key=[seed, int(id_)])).integers(
                2**62, size=(count, num_blocks), dtype=np.int64
            )
            for id_ in prompt_id
        ]
    )


def generate_thoughts(
    engine: InferenceEngine,
    tokenizer: ItemTokenizer,
    config: RolloutConfig,
    prompts: Prompts,
    *,
    count: int,
    temperature: float,
    seed: int,
) -> Thoughts:
    """Generate `count` thoughts per prompt, with a block for each code of the longest item.

    Raises:
        EngineError: the policy has no thinking tags, or a thought exceeds its positions.
    """
    if (tags := tokenizer.think) is None:
        raise EngineError(
            "the policy has no tags for thinking; warm-start it on rationales "
            "(data.rationales), or choose a search without thoughts"
        )
    return think(
        engine.generate,
        prompts,
        tags,
        count=count,
        num_blocks=tokenizer.catalog.trie.depth,
        block_tokens=config.think.block_tokens,
        temperature=temperature,
        seed=seed,
    )


def search_after_thoughts(
    engine: InferenceEngine,
    tokenizer: ItemTokenizer,
    config: RolloutConfig,
    prompts: Prompts,
    *,
    seed: int,
) -> SearchTrees:
    """Generate `rollout.group_size` thoughts per prompt, then search codes after each of them.

    Raises:
        EngineError: the policy has no thinking tags, or a thought exceeds its positions.
    """
    began, temperature, width = perf_counter(), config.temperature, config.think.width
    thoughts = generate_thoughts(
        engine, tokenizer, config, prompts,
        count=config.group_size, temperature=temperature, seed=seed,
    )  # fmt: skip
    search_fn: SearchFn = partial(sample, count=width, temperature=temperature, seed=seed)
    if config.think.codes == "beam":
        search_fn = partial(beam, width=width)
    contexts = thoughts.contexts(prompts)
    candidates = search_in_batches(engine, search_fn, contexts, size=config.batch_size)
    codes = build_search_trees(contexts, candidates, tokenizer, engine.version)
    trees = attach_thoughts(prompts, thoughts, codes, tokenizer.catalog.trie.depth)
    return replace(trees, cost=replace(trees.cost, seconds=perf_counter() - began))
