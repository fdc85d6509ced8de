"""The value head: what a prefix of codes promises, read from the policy's own hidden states.

V(s) estimates the discounted step rewards from s on, where s is the prompt and the codes so far
(V-STAR, arXiv 2602.10699). The states that s passed through, from the end of the prompt to its last
code, are read by one causal attention block, gated by the last of them, then by a small MLP. No
state after s takes part, so that a prefix is worth the same in a search, which has not gone on from
it, as in an update, which has.

The head is a submodule of the policy named `value_head`: its weights travel and are checked with
the policy's, under that prefix. In a saved policy they are a file of their own, so that the rest
stays an ordinary Hugging Face folder.

Shapes:  N hidden states   D hidden width   F prefixes   K states of the longest path
"""

import json
import math
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from orchard.errors import CheckpointError
from orchard.policy.weights import Weights, restore

NAME = "value_head"
FILE = f"{NAME}.safetensors"
_POLICY_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_MOST_HEADS = 4


class ValueHead(nn.Module):
    """A gated attention block over the states of a path, then an MLP to a scalar; 0 when fresh."""

    def __init__(self, width: int) -> None:
        """A head for hidden states of the given width."""
        super().__init__()
        self.width, self._heads = width, math.gcd(width, _MOST_HEADS)
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key, self.content = nn.Linear(width, width), nn.Linear(width, width)
        self.attended, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.inner, self.scalar = nn.Linear(width, 2 * width), nn.Linear(2 * width, 1)
        # Before it has learnt anything the head has nothing to say about any prefix.
        nn.init.zeros_(self.scalar.weight)
        nn.init.zeros_(self.scalar.bias)

    def forward(
        self, hidden: Float[Tensor, "N D"], path: Int[Tensor, "F K"]
    ) -> Float32[Tensor, " F"]:
        """Value of the state at the end of each path.

        Args:
            hidden: last hidden states (after the policy's final norm), in any order.
            path: indices into `hidden` of the end of the prompt and of the last token of each node
                down to the state, then -1 up to the longest path.
        """
        seen = self.before_attention(hidden)
        inside = path >= 0
        last = path.gather(1, inside.sum(1, keepdim=True) - 1).squeeze(1)
        content = self._split(self.content(seen)[path])
        key, query = self._split(self.key(seen)[path]), self._split(self.query(seen[last])[:, None])
        # Only the last state asks, and only states before it are on its path: causal by layout.
        heard = functional.scaled_dot_product_attention(
            query, key, content, attn_mask=inside[:, None, None]
        )
        # What a prefix promises is how well its last code suits what came before: a product.
        suits = self.attended(heard.flatten(1)) * (1 + self.gate(seen[last]))
        state = hidden[last] + suits
        inner = functional.silu(self.inner(self.before_mlp(state)))
        return self.scalar(inner).squeeze(1).float()

    def _split(self, wide: Float[Tensor, "F K D"]) -> Float[Tensor, "F heads K share"]:
        return wide.unflatten(2, (self._heads, -1)).transpose(1, 2)


def value_head_of(model: PreTrainedModel) -> ValueHead | None:
    """The value head of a policy, if it has one."""
    return cast("ValueHead | None", getattr(model, NAME, None))


def attach(model: PreTrainedModel, *, seed: int) -> None:
    """Give the policy a fresh value head, unless it has one; equal seeds give equal heads."""
    if value_head_of(model) is not None:
        return
    like = cast(Tensor, cast(nn.Module, model.get_output_embeddings()).weight)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ValueHead(like.shape[1])
    model.add_module(NAME, head.to(like.device, like.dtype).train(model.training))


def detach(model: PreTrainedModel) -> ValueHead | None:
    """Take the value head off the policy; returns it."""
    head = value_head_of(model)
    if head is not None:
        delattr(model, NAME)
    return head


def adapt_weights(model: PreTrainedModel, weights: Weights) -> None:
    """Give the policy a value head, or take it away, as the names of the weights have it."""
    if any(name.startswith(f"{NAME}.") for name in weights):
        attach(model, seed=0)
    else:
        detach(model)


def split(weights: Weights, width: int) -> tuple[dict[str, np.ndarray], ValueHead | None]:
    """The weights of the policy proper, and the value head that travels with them, if one does.

    `width` is that of the policy's hidden states.

    Raises:
        CheckpointError: the head is another policy's.
    """
    prefix = f"{NAME}."
    policy = {name: part for name, part in weights.items() if not name.startswith(prefix)}
    if len(policy) == len(weights):
        return policy, None
    with torch.random.fork_rng(devices=[]):
        head = ValueHead(width)
    restore(head, {n.removeprefix(prefix): p for n, p in weights.items() if n not in policy})
    return policy, head.eval()


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the policy as a Hugging Face folder, and its value head, if any, beside it.

    An index then says which file holds the policy: vLLM would load all that it finds.
    """
    head = detach(model)
    try:
        model.save_pretrained(folder)
    finally:
        if head is not None:
            model.add_module(NAME, head)
    if head is not None:
        tensors = {name: value.contiguous() for name, value in head.state_dict().items()}
        save_file(tensors, folder / FILE)
        if (folder / _POLICY_FILE).is_file():  # otherwise in several files, with their index
            _write_index(folder)


def _write_index(folder: Path) -> None:
    with safe_open(folder / _POLICY_FILE, "pt") as file:
        place = dict.fromkeys(cast(list[str], file.keys()), _POLICY_FILE)
    index = {"metadata": {}, "weight_map": place}
    (folder / _INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def load(model: PreTrainedModel, folder: Path) -> None:
    """Attach the value head that is saved in a policy's folder; without one, change nothing.

    Raises:
        CheckpointError: the file is damaged, or belongs to a policy of another width.
    """
    if not (folder / FILE).is_file():
        return
    attach(model, seed=0)
    try:
        cast(ValueHead, value_head_of(model)).load_state_dict(load_file(folder / FILE))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / FILE} is no value head of this policy: {error}; remove the file to start "
            "with a fresh head"
        ) from error
