"""Build small catalogs, policies and prompts for tests and benchmarks, with brute-force scores.

Shapes:  K leaves   B prompts
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int32
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from orchard import ragged
from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.evaluation import ranking
from orchard.evaluation.ranking import Evaluation, TargetRanks
from orchard.policy import model as models
from orchard.policy import value_head, weights
from orchard.policy.item_tokenizer import (
    BOS,
    EOS,
    PAD,
    THINK,
    THOUGHT,
    ItemTokenizer,
    compact_tokenizer,
    make_item_tokenizer,
    sid_token,
    think_tokens,
)
from orchard.policy.titles import from_titles
from orchard.settings import ModelConfig
from orchard.types import PolicyVersion, Prompts


def tiny_catalog(
    *,
    seed: int = 0,
    level_size: Sequence[int] = (5, 4, 6),
    num_items: int = 30,
    varying_depth: bool = False,
) -> Catalog:
    """Create a catalog of random semantic IDs with collisions, single children and whole chains.

    Below an odd first code the second code is always 0, so that chains also occur within a
    sequence. With `varying_depth`, about a third of the sequences stop early, some as a prefix of
    another.
    """
    draw = np.random.default_rng(seed)
    codes = draw.integers(level_size, size=(num_items, len(level_size)))
    codes[codes[:, 0] % 2 == 1, 1:2] = 0
    codes[-1] = codes[0]  # guarantees one collision
    is_short = draw.random(num_items) < (1 / 3 if varying_depth else 0)
    length = np.where(is_short, draw.integers(1, len(level_size) + 1, num_items), len(level_size))
    return catalogs.from_codes(
        [row[:n].tolist() for row, n in zip(codes, length, strict=True)],
        level_size=level_size,
        varying_depth=varying_depth,
    )


def tiny_policy(
    catalog: Catalog, *, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, ItemTokenizer]:
    """Create a policy of two layers and width 32 whose distributions are far from uniform."""
    item_tokenizer = make_item_tokenizer(tokenizer or compact_tokenizer(catalog), catalog)
    sizes = ModelConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1)
    model = models.create(sizes, item_tokenizer, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.2, generator=draw)
    return model, item_tokenizer


def tiny_prompts(
    catalog: Catalog,
    lengths: Sequence[int],
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Prompts:
    """Create one prompt per history length, with random items as history and target."""
    draw = np.random.default_rng(seed)
    item_tokenizer = make_item_tokenizer(tokenizer or compact_tokenizer(catalog), catalog)
    history_start = ragged.starts(np.asarray(lengths, dtype=np.int64))
    history = draw.integers(len(catalog), size=int(history_start[-1]))
    token, token_start = item_tokenizer.encode_history(history, history_start)
    return Prompts(
        id=np.arange(len(lengths)),
        target=draw.integers(len(catalog), size=len(lengths)),
        history=history,
        history_start=history_start,
        token=token,
        token_start=token_start,
    )


def brute_force(
    model: PreTrainedModel,
    tokenizer: ItemTokenizer,
    prompt: Int32[np.ndarray, " T"],
) -> Float64[np.ndarray, " K"]:
    """Compute the log-probability of every leaf with one plain forward pass per leaf."""
    catalog = tokenizer.catalog
    leaf_codes = {
        tuple(int(c) for c in row if c >= 0): int(leaf)
        for row, leaf in zip(catalog.codes, catalog.leaf_of_item, strict=True)
    }
    result = np.zeros(len(leaf_codes))
    for codes, leaf in leaf_codes.items():
        tokens = [int(tokenizer.tokens_at(level)[code]) for level, code in enumerate(codes)]
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt.tolist(), *tokens]])).logits[0].double()
        for level, code in enumerate(codes):
            legal = sorted({other[level] for other in leaf_codes if other[:level] == codes[:level]})
            row = logits[len(prompt) - 1 + level, tokenizer.tokens_at(level)[legal]]
            result[leaf] += float(row.log_softmax(0)[legal.index(code)])
    return result


def save_model_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write a Hugging Face folder that `orchard.policy.model.load` and vLLM can read."""
    value_head.save(model, folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class TinySetup:
    """Catalog, policy and prompts, with their brute-force log-probabilities."""

    catalog: Catalog
    model: PreTrainedModel
    tokenizer: ItemTokenizer
    prompts: Prompts

    @property
    def version(self) -> PolicyVersion:
        """Version of the current weights, as step 0."""
        return PolicyVersion(step=0, digest=weights.digest(weights.snapshot(self.model)))

    @cached_property
    def leaf_logprob(self) -> list[Float64[np.ndarray, " K"]]:
        """Log-probability of every leaf, for each prompt."""
        rows = np.split(self.prompts.token, self.prompts.token_start[1:-1])
        return [brute_force(self.model, self.tokenizer, row) for row in rows]

    @cached_property
    def leaf_path(self) -> list[tuple[int, ...]]:
        """Trie nodes of each leaf from depth 1 on."""
        trie = self.catalog.trie
        return [tuple(n for n in row if n >= 0) for row in trie.path(trie.leaf_node).tolist()]

    def save(self, folder: Path) -> Path:
        """Write the policy to a folder and return the folder."""
        make_tokenizer = tiny_text_tokenizer if self.tokenizer.think else compact_tokenizer
        save_model_folder(self.model, make_tokenizer(self.catalog), folder)
        return folder


def tiny_setup(
    *,
    seed: int = 0,
    level_size: Sequence[int] = (5, 4, 6),
    num_items: int = 30,
    varying_depth: bool = False,
    lengths: Sequence[int] = (0, 3, 1, 7),
) -> TinySetup:
    """Create a setup from one seed; `lengths` are the history lengths of the prompts, in items."""
    catalog = tiny_catalog(
        seed=seed, level_size=level_size, num_items=num_items, varying_depth=varying_depth
    )
    model, item_tokenizer = tiny_policy(catalog, seed=seed)
    prompts = tiny_prompts(catalog, lengths, seed=seed)
    return TinySetup(catalog=catalog, model=model, tokenizer=item_tokenizer, prompts=prompts)


def with_windows(world: TinySetup, *, window: int = 4, mixed: bool = False) -> TinySetup:
    """Give a setup a policy with sliding windows: Mistral, or Gemma 3 with `mixed` layers."""
    sizes: dict[str, Any] = {
        "vocab_size": world.tokenizer.size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": models.POSITIONS,
        "sliding_window": window,
        "pad_token_id": world.tokenizer.pad,
        "bos_token_id": world.tokenizer.bos,
        "eos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if mixed:
            kinds = ["sliding_attention", "full_attention"]
            model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=kinds))
        else:
            model = MistralForCausalLM(MistralConfig(**sizes))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(0.0, 0.2)
    return replace(world, model=model.float().eval())


def tiny_title_tokenizer() -> PreTrainedTokenizerBase:
    """Create a character-level tokenizer, as a stand-in for that of a text policy."""
    vocabulary = ["<unk>", "<eos>", *string.ascii_lowercase, " "]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>")


def tiny_title_setup(
    title: Sequence[str], *, seed: int = 0, lengths: Sequence[int] = (0, 3, 1)
) -> TinySetup:
    """Create a setup in title mode; titles consist of lower-case letters and spaces."""
    tokenizer = tiny_title_tokenizer()
    catalog = from_titles(title, tokenizer)
    model, item_tokenizer = tiny_policy(catalog, seed=seed, tokenizer=tokenizer)
    prompts = tiny_prompts(catalog, lengths, seed=seed, tokenizer=tokenizer)
    return TinySetup(catalog=catalog, model=model, tokenizer=item_tokenizer, prompts=prompts)


def tiny_thinking_setup(*, seed: int = 0, lengths: Sequence[int] = (1, 3, 2)) -> TinySetup:
    """Create a setup whose policy can think: a few words, thinking tags, codes of three levels."""
    catalog = tiny_catalog(seed=seed)
    tokenizer = tiny_text_tokenizer(catalog)
    model, item_tokenizer = tiny_policy(catalog, seed=seed, tokenizer=tokenizer)
    prompts = tiny_prompts(catalog, lengths, seed=seed, tokenizer=tokenizer)
    item_tokenizer = replace(item_tokenizer, think=think_tokens(tokenizer))
    return TinySetup(catalog=catalog, model=model, tokenizer=item_tokenizer, prompts=prompts)


def tiny_text_tokenizer(catalog: Catalog) -> PreTrainedTokenizerBase:
    """Create a word-level tokenizer of a few words, thinking tags and the catalog's codes."""
    codes = [
        sid_token(level, code)
        for level, size in enumerate(catalog.level_size)
        for code in range(size)
    ]
    vocabulary = [
        PAD,
        BOS,
        EOS,
        THINK,
        THOUGHT,
        *codes,
        "seen",
        "next",
        "oak",
        "steel",
        "lamp",
        "tent",
    ]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=PAD))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def make_evaluation(hit: float, *, num_rows: int = 500) -> Evaluation:
    """Create an evaluation of random ranks in which a share `hit` of the rows is a top-20 hit."""
    draw = np.random.default_rng(0)
    rank = np.where(draw.random(num_rows) < hit, draw.integers(0, 20, num_rows), TargetRanks.MISS)
    ranks = TargetRanks(sid=rank, item=rank)
    return Evaluation(
        metrics=ranking.metrics(ranks, width=20, resamples=100),
        ranks=ranks,
        row=np.arange(num_rows),
        split="beef",
        width=20,
        seconds=2.0,
        policy="3-feedbeef",
        catalog="cafe",
        extra={"diversity": 0.5},
    )
