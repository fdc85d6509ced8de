"""Value head: predict the value of a code prefix from the hidden states of the policy.

V(s) estimates the discounted step rewards from s on, where s is the prompt and the codes so far
(V-STAR, arXiv 2602.10699). The hidden states on the path of s, from the end of the prompt to the
last code, pass through one causal attention block, gated by the last state, and a small MLP. No
state after s contributes, so that a prefix has the same value in a search, which has not continued
it yet, and in an update, which has.

The head is a submodule of the policy named `value_head`; its weights are published and verified
together with those of the policy, under that prefix. In a saved policy they are a separate file, so
that the rest is an ordinary Hugging Face folder.

Shapes:  N hidden states   D hidden width   F prefixes   K states of the longest path
"""

import json
import math
import shutil
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
"""Name of the submodule of the policy, and prefix of its weights."""
FILE = f"{NAME}.safetensors"
"""Name of the file with its weights in a policy folder."""
_POLICY_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADS = 4


class ValueHead(nn.Module):
    """Gated attention over the states of a path and an MLP to a scalar, which is 0 initially."""

    def __init__(self, width: int) -> None:
        """Create a head for hidden states of the given width."""
        super().__init__()
        self.width, self._heads = width, math.gcd(width, _MAX_HEADS)
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key, self.content = nn.Linear(width, width), nn.Linear(width, width)
        self.attended, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.inner, self.scalar = nn.Linear(width, 2 * width), nn.Linear(2 * width, 1)
        # The initial value of every prefix is 0.
        nn.init.zeros_(self.scalar.weight)
        nn.init.zeros_(self.scalar.bias)

    def forward(
        self, hidden: Float[Tensor, "N D"], path: Int[Tensor, "F K"]
    ) -> Float32[Tensor, " F"]:
        """Predict the value of the state at the end of each path.

        Args:
            hidden: last hidden states (after the policy's final norm), in any order.
            path: indices into `hidden` of the last prompt token and of the last token of each node
                down to the state, padded with -1 to the longest path.
        """
        normed = self.before_attention(hidden)
        present = path >= 0  # (F, K): false at padding
        last = path.gather(1, present.sum(1, keepdim=True) - 1).squeeze(1)  # (F,) final state
        value = self._split_heads(self.content(normed)[path])
        key = self._split_heads(self.key(normed)[path])
        query = self._split_heads(self.query(normed[last])[:, None])
        # Only the last state is a query, and its path has no later states: causal by layout.
        attention = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=present[:, None, None]
        )
        # The value depends on how well the last code matches its prefix, hence a product.
        gated = self.attended(attention.flatten(1)) * (1 + self.gate(normed[last]))
        state = hidden[last] + gated
        inner = functional.silu(self.inner(self.before_mlp(state)))
        return self.scalar(inner).squeeze(1).float()

    def _split_heads(self, states: Float[Tensor, "F K D"]) -> Float[Tensor, "F heads K share"]:
        """Split the hidden width into attention heads."""
        return states.unflatten(2, (self._heads, -1)).transpose(1, 2)


def value_head_of(model: PreTrainedModel) -> ValueHead | None:
    """Return the value head of a policy, or None."""
    return cast("ValueHead | None", getattr(model, NAME, None))


def attach(model: PreTrainedModel, *, seed: int) -> None:
    """Add a new value head to the policy, unless it has one; equal seeds give equal heads."""
    if value_head_of(model) is not None:
        return
    output_weight = cast(Tensor, cast(nn.Module, model.get_output_embeddings()).weight)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ValueHead(output_weight.shape[1])
    head = head.to(output_weight.device, output_weight.dtype)
    model.add_module(NAME, head.train(model.training))


def detach(model: PreTrainedModel) -> ValueHead | None:
    """Remove the value head from the policy and return it."""
    head = value_head_of(model)
    if head is not None:
        delattr(model, NAME)
    return head


def adapt_weights(model: PreTrainedModel, weights: Weights) -> None:
    """Add or remove the value head so that the policy matches the names of the weights."""
    if any(name.startswith(f"{NAME}.") for name in weights):
        attach(model, seed=0)
    else:
        detach(model)


def split(weights: Weights, width: int) -> tuple[dict[str, np.ndarray], ValueHead | None]:
    """Split weights into those of the language model and the value head, if there is one.

    Args:
        weights: weights of the policy.
        width: width of the policy's hidden states.

    Raises:
        CheckpointError: the head belongs to another policy.
    """
    prefix = f"{NAME}."
    policy = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    if len(policy) == len(weights):
        return policy, None
    with torch.random.fork_rng(devices=[]):
        head = ValueHead(width)
    own = {n.removeprefix(prefix): value for n, value in weights.items() if n not in policy}
    restore(head, own)
    return policy, head.eval()


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the policy as a Hugging Face folder, with its value head, if any, in a separate file.

    An index then names the file of the policy, because vLLM would load every file otherwise.
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
        if (folder / _POLICY_FILE).is_file():  # otherwise it is sharded and has an index already
            _write_index(folder)
    for file in folder.glob("*.safetensors"):  # which the library lets only its owner read
        shutil.copymode(folder / "config.json", file)


def _write_index(folder: Path) -> None:
    """Write the index that maps every weight of the policy to its file."""
    with safe_open(folder / _POLICY_FILE, "pt") as file:
        file_of_weight = dict.fromkeys(cast(list[str], file.keys()), _POLICY_FILE)
    index = {"metadata": {}, "weight_map": file_of_weight}
    (folder / _INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def load(model: PreTrainedModel, folder: Path) -> None:
    """Attach the value head saved in a policy folder; do nothing if there is none.

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
            f"{folder / FILE} is not a value head of this policy: {error}; remove the file to "
            "start with a fresh head"
        ) from error
