"""Embed items by their titles or by their co-occurrence in interactions.

Shapes:  I items   E dimensions   R examples   H history items
"""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Bool, Float32, Int64
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from orchard import ragged
from orchard.catalog import embeddings
from orchard.errors import ConfigError, DataError

_SCRIPTS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese characters."""
_UNSPACED = re.compile(f"[{_SCRIPTS}]")
_WORDS = re.compile(f"[{_SCRIPTS}]+|[^\\W{_SCRIPTS}]+")
_WINDOW = 5
"""Number of most recent history items that count as neighbors of the target."""
_ROUNDING = 1e-6
"""Length below which a reduced row of unit length is rounding."""


def of_titles(title: Sequence[str], *, dimensions: int, seed: int) -> Float32[np.ndarray, "I E"]:
    """Embed titles by TF-IDF of words and word pairs and a truncated SVD, with unit length.

    Scripts that are written without spaces are read in pairs of characters. Where the words of a
    title are no other's, or it has none, characters and their sequences of up to three are added
    for all titles. A title that still shares nothing has a zero vector (see `without_signal`).

    Raises:
        DataError: an item has no title, or the titles share no characters.
    """
    untitled = [row for row, text in enumerate(title) if not text.strip()]
    if untitled:
        raise DataError(
            f"item row {untitled[0]} has no title ({len(untitled)} of {len(title)} items); "
            "add titles, or take --source interactions"
        )
    min_titles = 2 if len(title) > 100 else 1  # a word of a single title relates no items
    words = _tfidf(title, min_titles, tokenizer=tokens, token_pattern=None, ngram_range=(1, 2))
    if words is not None and (words.getnnz(axis=1) > 0).all():
        return _reduced(words, dimensions, seed)
    characters = _tfidf(title, min_titles, analyzer="char", ngram_range=(1, 3))
    tables = [table for table in (words, characters) if table is not None]
    if not tables:
        raise DataError(
            "the titles have no characters in common; take --source interactions, or --embeddings"
        )
    return _reduced(normalize(sparse.hstack(tables).tocsr()), dimensions, seed)


def tokens(text: str) -> list[str]:
    """Return the words of a text, and pairs of characters of scripts without spaces."""
    parts: list[str] = []
    for part in _WORDS.findall(text):
        if _UNSPACED.match(part) and len(part) > 1:
            parts += (part[i : i + 2] for i in range(len(part) - 1))
        else:
            parts.append(part)
    return parts


def _tfidf(title: Sequence[str], min_titles: int, **options: Any) -> Any:
    """Return the TF-IDF table of titles, or None if no feature is in `min_titles` of them."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=min_titles, **options)
    try:
        return vectorizer.fit_transform(title)
    except ValueError:  # no feature is left
        return None


def without_signal(vectors: Float32[np.ndarray, "I E"]) -> Bool[np.ndarray, " I"]:
    """Return which embeddings say nothing: zero, or too small beside the others to matter.

    Those that `of_interactions` draws at random are.
    """
    norm = np.sqrt(np.einsum("ie,ie->i", vectors, vectors, dtype=np.float64))
    return norm <= 0.1 * np.median(norm[norm > 0]) if (norm > 0).any() else norm >= 0


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
    vectors = _reduced(table, dimensions, seed)
    isolated = np.flatnonzero(~vectors.any(axis=1))
    noise = np.random.default_rng(seed).standard_normal((len(isolated), vectors.shape[1]))
    vectors[isolated] = 1e-3 * noise
    return vectors


def _reduced(table: Any, dimensions: int, seed: int) -> Float32[np.ndarray, "I E"]:
    """Reduce a sparse matrix by a truncated SVD and normalize its rows."""
    width = min(dimensions, min(table.shape) - 1)
    if width < 1:
        dense: Any = normalize(table)
        return np.asarray(dense.todense(), dtype=np.float32)
    reduced: Any = TruncatedSVD(width, random_state=seed).fit_transform(table)
    # What is left of a row that the retained dimensions do not hold is rounding.
    reduced[np.linalg.norm(reduced, axis=1) < _ROUNDING] = 0
    return np.asarray(normalize(reduced), dtype=np.float32)
