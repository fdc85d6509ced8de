"""Embed items by their titles or by their co-occurrence in interactions.

Shapes:  I items   E dimensions   R examples   H history items
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Bool, Float32, Float64, Int64

from orchard import ragged
from orchard.catalog import embeddings
from orchard.errors import ConfigError, DataError
from orchard.semantic_ids.title_encoder import TitleEncoder, axes, reduced

_WINDOW = 5
"""Number of most recent history items that count as neighbors of the target."""


def of_titles(title: Sequence[str], *, dimensions: int, seed: int) -> Float32[np.ndarray, "I E"]:
    """Embed titles by TF-IDF and a truncated SVD of their own (see `TitleEncoder.fit`).

    A title that shares nothing has a zero vector (see `without_signal`).

    Raises:
        DataError: an item has no title, or the titles share no characters.
    """
    check_titles(title)
    return TitleEncoder.fit(title, dimensions=dimensions, seed=seed).embed(title)


def check_titles(title: Sequence[str]) -> None:
    """Raise DataError if an item has no title."""
    untitled = [row for row, text in enumerate(title) if not text.strip()]
    if untitled:
        raise DataError(
            f"item row {untitled[0]} has no title ({len(untitled)} of {len(title)} items); "
            "add titles, or take --source interactions"
        )


def without_signal(vectors: Float32[np.ndarray, "I E"]) -> Bool[np.ndarray, " I"]:
    """Return which embeddings say nothing: zero, or too small beside the others to matter.

    Those that `of_interactions` draws at random are.
    """
    return lengths(vectors) <= least_length(vectors)


def least_length(vectors: Float32[np.ndarray, "I E"]) -> float:
    """Return the length up to which an embedding is too small beside others to matter."""
    length = lengths(vectors)
    return float(0.1 * np.median(length[length > 0])) if (length > 0).any() else 0.0


def lengths(vectors: Float32[np.ndarray, "I E"]) -> Float64[np.ndarray, " I"]:
    """Return the Euclidean length of each embedding."""
    return np.sqrt(np.einsum("ie,ie->i", vectors, vectors, dtype=np.float64))


def of_model(title: Sequence[str], folder: Path) -> Float32[np.ndarray, "I E"]:
    """Embed titles with a sentence-transformers model in a local folder.

    Names of special tokens within a title are text.

    Raises:
        ConfigError: the folder is not a model, or the library is not installed.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no config.json; give the folder of a saved model")
    if not (any(folder.rglob("*.safetensors")) or any(folder.rglob("*.bin"))):
        raise ConfigError(f"{folder} holds no weights (*.safetensors); save the model again")
    try:
        library: Any = importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise ConfigError(
            "--model needs sentence-transformers, which is not installed; install it, or leave "
            "--model out for TF-IDF"
        ) from error
    model = library.SentenceTransformer(str(folder), local_files_only=True)
    model.tokenizer.split_special_tokens = True
    vectors: Any = model.encode(list(title), normalize_embeddings=True, show_progress_bar=True)
    return embeddings.check_embeddings(
        np.asarray(vectors, dtype=np.float32), len(title), where=str(folder)
    )


def of_interactions(
    history: Int64[np.ndarray, " H"],
    start: Int64[np.ndarray, " R1"],
    target: Int64[np.ndarray, " R"],
    *,
    num_items: int,
    dimensions: int,
    seed: int,
) -> Float32[np.ndarray, "I E"]:
    """Embed items by a truncated SVD of the PPMI between targets and recent history items.

    PPMI is the positive pointwise mutual information; item2vec factorizes a similar matrix
    implicitly (Levy and Goldberg, NeurIPS 2014). Items without a neighbor get a small random
    vector.

    Raises:
        DataError: train has no pairs of items.
    """
    count = np.minimum(np.diff(start), _WINDOW)
    # recent history items of every example, concatenated; each pairs with the example's target
    recent = history[ragged.ranges(start[1:] - count, count)]
    pairs: Any = sparse.coo_array(
        (np.ones(len(recent)), (recent, np.repeat(target, count))), shape=(num_items, num_items)
    ).tocsr()
    pairs = (pairs + pairs.T).tocoo()
    total = np.asarray(pairs.sum(axis=1)).reshape(-1)
    if total.sum() == 0:
        raise DataError("train has no pairs of items to embed from; take --source titles")
    expected = total[pairs.row] * total[pairs.col] / total.sum()
    ppmi = np.maximum(np.log(pairs.data / expected), 0)
    table: Any = sparse.csr_array((ppmi, (pairs.row, pairs.col)), shape=pairs.shape)
    vectors = reduced(table, axes(table, dimensions, seed))
    isolated = np.flatnonzero(~vectors.any(axis=1))
    noise = np.random.default_rng(seed).standard_normal((len(isolated), vectors.shape[1]))
    vectors[isolated] = 1e-3 * noise
    return vectors
