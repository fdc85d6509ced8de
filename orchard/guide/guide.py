"""The guide: a reward of leaves from experts, and its largest value below each prefix.

    r(h, y) = sum over k and eps of w[k, eps] log(1 + e_k(h, y) / eps)
              + w_popularity log(1 + n(y)) + w_seen [y in h]
    V(h, s) = max of r over the leaves below s, and r itself at a leaf

A search that ranks prefixes by log p + V looks for the best leaves of p e^r, the optimum of
E[r] - KL(pi || p). V never rises along a path, and log p + V bounds log p + r of every leaf below.

What depends on the leaf alone (popularity) has one maximum per node, computed once; the rest is
computed at the leaves that the histories reach and at the nodes above them. Where that is negative,
V is an upper bound of the maximum. After a history that no expert knows, every value is 0, so that
the search is the plain one.

Shapes:  B prompts   K leaves   N trie nodes   X reached (prompt, leaf) pairs   F queried prefixes
         V valued (prompt, node) pairs   A terms   Q queried pairs   S summands
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from jaxtyping import Float32, Float64, Int64
from safetensors.numpy import load_file, save_file
from torch import Tensor

from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError, CheckpointError, ConfigError
from orchard.folders import atomic_dir
from orchard.guide.expert import Expert, ExpertScores, expert_scores, lookup
from orchard.guide.values import Values
from orchard.types import Prompts

ABOUT, MATRICES = "guide.json", "guide.safetensors"
"""Files of a guide in its folder."""


_PARTS = ("start", "after", "strength")
_FACTS = ("popularity_weight", "seen_weight", "exclude_seen", "rows", "train", "policy")
POPULARITY, HISTORY = "popularity", "history"
"""Names of the summands of the reward that are no experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """Summand of the reward: weight * log(1 + e / scale) of one expert."""

    expert: str
    scale: float
    weight: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Guide:
    """Experts with the weights of their terms, for one catalog."""

    catalog: Catalog
    experts: tuple[Expert, ...]
    terms: tuple[Term, ...]
    popularity: Int64[np.ndarray, " K"]
    """Number of training rows with each leaf as target."""
    popularity_weight: float = 0.0
    seen_weight: float = 0.0
    """Weight of being in the prompt's own history."""
    exclude_seen: bool = False
    """Whether leaves of the prompt's own history are left out of its lists."""
    rows: str = ""
    """Digest of the training rows that were counted."""
    train: str = ""
    """Digest of the training split that was counted, as policies name the one they learned."""
    policy: str = ""
    """Digest of the weights of the policy that the weights were fitted for."""

    @cached_property
    def column(self) -> Int64[np.ndarray, " A"]:
        """Index of the expert of each term."""
        index = {expert.name: i for i, expert in enumerate(self.experts)}
        return np.array([index[term.expert] for term in self.terms], np.int64)

    @property
    def num_bytes(self) -> int:
        """Size of the matrices, the popularity and the static values in bytes."""
        own = self.popularity.nbytes + self.static.nbytes
        return own + sum(expert.num_bytes for expert in self.experts)

    @cached_property
    def static(self) -> Float32[np.ndarray, " N"]:
        """Largest static reward at or below each node; 0 everywhere without popularity."""
        trie = self.catalog.trie
        value = np.zeros(trie.num_nodes, np.float32)
        if self.popularity_weight == 0:
            return value
        value[trie.leaf_node.numpy()] = self._static_of(np.arange(trie.num_leaves))
        child_start, level_start = trie.child_start.numpy(), trie.level_start.numpy()
        for first, end in zip(level_start[-3::-1], level_start[-2:0:-1], strict=True):
            low = child_start[first:end]
            has_child = child_start[first + 1 : end + 1] > low
            inner = first + np.flatnonzero(has_child)
            # Children of consecutive nodes are consecutive, so that the segments are adjacent.
            stop = int(child_start[end])
            value[inner] = np.maximum.reduceat(value[:stop], low[has_child].astype(np.int64))
        return value

    def scores(self, prompts: Prompts) -> ExpertScores:
        """Score the leaves that the prompts' histories reach, with every expert."""
        history = self.catalog.leaf_of_item[prompts.history]
        num_leaves = self.catalog.trie.num_leaves
        return expert_scores(self.experts, history, prompts.history_start, num_leaves=num_leaves)

    def reward(
        self,
        prompts: Prompts,
        prompt: Int64[np.ndarray, " Q"],
        leaf: Int64[np.ndarray, " Q"],
    ) -> Float32[np.ndarray, " Q"]:
        """Return r of leaves to the prompts with the given indices."""
        scores = self.scores(prompts)
        place, reached = scores.lookup(prompt, leaf)
        value = self._static_of(leaf)
        value[reached] = self._reward(scores)[place[reached]]
        value[~scores.known[prompt]] = 0.0
        return value

    @property
    def summands(self) -> tuple[str, ...]:
        """Names of the summands of the reward: experts, popularity, being in the history."""
        return (*(expert.name for expert in self.experts), POPULARITY, HISTORY)

    def shares(
        self,
        prompts: Prompts,
        prompt: Int64[np.ndarray, " Q"],
        leaf: Int64[np.ndarray, " Q"],
    ) -> Float64[np.ndarray, "Q S"]:
        """Return the `summands` of r of leaves to the prompts with the given indices."""
        scores = self.scores(prompts)
        place, reached = scores.lookup(prompt, leaf)
        table = np.zeros((len(leaf), len(self.experts) + 2))
        for term, column in zip(self.terms, self.column, strict=True):
            score = np.where(reached, scores.score[place, column], 0.0) if len(scores.key) else 0.0
            table[:, column] += term.weight * np.log1p(score / term.scale)
        table[:, -2] = self._static_of(leaf)
        table[reached, -1] = self.seen_weight * scores.seen[place[reached]]
        table[~scores.known[prompt]] = 0.0
        return table

    def values(self, prompts: Prompts) -> Values:
        """Compute the values above the reached leaves, and return a function that looks them up."""
        scores, num_nodes, static = self.scores(prompts), self.catalog.trie.num_nodes, self.static
        used = scores.known[scores.prompt]
        key, value = self._values_above(
            scores.prompt[used], scores.leaf[used], self._reward(scores)[used]
        )
        known = scores.known

        def evaluate(
            prompt: Int64[np.ndarray, " F"], node: Int64[Tensor, " F"]
        ) -> Float32[np.ndarray, " F"]:
            at = node.cpu().numpy()
            place, found = lookup(key, prompt * num_nodes + at)
            result = static[at] * known[prompt]
            result[found] = value[place[found]]
            return result

        return evaluate

    def _values_above(
        self,
        prompt: Int64[np.ndarray, " X"],
        leaf: Int64[np.ndarray, " X"],
        reward: Float32[np.ndarray, " X"],
    ) -> tuple[Int64[np.ndarray, " V"], Float32[np.ndarray, " V"]]:
        """Return ascending keys prompt * N + node, and the value of each, from leaves to the root.

        Level by level from the deepest: nodes of a level are in the order of their paths, so that
        the children of a node are neighbors and one `maximum.reduceat` gives all maxima.
        """
        trie, static = self.catalog.trie, self.static
        node = trie.node_of(torch.from_numpy(leaf)).numpy()
        level_start = trie.level_start.numpy()
        level = np.searchsorted(level_start, node, side="right") - 1
        keys, values = list[np.ndarray](), list[np.ndarray]()
        below_key, below_value = np.zeros(0, np.int64), np.zeros(0, np.float32)
        for depth in range(trie.depth, -1, -1):
            here = level == depth
            key = np.concatenate([prompt[here] * trie.num_nodes + node[here], below_key])
            value = np.concatenate([reward[here], below_value])
            if depth < trie.depth and here.any() and len(below_key):
                order = key.argsort(kind="stable")
                key, value = key[order], value[order]
            keys.append(key)
            values.append(value)
            if depth == 0 or not len(key):
                continue
            owner, child = np.divmod(key, trie.num_nodes)
            above = trie.parent(torch.from_numpy(child)).numpy()
            parent = owner * trie.num_nodes + above
            first = np.flatnonzero(np.diff(parent, prepend=-1))
            below_key = parent[first]
            below_value = np.maximum(np.maximum.reduceat(value, first), static[above[first]])
        key, value = np.concatenate(keys), np.concatenate(values)
        order = key.argsort()
        return key[order], value[order]

    def _static_of(self, leaf: Int64[np.ndarray, " X"]) -> Float32[np.ndarray, " X"]:
        """Return the part of the reward that depends on the leaf alone."""
        return (self.popularity_weight * np.log1p(self.popularity[leaf])).astype(np.float32)

    def _reward(self, scores: ExpertScores) -> Float32[np.ndarray, " X"]:
        """Return r at the reached pairs."""
        total = self.popularity_weight * np.log1p(self.popularity[scores.leaf])
        total += self.seen_weight * scores.seen
        for term, column in zip(self.terms, self.column, strict=True):
            if term.weight:
                total += term.weight * np.log1p(scores.score[:, column] / term.scale)
        return total.astype(np.float32)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that the values depend on."""
        sha256 = hashlib.sha256(json.dumps(self._about(), sort_keys=True).encode())
        for _, array in sorted(self._arrays().items()):
            sha256.update(np.ascontiguousarray(array).data)
        return sha256.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the guide as a folder, which replaces an older one as a whole."""
        with atomic_dir(folder) as partial:
            save_file(self._arrays(), partial / MATRICES)
            about = self._about() | {"digest": self.digest}
            (partial / ABOUT).write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def open(cls, folder: Path, catalog: Catalog) -> "Guide":
        """Read the guide that `save` wrote.

        Raises:
            ConfigError: the folder holds no guide.
            CatalogError: the guide was fitted for another catalog.
            CheckpointError: a file is damaged.
        """
        if not (folder / ABOUT).is_file():
            raise ConfigError(
                f"{folder} holds no guide; run `orchard fit guide` with the run file, or search "
                "without one"
            )
        try:
            about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
            if about["catalog"] != catalog.digest:
                raise CatalogError(
                    f"the guide in {folder} was fitted on catalog {about['catalog'][:12]}, the one "
                    f"in use is {catalog.digest[:12]}; run `orchard fit guide` for these items"
                )
            arrays = load_file(folder / MATRICES)
            experts = tuple(
                Expert(
                    start=arrays[f"{entry['name']}.start"],
                    after=arrays[f"{entry['name']}.after"],
                    strength=arrays[f"{entry['name']}.strength"],
                    **entry,
                )
                for entry in about["experts"]
            )
            terms = tuple(Term(**term) for term in about["terms"])
            guide = cls(
                catalog=catalog, experts=experts, terms=terms, popularity=arrays["popularity"],
                **{name: about[name] for name in _FACTS if name in about},
            )  # fmt: skip
            named = about.get("digest", guide.digest)
            if named != guide.digest:
                raise ValueError(f"digest {guide.digest[:8]}, its file names {named[:8]}")
            return guide
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"the guide in {folder} is damaged ({error}); run `orchard fit guide` again"
            ) from error

    def notes(self, *, rows: str = "", train: str = "", policy: str = "") -> list[str]:
        """Return one sentence for each way in which the guide was fitted for something else.

        Args:
            rows: digest of the training rows in use; not compared if empty.
            train: digest of the training split in use; not compared if empty.
            policy: digest of the policy's weights; not compared if empty.
        """
        named = (
            ("training rows", rows, self.rows),
            ("the training split", train, self.train),
            ("the policy", policy, self.policy),
        )
        return [
            f"the guide was fitted with {kind} {was[:8]}, those in use are {now[:8]}; its weights "
            "still serve, `orchard fit guide` fits them again"
            for kind, now, was in named
            if now and was and now != was
        ]

    def _arrays(self) -> dict[str, np.ndarray]:
        """Return every array by name."""
        arrays = {
            f"{expert.name}.{part}": getattr(expert, part)
            for expert in self.experts
            for part in _PARTS
        }
        return arrays | {"popularity": self.popularity}

    def _about(self) -> dict[str, Any]:
        """Return everything but the arrays, as JSON values."""
        return {
            "catalog": self.catalog.digest,
            "experts": [
                {"name": expert.name, "decay": expert.decay, "window": expert.window}
                for expert in self.experts
            ],
            "terms": [asdict(term) for term in self.terms],
            **{name: getattr(self, name) for name in _FACTS},
        }


def named_digest(folder: Path) -> str:
    """Return the digest that the folder of a guide names; empty where there is none."""
    try:
        return str(json.loads((folder / ABOUT).read_text()).get("digest", ""))
    except (OSError, ValueError):
        return ""
