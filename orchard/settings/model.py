"""The policy and its supervised warm start."""

from pathlib import Path
from typing import Literal

from orchard.settings.section import NonNegative, Positive, Rate, Section, Share


class ModelConfig(Section):
    """The policy: a Hugging Face causal language model."""

    path: Path | None = None
    """Folder of a saved policy; by default a small Qwen3 is made from the sizes below."""
    text_tokens: Positive = 512
    """Text tokens of a new policy that thinks, found in its rationales; at least the 256 bytes."""
    hidden_size: Positive = 128
    intermediate_size: Positive = 384
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive = 2
    dropout: Share = 0.2
    """Of embeddings and of each block's output, in the supervised warm start only."""
    value_head: bool = False
    """Teach the policy, in reinforcement learning, what a prefix is worth (see `learner.value`);
    `rollout.ved.guide` says whether it guides a search."""


class SftConfig(Section):
    """The supervised warm start: next code over whole user sequences."""

    epochs: Positive = 20
    batch_size: Positive = 64
    """User sequences per update, over all workers."""
    lr: Rate = 2e-3
    warmup: Share = 0.05
    """Share of the updates during which the rate rises; a cosine falls to `final_lr` after it."""
    final_lr: Share = 0.05
    """Last rate as a share of `lr`."""
    weight_decay: Rate = 0.05
    grad_clip: Rate = 1.0
    logprob: Literal["trie", "full"] = "trie"
    """Distribution whose likelihood is raised: over the legal siblings, or over the whole
    vocabulary, forced codes included, which generalised better on real data."""
    average: Share = 0.998
    """Decay per update of the moving average of the weights that is evaluated and kept; 0: none."""
    minutes: Rate = 0.0
    """Stop after the epoch in which so many minutes have passed; 0 sets no limit."""
    valid_rows: NonNegative = 1000
    """Rows of the validation split that choose the epoch; 0 keeps the last."""
    valid_beams: Positive = 20
    patience: Positive = 5
    """Stop after so many epochs without a better NDCG@10 on the validation rows."""
