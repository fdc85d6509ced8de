"""Load and check the data, the policy and the run folder before any actor starts."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from cluster.training import checks, text_policy
from cluster.training.checks import Phase
from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.context import add_context
from orchard.data import rationales
from orchard.data.context import columns_of
from orchard.data.fresh import concatenate, read_training_rows
from orchard.data.items import read_items
from orchard.data.prompts import Split, content_digest, read_split
from orchard.data.rationales import TokenizedRationales
from orchard.data.sft_tasks import SftTasks
from orchard.errors import ConfigError
from orchard.feedback.fit import counted_weights, utilities_of, with_feedback
from orchard.feedback.rows import Feedback, open_feedback
from orchard.feedback.utilities import PrefixUtilities
from orchard.guide.expert import LeafRows
from orchard.guide.guide import Guide
from orchard.policy import item_tokenizer, model, titles
from orchard.policy.growth import Growth, growth_of
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.store import PolicyFacts, open_bundle, open_guide
from orchard.scorers import prefix_critic
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.semantic_ids.bundle import Bundle
from orchard.settings import Config
from rewards.context import RewardContext
from rewards.score import preload
from rewards.transition_counts import TransitionCounts, count_transitions
from rollout.search.registry import SEARCHES, check_catalog

transformers_logging.disable_progress_bar()  # of weight files; commands show their own


@dataclass(frozen=True)
class Run:
    """Checked configuration of a run with its data in memory."""

    config: Config
    phase: Phase
    catalog: Catalog
    text_tokenizer: PreTrainedTokenizerBase
    tokenizer: ItemTokenizer
    policy: Path
    """Folder of the policy to start from; `open_run_dir` creates a new one."""
    train: Split
    """Rows of the warm start."""
    valid: Split
    test: Split
    fresh: Split | None = None
    """Rows that came after the warm start or were held back from it; None if there are none."""
    feedback: Feedback | None = None
    """Shown items with what they earned; None if there are none, or the phase reads none."""
    traces: TokenizedRationales | None = None
    """Rationales of the train rows, if SFT teaches thinking."""
    tasks: SftTasks | None = None
    """SFT tasks of a text model."""
    bundle: Bundle | None = None
    """Tokenizer bundle of the catalog, which the policy carries."""
    base: Path | None = None
    """Folder of the model that `policy` is created from by resizing."""
    growth: Growth | None = None
    """Codes that `base` knows, where it was trained on another catalog of the bundle."""

    @property
    def dir(self) -> Path:
        """Folder of all output of the run."""
        return self.config.run_dir

    @property
    def result(self) -> Path:
        """Folder of the policy that the phase writes."""
        return self.dir / ("warm_start" if self.phase == "sft" else "policy")

    @property
    def rows(self) -> Split:
        """Rows that the phase learns from."""
        config = self.config
        wanted = {"sft": config.sft.rows, "train": config.learner.rows}.get(self.phase, "train")
        if wanted in ("auto", "feedback") and self.feedback is not None:
            is_logged = SEARCHES.facts(config.rollout.search).logged
            return self.feedback.draws if is_logged else self.feedback.requests
        return self.train if wanted == "train" or self.fresh is None else self.fresh

    @cached_property
    def known(self) -> Split:
        """Rows of the warm start and fresh rows together."""
        return concatenate(self.train, self.fresh)

    @cached_property
    def data(self) -> dict[str, str]:
        """Digests of the content of the data, by name: items, splits and what belongs to them."""
        reads_titles = self.config.prompt.history or self.config.data.rationale_template
        titles = self.catalog.title if reads_titles else ()
        digests = {
            "items": content_digest(self.catalog.digest, *titles),
            "train": self.train.digest,
            "valid": self.valid.digest,
            "test": self.test.digest,
        }
        if self.config.data.context:
            splits = [each.context for each in (self.train, self.valid, self.test)]
            arrays = [a for each in splits if each is not None for a in (each.event, each.row)]
            digests["context"] = content_digest(*self.config.data.context, *arrays)
        if self.fresh is not None and (self.rows is self.fresh or self.phase == "train"):
            digests["fresh"] = self.fresh.digest
        if self.feedback is not None and self.phase == "train":
            digests["feedback"] = self.feedback.requests.digest
        if self.phase == "train" and self.embedding is not None:
            digests["embeddings"] = content_digest(self.embedding)
        if self.traces is not None:
            traces = self.traces
            digests["rationales"] = content_digest(traces.token, traces.token_start)
        return digests

    @cached_property
    def embedding(self) -> Float32[np.ndarray, "I E"] | None:
        """Embedding of each item; None if the data set has no embeddings."""
        data = self.config.data
        if data.embeddings is None:
            return None
        return catalogs.read_embeddings(
            data.path / data.embeddings, self.catalog, items=data.path / data.items
        )

    @cached_property
    def reward_context(self) -> RewardContext:
        """Data that rewards look up."""
        expert, fresh = "expert" in self.config.rewards.weights, self.rows is self.fresh
        shown = self.rows is not self.train and not fresh
        counts, first_row = self.config.guide.counts, None
        if not shown and (not fresh or counts != "train"):
            first_row = fresh * len(self.train)
        elif self.feedback is not None and self.rows is self.feedback.requests:
            first_row = len(self.known) if counts == "feedback" else None
        estimated, of_feedback = self.utilities or (None, False)
        first_request = fresh * len(self.train) if shown == of_feedback else None
        return RewardContext(
            catalog=self.catalog,
            settings=self.config.rewards,
            embedding=self.embedding,
            popularity=np.bincount(self.train.target, minlength=len(self.catalog)),
            transitions=self.transitions,
            are_counted=not shown,
            utilities=estimated,
            first_request=first_request,
            guide=open_guide(self.policy, self.catalog) if expert else None,
            rows=self.leaf_rows if expert else None,
            first_row=first_row,
            match_prefix=self.config.learner.sapo.match == "prefix_match",
            value=self.config.learner.value if self.config.model.value_head else None,
            folder=self.dir.resolve(),
        )

    @cached_property
    def transitions(self) -> TransitionCounts | None:
        """Transition counts of all known rows; None if no reward uses them."""
        rewards, catalog, rows = self.config.rewards, self.catalog, self.known
        if "transition" not in rewards.weights:
            return None
        return count_transitions(
            catalog.leaf_of_item[rows.history],
            rows.history_start,
            catalog.leaf_of_item[rows.target],
            num_leaves=catalog.trie.num_leaves,
            decay=rewards.transition.decay,
        )

    @cached_property
    def utilities(self) -> tuple[PrefixUtilities, bool] | None:
        """Utilities of prefixes and whether they are of feedback; None if no reward uses them."""
        rewards = self.config.rewards
        if "utility" not in rewards.weights and rewards.steps != "utility":
            return None
        return utilities_of(
            rewards.utility, self.catalog, self.known, self.feedback, self.embedding
        )

    @cached_property
    def critic(self) -> PrefixCritic | None:
        """Prefix critic that guides the training searches; None if the search uses none."""
        settings = self.config
        uses_critic = SEARCHES.facts(settings.rollout.search).uses_critic
        if self.phase != "train" or uses_critic is None or not uses_critic(settings.rollout):
            return None
        return prefix_critic.load(
            settings.critic.path or self.dir / prefix_critic.KIND, self.catalog
        )

    @cached_property
    def leaf_rows(self) -> LeafRows:
        """Rows with items as leaves, which the experts of a guide count; see `guide.counts`."""
        settings = self.config.guide
        rows = self.train if settings.counts == "train" else self.known
        if settings.counts == "feedback" and self.feedback is not None:
            rows = with_feedback(rows, self.feedback, half_life=settings.half_life)
        return LeafRows.of_items(
            self.catalog,
            user=rows.user,
            history=rows.history,
            history_start=rows.history_start,
            target=rows.target,
            weight=counted_weights(rows),
        )

    @cached_property
    def guide(self) -> Guide | None:
        """Guide of the training searches; None if the search uses none.

        Raises:
            ConfigError: the policy that training starts from has no guide.
        """
        settings = self.config
        uses_guide = SEARCHES.facts(settings.rollout.search).uses_guide
        if self.phase != "train" or uses_guide is None or not uses_guide(settings.rollout):
            return None
        if (guide := open_guide(self.policy, self.catalog)) is None:
            raise ConfigError(
                f"the search is guided by experts, but {self.policy} holds no guide; run "
                "`orchard fit guide` with the run file, or set rollout.guide and "
                "rollout.ved.guide to another value",
                code="config.no_guide",
            )
        return guide

    def with_phase(self, phase: Phase, policy: Path) -> "Run":
        """Return the run in another phase that starts from `policy`."""
        return replace(self, phase=phase, policy=policy)


def prepare(settings: Config, phase: Phase, *, policy: Path | None = None) -> Run:
    """Load and check everything that the run needs, without starting or writing anything.

    Args:
        settings: resolved configuration of the run.
        phase: phase to prepare.
        policy: folder to start from; by default the policy that the phase continues.

    Raises:
        ConfigError, DataError, CatalogError, CheckpointError: one sentence each.
        EngineError: an engine is needed on this machine and cannot run, or searches and updates do
            not reproduce the policy's arithmetic.
    """
    checks.check_names(settings)
    checks.check_engines(settings, phase)
    if phase != "evaluate":
        checks.check_unchanged(settings, phase)
    checks.check_data_folder(settings.data)
    data = settings.data
    policy = policy or starting_policy(settings, phase)
    text_tokenizer: PreTrainedTokenizerBase | None = None
    if policy is not None:
        model.check_folder(policy)
        text_tokenizer = item_tokenizer.read_tokenizer(policy)
        text_policy.check_vocabulary(policy, text_tokenizer)
    if text_tokenizer is None and data.titles and data.title_tokens is not None:
        text_tokenizer = titles.make_title_tokenizer(
            titles.read_titles(data.path / data.items), data.title_tokens
        )
    catalog, bundle = read_items(data, text_tokenizer)
    growth = None
    if policy is not None:
        growth = growth_of(policy, catalog, bundle) if phase == "sft" else None
        if growth is None:
            PolicyFacts.read(policy).check_catalog(catalog, policy)
        bundle = bundle or open_bundle(policy, catalog)
    columns = columns_of(data, text_tokenizer, may_add=policy is None or phase == "sft")
    train, fresh = read_training_rows(data, catalog, columns, seed=settings.seed)
    valid, test = (
        read_split([data.path / file], catalog, max_history=data.max_history, context=columns)
        for file in (data.valid, data.test)
    )
    feedback = None
    if data.feedback and (phase == "train" or settings.guide.counts == "feedback"):
        feedback = open_feedback(data.feedback, catalog, data.max_history, settings.learner.lists)
    sft_rows = train if fresh is None or settings.sft.rows == "train" else fresh
    check_catalog(settings.rollout, catalog.trie)
    checks.check_widths(settings, catalog.trie)
    reasons = (
        rationales.of_rows(data, catalog, sft_rows, fresh=sft_rows is fresh)
        if phase == "sft"
        else None
    )
    if text_tokenizer is None:
        text_tokenizer = text_policy.new_tokenizer(settings, catalog, reasons)
    grows = text_policy.add_instruction(settings, text_tokenizer, catalog, policy)
    grows = add_context(text_tokenizer, columns) > 0 or grows or growth is not None
    tokenizer, traces = item_tokenizer.make_item_tokenizer(text_tokenizer, catalog), None
    if text_policy.thinks(settings):
        tokenizer = replace(tokenizer, think=item_tokenizer.think_tokens(text_tokenizer))
    if reasons is not None:
        traces = rationales.tokenize_rationales(
            reasons, text_tokenizer, cap=settings.rollout.think.block_tokens
        )
    text_policy.check_arithmetic(policy)
    text_policy.check_adapters(settings, tokenizer, policy)
    tasks = None
    if phase == "sft":
        tasks = text_policy.sft_tasks(settings, text_tokenizer, tokenizer, sft_rows, policy)
    run = Run(
        config=settings,
        phase=phase,
        catalog=catalog,
        text_tokenizer=text_tokenizer,
        tokenizer=tokenizer,
        policy=settings.run_dir / "scratch" if policy is None or grows else policy,
        traces=traces,
        tasks=tasks,
        bundle=bundle,
        base=policy if grows else None,
        growth=growth,
        train=train,
        fresh=fresh,
        feedback=feedback,
        valid=valid,
        test=test,
    )
    if phase != "evaluate":
        checks.check_same_data(settings, run.data)
    if phase == "train":
        preload(settings.rewards.weights, run.reward_context)
        _ = run.critic, run.guide  # loaded now, so that its errors appear before an actor starts
    return run


def starting_policy(settings: Config, phase: Phase) -> Path | None:
    """Return the folder of the initial policy; None to create one from scratch."""
    sft_policy = settings.run_dir / "warm_start"
    if phase != "sft" and sft_policy.is_dir():
        return sft_policy
    if settings.model.path is not None:
        return settings.model.path
    if phase != "sft":
        raise ConfigError(
            f"there is no policy to improve: {sft_policy} does not exist and model.path is not "
            "set; run `orchard sft` first, or set model.path",
            code="config.no_policy",
        )
    return None
