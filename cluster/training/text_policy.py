"""Prepare a run with a text model: add tokens, the instruction and the SFT tasks."""

from pathlib import Path
from typing import cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from orchard.catalog.catalog import Catalog
from orchard.data import rationales
from orchard.data.prompts import Split
from orchard.data.rationales import RationaleBlocks
from orchard.data.sft_tasks import SftTasks, build_sft_tasks
from orchard.errors import ConfigError
from orchard.policy import lora, model, prompt_template, token_embeddings
from orchard.policy.attention import position_limit
from orchard.policy.growth import Growth
from orchard.policy.item_tokenizer import ItemTokenizer, compact_tokenizer, read_tokenizer
from orchard.policy.tree_check import check_trees
from orchard.settings import Config
from rollout.search.registry import SEARCHES


def thinks(settings: Config) -> bool:
    """Return whether the policy generates thinking blocks or is trained to generate them."""
    search_thinks = SEARCHES.facts(settings.rollout.search).thinks
    return settings.data.has_rationales or search_thinks or settings.evaluate.think


def add_instruction(
    settings: Config, tokenizer: PreTrainedTokenizerBase, catalog: Catalog, policy: Path | None
) -> bool:
    """Add the item tokens and the instruction to a tokenizer; return whether tokens were new.

    Raises:
        CatalogError, ConfigError, DataError: one sentence each.
    """
    template = settings.prompt.history
    if template is None:
        return False
    added = token_embeddings.add_tokens(tokenizer, catalog, tags=thinks(settings))
    room = positions(policy) - catalog.trie.depth
    if thinks(settings):  # a block per code, with both tags
        room -= catalog.trie.depth * (settings.rollout.think.block_tokens + 1)
    if room < 1:
        raise ConfigError(
            f"an answer leaves {room} of the policy's {positions(policy)} positions to its prompt; "
            "lower rollout.think.block_tokens, or take a model with more"
        )
    limit = min(room, settings.prompt.max_tokens or room)
    frame = prompt_template.encode_template(
        template, "{history}", tokenizer, settings.prompt, limit=limit
    )
    prompt_template.save_to_tokenizer(tokenizer, frame)
    return added > 0


def sft_tasks(
    settings: Config,
    tokenizer: PreTrainedTokenizerBase,
    item_tokenizer: ItemTokenizer,
    train: Split,
    policy: Path | None,
) -> SftTasks | None:
    """Build the SFT tasks of a text model; None if SFT trains on rationales instead."""
    if settings.prompt.history is None or settings.data.has_rationales:
        return None
    return build_sft_tasks(
        train,
        item_tokenizer,
        tokenizer,
        settings.prompt,
        settings.sft.tasks.share,
        positions=positions(policy),
    )


def check_arithmetic(policy: Path | None) -> None:
    """Load a policy and raise EngineError unless trees reproduce its own forward pass."""
    if policy is not None:
        check_trees(model.load(policy))


def check_adapters(settings: Config, item_tokenizer: ItemTokenizer, policy: Path | None) -> None:
    """Raise ConfigError if the policy does not support the configured LoRA adapters."""
    if settings.model.lora.rank == 0:
        return
    with torch.device("meta"):
        if policy is None:
            network = model.create(settings.model, item_tokenizer, seed=0)
        else:
            model_config = AutoConfig.from_pretrained(policy)
            network = cast(PreTrainedModel, AutoModelForCausalLM.from_config(model_config))
    lora.check(network, settings.model.lora)


def check_vocabulary(policy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise CheckpointError if a policy has fewer rows than its own tokenizer has tokens."""
    rows = getattr(AutoConfig.from_pretrained(policy).get_text_config(), "vocab_size", None)
    if rows is not None:
        token_embeddings.check_rows(rows, known=len(tokenizer))


def positions(policy: Path | None) -> int:
    """Return the maximum number of positions of a policy; raise EngineError if it has none."""
    if policy is None:
        return model.POSITIONS
    return position_limit(AutoConfig.from_pretrained(policy))


def load_resized(
    base: Path, tokenizer: ItemTokenizer, growth: Growth | None = None, *, seed: int
) -> PreTrainedModel:
    """Load a model, with its token embeddings resized to the policy's tokens.

    With `growth`, the rows of codes that no item had start from those of their neighbors.
    """
    policy = model.load(base)
    num_base_tokens = len(read_tokenizer(base))
    token_embeddings.resize_embeddings(
        policy, known=num_base_tokens, size=tokenizer.size, seed=seed
    )
    if growth is not None:
        token_embeddings.start_unseen(policy, tokenizer, growth, seed=seed)
    return policy


def new_tokenizer(
    settings: Config, catalog: Catalog, reasons: list[RationaleBlocks] | None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a new policy; a text tokenizer of a continued run is reused."""
    if reasons is None and settings.prompt.history is None:
        return compact_tokenizer(catalog)
    scratch = settings.run_dir / "scratch"
    if scratch.is_dir():
        return read_tokenizer(scratch)
    prompt = settings.prompt
    texts = ["".join(block) for blocks in reasons or [catalog.title] for block in blocks]
    if prompt.history is not None:
        texts += [prompt.history, prompt.separator, prompt.titles, prompt.title, prompt.item]
    return rationales.text_tokenizer(catalog, texts, size=settings.model.text_tokens)
