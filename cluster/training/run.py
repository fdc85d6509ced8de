"""Everything that can be checked before an actor starts: the data, the policy, the run folder."""

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32
from transformers import PreTrainedTokenizerBase

from cluster.actors.session import address_of
from cluster.training import text_policy
from orchard import config
from orchard.catalog import catalog
from orchard.catalog.catalog import Catalog
from orchard.data import rationales
from orchard.data.prompts import Split, read_split
from orchard.data.rationales import RationaleBlocks, TokenizedRationales
from orchard.data.sft_tasks import SftTasks
from orchard.errors import ConfigError
from orchard.policy import item_tokenizer, model, titles
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.store import PolicyFacts
from orchard.scorers import prefix_critic
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import Config, DataConfig
from rewards.context import RewardContext
from rewards.score import check_rewards as check_rewards
from rewards.score import preload
from rewards.transition_counts import TransitionCounts, count_transitions
from rollout.engine.availability import check_vllm
from rollout.search.ved.search import check_budget

Phase = Literal["sft", "train", "evaluate"]

# What may differ between a run and its continuation: how long it goes on, who computes it and how
# it is looked at, but not what an update is.
MAY_CHANGE = (
    "output", "data.path", "sft.epochs", "sft.minutes", "sft.patience", "learner.steps",
    "rollout.actors", "rollout.max_restarts", "rollout.timeout_s", "rollout.start_timeout_s",
    "rollout.threads", "rewards.actors", "rewards.queue", "rewards.timeout_s", "rewards.retries",
    "rewards.max_restarts", "learner.threads", "learner.max_failures", "learner.timeout_s",
    "learner.start_timeout_s", "evaluate.", "checkpoint.", "cluster.", "serve.",
)  # fmt: skip
# And what a warm start has no use for: it may still change until RL has left a checkpoint.
OF_RL = ("learner.", "rollout.", "rewards.", "critic.")


@dataclass(frozen=True)
class Run:
    """A checked configuration with its data in memory."""

    config: Config
    phase: Phase
    catalog: Catalog
    text_tokenizer: PreTrainedTokenizerBase
    tokenizer: ItemTokenizer
    policy: Path
    """Folder of the policy to start from; made by `open_folder` where it is new."""
    train: Split
    valid: Split
    test: Split
    traces: TokenizedRationales | None = None
    """Rationales of the train rows, where the warm start teaches to think."""
    tasks: SftTasks | None = None
    """What the warm start of a text model teaches."""
    base: Path | None = None
    """Folder of the text model that is to grow into `policy`."""

    @property
    def dir(self) -> Path:
        """Folder of everything that the run writes."""
        return self.config.run_dir

    @property
    def result(self) -> Path:
        """Where the phase leaves its policy."""
        return self.dir / ("warm_start" if self.phase == "sft" else "policy")

    @cached_property
    def embedding(self) -> Float32[np.ndarray, "I E"] | None:
        """Of each item, where the data set has embeddings."""
        data = self.config.data
        if data.embeddings is None:
            return None
        return catalog.read_embeddings(data.path / data.embeddings, self.catalog)

    @cached_property
    def knowledge(self) -> RewardContext:
        """What rewards may look up."""
        return RewardContext(
            catalog=self.catalog,
            settings=self.config.rewards,
            embedding=self.embedding,
            popularity=np.bincount(self.train.target, minlength=len(self.catalog)),
            transitions=self.transitions,
            folder=self.dir.resolve(),
        )

    @cached_property
    def transitions(self) -> TransitionCounts | None:
        """What followed what in the training rows, where a reward asks for it."""
        rewards, items, rows = self.config.rewards, self.catalog, self.train
        if "transition" not in rewards.weights:
            return None
        return count_transitions(
            items.leaf_of_item[rows.history],
            rows.history_start,
            items.leaf_of_item[rows.target],
            num_leaves=items.trie.num_leaves,
            decay=rewards.transition.decay,
        )

    @cached_property
    def critic(self) -> PrefixCritic | None:
        """What guides the search of a training run, where that is a critic."""
        settings = self.config
        if (
            self.phase != "train"
            or settings.rollout.search != "ved"
            or settings.rollout.ved.guide != "critic"
        ):
            return None
        return prefix_critic.load(
            settings.critic.path or self.dir / prefix_critic.KIND, self.catalog
        )

    def with_phase(self, phase: Phase, policy: Path) -> "Run":
        """The same data and configuration in a later phase, which begins with that policy."""
        return replace(self, phase=phase, policy=policy)


def check_engines(settings: Config, phase: Phase) -> None:
    """Raise EngineError if vLLM is to run on this machine and cannot; of a cluster we know nothing.

    A machine without it would otherwise say so only when the first actor starts.
    """
    if address_of(settings.cluster) is not None:
        return
    engines = {settings.evaluate.engine}
    if phase == "train":
        engines.add(settings.rollout.engine)
    if "vllm" in engines:
        check_vllm()


def prepare(settings: Config, phase: Phase, *, policy: Path | None = None) -> Run:
    """Read and check all that the run needs; starts nothing and writes nothing.

    Args:
        settings: the resolved run.
        phase: what is to be done.
        policy: folder to start from; by default the one that the phase continues.

    Raises:
        ConfigError, DataError, CatalogError, CheckpointError: one sentence each.
        EngineError: vLLM is to run on this machine and cannot.
    """
    check_rewards(settings.rewards.weights)
    check_engines(settings, phase)
    if phase != "evaluate":
        check_unchanged(settings, phase)
    data = settings.data
    if not data.path.is_dir():
        raise ConfigError(f"data.path = {data.path} is not a folder; set it to where the data is")
    policy = policy or starting_policy(settings, phase)
    tokenizer: PreTrainedTokenizerBase | None = None
    if policy is not None:
        model.check_folder(policy)
        tokenizer = item_tokenizer.read_tokenizer(policy)
    if tokenizer is None and data.titles and data.title_tokens is not None:
        tokenizer = titles.make_title_tokenizer(
            titles.read_titles(data.path / data.items), data.title_tokens
        )
    items = read_items(data, tokenizer)
    if policy is not None:
        PolicyFacts.read(policy).check_catalog(items, policy)
    splits = {
        name: read_split([data.path / file for file in files], items, max_history=data.max_history)
        for name, files in (("train", data.train), ("valid", [data.valid]), ("test", [data.test]))
    }
    if settings.rollout.search == "ved":
        check_budget(settings.rollout.ved, items.trie)
    width = max(settings.rollout.group_size, settings.evaluate.beams, settings.evaluate.valid_beams)
    if width > items.trie.num_leaves:
        logging.getLogger("orchard").warning(
            "a beam of %d is wider than the catalog of %d distinct sequences: "
            "each prompt gets %d candidates",
            width, items.trie.num_leaves, items.trie.num_leaves,
        )  # fmt: skip
    reasons = read_rationales(data, items, splits["train"]) if phase == "sft" else None
    if tokenizer is None:
        tokenizer = new_tokenizer(settings, items, reasons)
    grows = text_policy.add_instruction(settings, tokenizer, items, policy)
    tokens, traces = item_tokenizer.make_item_tokenizer(tokenizer, items), None
    if settings.thinks:
        tokens = replace(tokens, think=item_tokenizer.think_tokens(tokenizer))
    if reasons is not None:
        traces = rationales.tokenize_rationales(
            reasons, tokenizer, cap=settings.rollout.think.block_tokens
        )
    text_policy.check_adapters(settings, tokens, policy)
    lessons = None
    if phase == "sft":
        lessons = text_policy.sft_tasks(settings, tokenizer, tokens, splits["train"], policy)
    run = Run(
        config=settings,
        phase=phase,
        catalog=items,
        text_tokenizer=tokenizer,
        tokenizer=tokens,
        policy=settings.run_dir / "scratch" if policy is None or grows else policy,
        traces=traces,
        tasks=lessons,
        base=policy if grows else None,
        **splits,
    )
    if phase == "train":
        preload(settings.rewards.weights, run.knowledge)
        _ = run.critic  # read now: its errors are to come before an actor starts
    return run


def read_rationales(data: DataConfig, items: Catalog, train: Split) -> list[RationaleBlocks] | None:
    """Of the train rows, from their column or made from titles; None where none are asked for."""
    if data.rationales is not None:
        files = [data.path / file for file in data.train]
        return rationales.read(files, data.rationales, items.trie.depth)
    if data.rationale_template is not None:
        return rationales.from_titles(items, train, template=data.rationale_template)
    return None


def new_tokenizer(
    settings: Config, items: Catalog, reasons: list[RationaleBlocks] | None
) -> PreTrainedTokenizerBase:
    """Of a new policy; one that knows text keeps what it was made with when its run goes on."""
    if reasons is None and settings.prompt.history is None:
        return item_tokenizer.compact_tokenizer(items)
    scratch = settings.run_dir / "scratch"
    if scratch.is_dir():
        return item_tokenizer.read_tokenizer(scratch)
    asked = settings.prompt
    texts = [block for blocks in reasons or [items.title] for block in blocks]
    if asked.history is not None:
        texts += [asked.history, asked.separator, asked.titles, asked.title, asked.item]
    return rationales.text_tokenizer(items, texts, size=settings.model.text_tokens)


def read_items(data: DataConfig, tokenizer: PreTrainedTokenizerBase | None) -> Catalog:
    """The items, as semantic IDs or as titles in the tokens of the policy to start from."""
    path = data.path / data.items
    if not data.titles:
        return catalog.read(path, level_size=data.level_size, varying_depth=data.varying_depth)
    if tokenizer is None:
        raise ConfigError(
            "data.titles = true needs a policy whose tokens the titles are written in; "
            "set model.path to its folder, or data.title_tokens for a policy from scratch"
        )
    return titles.read(path, tokenizer)


def starting_policy(settings: Config, phase: Phase) -> Path | None:
    """The folder to start from; None where a policy is to be made from scratch."""
    warm = settings.run_dir / "warm_start"
    if phase != "sft" and warm.is_dir():
        return warm
    if settings.model.path is not None:
        return settings.model.path
    if phase != "sft":
        raise ConfigError(
            f"there is no policy to improve: {warm} does not exist and model.path is not set; "
            "run `orchard sft` first, or set model.path"
        )
    return None


def check_unchanged(settings: Config, phase: Phase) -> None:
    """Refuse to continue a run under a configuration that computes something else."""
    path = settings.run_dir / "config.toml"
    if not path.is_file():
        return
    begins = phase == "train" and not (settings.run_dir / "checkpoints" / "learner-train").exists()
    may = MAY_CHANGE + OF_RL if begins else MAY_CHANGE
    changed = [
        line for line in config.differences(config.load(path), settings) if not line.startswith(may)
    ]
    if changed:
        raise ConfigError(
            f"run {settings.name} exists with another configuration: {'; '.join(changed)}; choose "
            "another name, to go on from what it has learned with model.path="
            f"{settings.run_dir / 'warm_start'} (or its policy)"
        )
