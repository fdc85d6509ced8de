"""Policy model: a Hugging Face causal language model, constrained by the trie.

`child_logprobs` is the only definition of the policy's distribution: the softmax over the legal
children of a trie node. Search, learner and serving all call it.

Shapes:  F nodes   M legal children of them   D hidden width   R rows   S slots   C slots seen
         F1 = F + 1
"""

import json
import logging
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from orchard.catalog.trie import Children
from orchard.errors import CheckpointError, DataError
from orchard.folders import check_readable
from orchard.policy import value_head
from orchard.policy.attention import make_masks
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.settings import ModelConfig

POSITIONS = 4096
"""Number of positions of a policy that is created from scratch."""


def create(config: ModelConfig, tokenizer: ItemTokenizer, *, seed: int) -> PreTrainedModel:
    """Create a small Qwen3 with tied embeddings from scratch; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=tokenizer.size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=max(32, config.hidden_size // config.heads),
                max_position_embeddings=POSITIONS,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos,
                pad_token_id=tokenizer.pad,
                eos_token_id=None,
            )
        )
    return model.float().eval()


def load(folder: Path, tokenizer: ItemTokenizer | None = None) -> PreTrainedModel:
    """Load the policy of a Hugging Face folder in float32, with its value head if one was saved.

    The model owns its weights: a later change of the files does not reach it.

    Raises:
        DataError: the folder contains no model.
        CheckpointError: the model's vocabulary is smaller than that of the tokenizer, or the value
            head belongs to another policy.
    """
    check_folder(folder)
    try:
        model = cast(
            PreTrainedModel,
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{folder} holds no loadable weights: {reason}") from error
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # it may be a view of the file, which may change
    _check_generation(model, folder)
    rows = head_weight(model).shape[0]
    if tokenizer is not None and rows < tokenizer.size:
        raise CheckpointError(
            f"the policy in {folder} knows {rows} tokens, its tokenizer {tokenizer.size}; "
            "export the policy again with its own tokenizer"
        )
    value_head.load(model, folder)
    return model.eval()


def _check_generation(model: PreTrainedModel, folder: Path) -> None:
    """Replace a generation config that transformers reads but refuses to save.

    Orchard decodes without it, and only passes it on to exported policies.
    """
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        logging.getLogger("orchard").warning(
            "the generation config in %s contradicts itself (%s); the policy is saved with the "
            "defaults of its model", folder, reason,
        )  # fmt: skip
        tokens = {key: getattr(model.config, key, None) for key in ("bos_token_id", "eos_token_id")}
        model.generation_config = GenerationConfig(**tokens)


def check_folder(folder: Path) -> None:
    """Raise DataError unless the folder looks like a saved policy: configuration and weights."""
    check_readable(folder)
    check_readable(*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin"))
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise DataError(
            f"{folder} holds no config.json; give the folder of a saved policy",
            code="policy.missing",
        )
    try:
        kind = json.loads(config_file.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{config_file} is no JSON object: {error}; save the policy again",
            code="policy.damaged",
        ) from error
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise DataError(
            f"{config_file} has model_type {kind!r}, for which transformers has no causal "
            "language model; give the folder of one",
            code="policy.unknown_model",
        )
    weight_files = [file for file in folder.glob("*.safetensors") if file.name != value_head.FILE]
    if not weight_files and not any(folder.glob("*.bin")):
        raise DataError(
            f"{folder} holds no weights (*.safetensors); save the policy again",
            code="policy.missing",
        )
    for file in weight_files:
        try:
            with safe_open(file, "pt"):
                pass  # reads the header, and checks that the file contains the last tensor
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"the weights in {file} are damaged or cut short: {error}; save the policy again",
                code="policy.damaged",
            ) from error


def head_weight(model: PreTrainedModel) -> Float[Tensor, "tokens D"]:
    """Return the weight of the language-model head: one row per token ID."""
    return cast(Tensor, cast(nn.Module, model.get_output_embeddings()).weight)


def hidden_states(
    model: PreTrainedModel,
    token: Int[Tensor, "R S"],
    position: Int[Tensor, "R S"],
    visible: Bool[Tensor, "R S C"],
    *,
    cache: Cache | None = None,
    key_position: Int[Tensor, "R C"] | None = None,
) -> Float[Tensor, "R S D"]:
    """Compute the last hidden states of packed rows; slot i sees slot j where `visible[i, j]`.

    Layers with a window see of these the slots within it (`attention.make_masks`).

    Args:
        model: policy.
        token: token of each slot.
        position: position of each slot in its path.
        visible: whether slot j is an ancestor of slot i, or i itself.
        cache: keys and values of earlier slots, to which those of the new ones are appended.
        key_position: positions of the earlier slots and the new ones; needed with a cache.
    """
    keys = position if key_position is None else key_position
    masks = make_masks(model.config, visible, position, keys, head_weight(model).dtype)
    output = model.base_model(
        input_ids=token,
        position_ids=position,
        attention_mask=masks,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return cast(Tensor, output.last_hidden_state)


def child_logprobs(
    hidden: Float[Tensor, "F D"],
    node: Int[Tensor, " F"],
    head: Float[Tensor, "tokens D"],
    tokenizer: ItemTokenizer,
) -> tuple[Float[Tensor, " M"], Children]:
    """Compute the log-probability of every legal child of each node, in float32.

    This defines the policy. Only the head rows of the node's level are evaluated, or in title mode
    the rows that all levels share. A single child has log-probability 0.

    Args:
        hidden: last hidden state at each queried node.
        node: trie node of each query.
        head: weight of the language-model head.
        tokenizer: item tokenizer of the catalog.
    """
    trie = tokenizer.trie
    children = trie.children(node)
    level = tokenizer.slice_of(trie.depth_of(node))  # (F,) token slice of each node's children
    code = trie.code.index_select(0, children.node)  # (M,) code of each child
    pieces: list[Tensor] = []  # logits of the children of one slice
    child_indices: list[Tensor] = []  # positions of these children in (M,)
    slices = cast(list[int], level.unique().tolist())
    if len(slices) == 1:
        tokens = tokenizer.tokens_at(slices[0])
        pieces.append(_code_logits(hidden, head[tokens], children.owner, code))
        slices = []
    for slice_index in slices:
        rows = (level == slice_index).nonzero().squeeze(1)
        child_index = (level[children.owner] == slice_index).nonzero().squeeze(1)
        # Position of each queried node within `rows`, -1 for nodes of other slices.
        row_of_node = torch.full_like(node, -1)
        row_of_node[rows] = torch.arange(len(rows), device=node.device)
        tokens = tokenizer.tokens_at(slice_index)
        owner = row_of_node[children.owner[child_index]]
        pieces.append(_code_logits(hidden[rows], head[tokens], owner, code[child_index]))
        child_indices.append(child_index)
    if not pieces:
        # Empty, but attached to the graph: a worker without choices must still take part in the
        # gradient all-reduce.
        return (hidden @ head[:0].T.to(hidden.dtype)).float().reshape(-1), children
    logit = pieces[0] if len(pieces) == 1 else torch.cat(pieces)[torch.cat(child_indices).argsort()]
    return segment_log_softmax(logit, children.owner, children.start), children


def _code_logits(
    hidden: Float[Tensor, "R D"],
    head: Float[Tensor, "V D"],
    owner: Int[Tensor, " M"],
    code: Int[Tensor, " M"],
) -> Float[Tensor, " M"]:
    """Compute the float32 logit of each code at the hidden state with index `owner`."""
    logit = hidden @ head.T.to(hidden.dtype)
    return logit.reshape(-1).index_select(0, owner * len(head) + code).float()


def segment_log_softmax(
    logit: Float[Tensor, " M"], owner: Int[Tensor, " M"], start: Int[Tensor, " F1"]
) -> Float[Tensor, " M"]:
    """Compute the log-softmax within each segment of a ragged array.

    Segment f is `start[f] : start[f + 1]`, and `owner` is the segment of each entry.
    """
    peak = logit.new_full((len(start) - 1,), float("-inf"))
    peak = peak.scatter_reduce(0, owner, logit.detach(), "amax")
    shifted = logit - peak.index_select(0, owner)
    total = torch.segment_reduce(shifted.exp(), "sum", offsets=start, initial=0.0)
    return shifted - total.log().index_select(0, owner)


def add_dropout(model: PreTrainedModel, share: float) -> list[RemovableHandle]:
    """Add dropout after the embeddings and after each attention and MLP block, in training mode.

    Decoder families apply dropout at different places, and recent ones have none. Hooks on the
    modules that all families share do not change the saved model. Remove the handles to undo.
    """
    if share == 0:
        return []
    drop = nn.Dropout(share)

    def hook(module: nn.Module, _: object, output: object) -> object:
        drop.train(module.training)
        if isinstance(output, tuple):
            return (drop(cast(Tensor, output[0])), *cast(tuple[object, ...], output[1:]))
        return drop(cast(Tensor, output))

    named = dict(model.base_model.named_modules())
    blocks = [m for name, m in named.items() if name.endswith((".self_attn", ".mlp"))]
    if not blocks:
        raise DataError(
            f"{type(model).__name__} has no self_attn or mlp modules to apply dropout to; "
            "set model.dropout = 0"
        )
    modules = [model.get_input_embeddings(), *blocks]
    return [module.register_forward_hook(hook) for module in modules]
