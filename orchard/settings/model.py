"""Settings of the policy model and of its supervised fine-tuning (SFT)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from orchard.settings.section import Fraction, Section, refusal


def _template(placeholder: str) -> AfterValidator:
    """Return a validator of templates that contain the placeholder exactly once."""

    def check(text: str) -> str:
        if text.count(placeholder) != 1:
            raise ValueError(
                f"a template has {placeholder} once, this one {text.count(placeholder)} times; "
                "write it where the items belong"
            )
        return text

    return AfterValidator(check)


class PromptConfig(Section):
    """Instruction templates of a text model; a compact policy has none."""

    history: Annotated[str, _template("{history}")] | None = None
    """Prompt template with `{history}` in place of the items. Setting it makes the policy a text
    model and adds a token for each code to its tokenizer."""
    separator: str = ", "
    """Separator between two items."""
    titles: Annotated[str, _template("{history}")] = (
        "A customer bought, oldest first: {history}. The semantic ID of the next item is "
    )
    """Template like `history`, for the task whose prompt lists the titles of the history."""
    title: Annotated[str, _template("{title}")] = "The semantic ID of the item '{title}' is "
    """Template of the task that predicts the item from its title."""
    item: Annotated[str, _template("{item}")] = "The title of the item {item} is:"
    """Template of the task that predicts the title of an item."""
    chat: bool = False
    """Whether to wrap instructions in the chat template of the tokenizer, as a user message."""
    max_tokens: PositiveInt | None = None
    """Maximum number of tokens of a prompt; the oldest items are dropped first. By default all
    positions of the model except those of the answer."""


class TasksConfig(Section):
    """Additional SFT tasks of a text model, as examples per row of the split."""

    titles: NonNegativeFloat = 0.0
    """Examples per row of the task titles of the history -> item."""
    title_to_item: NonNegativeFloat = 0.0
    """Examples per row of the task title -> item."""
    item_to_title: NonNegativeFloat = 0.0
    """Examples per row of the task item -> title."""

    @property
    def share(self) -> dict[str, float]:
        """Number of examples per row of the split, by task."""
        return {"history": 1.0, **self.model_dump()}


class LoraConfig(Section):
    """Low-rank adapters (LoRA) instead of full fine-tuning; embeddings are still fully trained."""

    rank: NonNegativeInt = 0
    """Rank of the adapters; 0 trains every weight."""
    alpha: PositiveInt = 32
    """LoRA alpha: the output of an adapter is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout rate of the adapters' input, in SFT and, if `learner.dropout` is set, in RL."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Last name components of the linear modules that receive an adapter."""


class ModelConfig(Section):
    """Policy model: a Hugging Face causal language model."""

    path: Path | None = None
    """Folder of a saved policy; by default a small Qwen3 is created from the sizes of this
    section."""
    text_tokens: PositiveInt = 512
    """Number of text tokens of a new policy that reads or writes text, trained on its rationales or
    on the item titles; at least the 256 bytes."""
    hidden_size: PositiveInt = 128
    """Hidden width of a new policy."""
    intermediate_size: PositiveInt = 384
    """MLP width of a new policy."""
    layers: PositiveInt = 4
    """Number of decoder layers of a new policy."""
    heads: PositiveInt = 4
    """Number of attention heads of a new policy; must divide `hidden_size`."""
    kv_heads: PositiveInt = 2
    """Number of key/value heads of a new policy; must divide `heads`."""
    dropout: Fraction = 0.2
    """Dropout rate of the embeddings and of each block's output, in SFT only."""
    lora: LoraConfig = LoraConfig()
    value_head: bool = False
    """Whether the policy has a value head, which RL trains to predict the value of a prefix (see
    `learner.value`); `rollout.ved.guide` selects whether it guides a search."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        sizes = self.model_dump()
        for multiple, divisor in (("hidden_size", "heads"), ("heads", "kv_heads")):
            if sizes[multiple] % sizes[divisor]:
                raise refusal(
                    "not_a_multiple",
                    f"model.{multiple} = {sizes[multiple]} is not a multiple of "
                    f"model.{divisor} = {sizes[divisor]}; choose one that is",
                )
        return self


class SftConfig(Section):
    """Supervised fine-tuning (SFT): next-code prediction over whole user sequences."""

    section: ClassVar[str] = "sft"
    renamed: ClassVar[Mapping[str, str]] = {"average": "ema_decay"}

    rows: Literal["train", "fresh"] = "train"
    """Rows to train on: those of the warm start, or only the fresh rows of `data.fresh` or
    `data.hold_back`. The latter, from `model.path`, is the control of RL on fresh rows."""
    epochs: PositiveInt = 20
    """Maximum number of epochs, over which the learning rate falls. A run that is continued with
    another number follows the learning rates of a run of that length, from the epoch where it
    is."""
    batch_size: PositiveInt = 64
    """User sequences per update, over all workers."""
    lr: NonNegativeFloat = 2e-3
    """Peak learning rate."""
    warmup: Fraction = 0.05
    """Share of the updates with a linearly rising learning rate; a cosine decay to `final_lr`
    follows."""
    final_lr: Fraction = 0.05
    """Final learning rate as a share of `lr`."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW weight decay of matrices; norms and biases have none."""
    grad_clip: NonNegativeFloat = 1.0
    """Maximum gradient norm; 0 disables clipping."""
    logprob: Literal["trie", "full"] = "trie"
    """Distribution whose likelihood is maximized: over the legal siblings, or over the full
    vocabulary, forced codes included, which generalized better on real data."""
    ema_decay: Fraction = 0.998
    """Decay per update of the moving average of the weights that is evaluated and saved; 0 disables
    it."""
    minutes: NonNegativeFloat = 0.0
    """Time limit in minutes, checked after each epoch; 0 sets no limit."""
    valid_rows: NonNegativeInt = 1000
    """Number of validation rows that select the best epoch; 0 keeps the last epoch."""
    valid_beams: Annotated[int, Field(ge=10)] = 20
    """Beam width of the evaluation on the validation rows; at least 10, since NDCG@10 selects the
    best version."""
    patience: PositiveInt = 5
    """Number of epochs without a better NDCG@10 on the validation rows before training stops."""
    tasks: TasksConfig = TasksConfig()
