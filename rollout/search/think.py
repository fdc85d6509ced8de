"""Thinking: K blocks of free text for every sample, all samples' block k at a time.

A sample is `<think> text </think>` K times, and then K codes. The opening tags are forced, and so
is the closing tag of a block that has reached its cap. Those tokens are read but teach nothing. A
policy that ends its text within a block has stopped: its block is closed by force and no other
follows. Its codes are searched all the same, so that it has an item, but it has too few blocks and
earns nothing for them (`learner.advantage.sapo`).

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
"""As `rollout.engine.Holder.write`."""


@dataclass
class _Sample:
    """One sample while it is being written."""

    context: list[int]
    token: list[int] = field(default_factory=list[int])
    logprob: list[float] = field(default_factory=list[float])
    forced: list[bool] = field(default_factory=list[bool])
    lengths: list[int] = field(default_factory=list[int])
    """Of its blocks so far."""

    def add(self, token: Sequence[int], logprob: Sequence[float], *, forced: bool) -> None:
        """Tokens at the end of the newest block."""
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
    """`count` independent thoughts of `blocks` blocks per prompt.

    Args:
        write: of the policy that thinks.
        prompts: to think about.
        tags: that open and close a block, and end a text.
        count: thoughts per prompt.
        blocks: codes of an item.
        cap: most tokens that a block may choose, its closing tag included.
        temperature: of the draws; 0 is greedy.
        seed: the draws of a sample depend on it, on the prompt's id and on the sample's number.

    Raises:
        EngineError: a thought exceeds the policy's positions.
    """
    token = np.split(prompts.token, prompts.token_start[1:-1])
    samples = [_Sample(context=one.tolist()) for one in token for _ in range(count)]
    keys = draw_keys(prompts.id, count, blocks, seed)
    how = GenerationParams(stop=(tags.close, tags.end), limit=cap, temperature=temperature)
    live, cut, passes = list(range(len(samples))), 0, 0
    for k in range(blocks):
        for row in live:
            samples[row].lengths.append(0)
            samples[row].add([tags.open], [0.0], forced=True)
        texts = write([samples[row].context for row in live], keys[live, k], how)
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
    written = sum(len(one.token) for one in samples)
    broken = sum(len(one.lengths) != blocks for one in samples)
    lengths = [np.array(one.lengths) for one in samples]
    return Thoughts(
        sample_start=np.arange(len(prompts) + 1) * count,
        block_start=ragged.starts(np.array([len(one) for one in lengths])),
        token=np.concatenate([np.array(one.token, np.int32) for one in samples]),
        token_start=ragged.starts(np.concatenate(lengths)),
        logprob=np.concatenate([np.array(one.logprob, np.float32) for one in samples]),
        forced=np.concatenate([np.array(one.forced) for one in samples]),
        cost=Cost(
            forward_tokens=written,
            prefill_tokens=len(prompts.token),
            passes=passes,
            counts={
                "thoughts": len(samples),
                "thought_tokens": written,
                "cut_blocks": cut,
                "malformed_thoughts": broken,
            },
        ),
    )


def draw_keys(
    prompt_id: Int64[np.ndarray, " B"], count: int, blocks: int, seed: int
) -> Int64[np.ndarray, "S blocks"]:
    """A number for each block of each sample that its draws depend on."""
    return np.concatenate(
        [
            np.random.Generator(np.random.Philox(key=[seed, int(one)])).integers(
                2**62, size=(count, blocks), dtype=np.int64
            )
            for one in prompt_id
        ]
    )
