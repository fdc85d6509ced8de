"""The policy and its supervised warm start."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, NonNegativeFloat, NonNegativeInt, PositiveInt

from orchard.settings.section import Fraction, Section


def _template(place: str) -> AfterValidator:
    """A text that names the place once."""

    def check(text: str) -> str:
        if text.count(place) != 1:
            raise ValueError(
                f"a template has {place} once, this one {text.count(place)} times; write it where "
                "the items belong"
            )
        return text

    return AfterValidator(check)


class PromptConfig(Section):
    """Instructions for a text model; a compact policy has none."""

    history: Annotated[str, _template("{history}")] | None = None
    """Template with `{history}` where the items belong; it makes the policy a text model, to whose
    tokenizer a token for each code is added."""
    separator: str = ", "
    """Between two items."""
    titles: Annotated[str, _template("{history}")] = (
        "A customer bought, oldest first: {history}. The semantic ID of the next item is "
    )
    """As `history`, for the task that shows the history's titles."""
    title: Annotated[str, _template("{title}")] = "The semantic ID of the item '{title}' is "
    """For the task that asks for the item of a title."""
    item: Annotated[str, _template("{item}")] = "The title of the item {item} is:"
    """For the task that asks for the title of an item."""
    chat: bool = False
    """Wrap instructions in the tokenizer's own chat template, as what the user says."""
    max_tokens: PositiveInt | None = None
    """Of a prompt; the oldest items give way. By default all positions of the model but those of
    the answer."""


class TasksConfig(Section):
    """What a text model is taught beside history -> item: examples per row of the split."""

    titles: NonNegativeFloat = 0.0
    """Titles of the history -> item."""
    title_to_item: NonNegativeFloat = 0.0
    item_to_title: NonNegativeFloat = 0.0

    @property
    def share(self) -> dict[str, float]:
        """Examples of each task per row of the split."""
        return {"history": 1.0, **self.model_dump()}


class LoraConfig(Section):
    """Low-rank adapters in place of training every weight; embeddings are trained whole."""

    rank: NonNegativeInt = 0
    """0 trains every weight."""
    alpha: PositiveInt = 32
    """Adapters count alpha / rank times."""
    dropout: Fraction = 0.0
    """Of what adapters read, in the supervised warm start and where `learner.dropout` is set."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Last names of the linear modules that get one."""


class ModelConfig(Section):
    """The policy: a Hugging Face causal language model."""

    path: Path | None = None
    """Folder of a saved policy; by default a small Qwen3 is made from the sizes below."""
    text_tokens: PositiveInt = 512
    """Text tokens of a new policy that reads or writes text, found in its rationales or in the
    items' titles; at least the 256 bytes."""
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 384
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    dropout: Fraction = 0.2
    """Of embeddings and of each block's output, in the supervised warm start only."""
    lora: LoraConfig = LoraConfig()
    value_head: bool = False
    """Teach the policy, in reinforcement learning, what a prefix is worth (see `learner.value`);
    `rollout.ved.guide` says whether it guides a search."""


class SftConfig(Section):
    """The supervised warm start: next code over whole user sequences."""

    section: ClassVar[str] = "sft"
    renamed: ClassVar[Mapping[str, str]] = {"average": "ema_decay"}

    epochs: PositiveInt = 20
    batch_size: PositiveInt = 64
    """User sequences per update, over all workers."""
    lr: NonNegativeFloat = 2e-3
    warmup: Fraction = 0.05
    """Share of the updates during which the rate rises; a cosine falls to `final_lr` after it."""
    final_lr: Fraction = 0.05
    """Last rate as a share of `lr`."""
    weight_decay: NonNegativeFloat = 0.05
    grad_clip: NonNegativeFloat = 1.0
    logprob: Literal["trie", "full"] = "trie"
    """Distribution whose likelihood is raised: over the legal siblings, or over the whole
    vocabulary, forced codes included, which generalised better on real data."""
    ema_decay: Fraction = 0.998
    """Decay per update of the moving average of the weights that is evaluated and kept; 0: none."""
    minutes: NonNegativeFloat = 0.0
    """Stop after the epoch in which so many minutes have passed; 0 sets no limit."""
    valid_rows: NonNegativeInt = 1000
    """Rows of the validation split that choose the epoch; 0 keeps the last."""
    valid_beams: PositiveInt = 20
    patience: PositiveInt = 5
    """Stop after so many epochs without a better NDCG@10 on the validation rows."""
    tasks: TasksConfig = TasksConfig()
