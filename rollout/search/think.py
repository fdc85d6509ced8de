"""Generate thoughts: K blocks of free text per sample, block k of all samples at once.

A sample is `<think> text </think>` K times, and then K codes. The opening tags are forced, as is
the closing tag of a block that has reached its maximum length; forced tokens are forwarded but get
no gradient. A policy that generates the end token within a block stops thinking: the closing tag is
forced and no block follows. Its codes are still searched, so that it has an item, but the sample
has too few blocks and gets no advantage for them (`learner.advantage.sapo`).

Shapes:  B prompts   S samples
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from orchard import ragged
from orchard.policy.item_tokenizer import ThinkTokens
from orchard.types import Cost, Prompts
from rollout.engine.protocol import Completions, GenerationParams
from rollout.search.thoughts import Thoughts

Write = Callable[[Sequence[Sequence[int]], np.ndarray, GenerationParams], Completions]
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
    write: Write,
    prompts: Prompts,
    tags: ThinkTokens,
    *,
    count: int,
    blocks: int,
    cap: int,
    temperature: float,
    seed: int,
) -> Thoughts:
    """Generate `count` independent thoughts of `blocks` blocks per prompt.

    Args:
        write: text generation with the policy, as `InferenceEngine.generate`.
        prompts: prompts to continue.
        tags: tokens that open a block, close a block, and end a text.
        count: thoughts per prompt.
        blocks: blocks per thought, one for each code of an item.
        cap: maximum number of generated tokens of a block, including its closing tag.
        temperature: sampling temperature; 0 is greedy.
        seed: random seed; draws depend on it, the prompt's id and the sample's index.

    Raises:
        EngineError: a thought exceeds the policy's positions.
    """
    token = np.split(prompts.token, prompts.token_start[1:-1])
    samples = [_Sample(context=ids.tolist()) for ids in token for _ in range(count)]
    keys = draw_keys(prompts.id, count, blocks, seed)
    params = GenerationParams(stop=(tags.close, tags.end), limit=cap, temperature=temperature)
    # Samples that have not ended, blocks cut at their cap, and forward passes.
    live, cut, passes = list(range(len(samples))), 0, 0
    for block in range(blocks):
        for row in live:
            samples[row].lengths.append(0)
            samples[row].add([tags.open], [0.0], forced=True)
        texts = write([samples[row].context for row in live], keys[live, block], params)
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
    malformed = sum(len(sample.lengths) != blocks for sample in samples)
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
    prompt_id: Int64[np.ndarray, " B"], count: int, blocks: int, seed: int
) -> Int64[np.ndarray, "S blocks"]:
    """Draw the random seed of each block of each sample, which depends on (seed, prompt id)."""
    return np.concatenate(
        [
            np.random.Generator(np.random.Philox(key=[seed, int(id_)])).integers(
                2**62, size=(count, blocks), dtype=np.int64
            )
            for id_ in prompt_id
        ]
    )
