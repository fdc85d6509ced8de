"""An embedding for every item: from its text, or from who met it.

Shapes:  I items   E dimensions   R examples   H history items
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float32, Int64
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from orchard import ragged
from orchard.catalog import embeddings
from orchard.errors import ConfigError, DataError

_WINDOW = 5
"""Most recent history items that count as neighbours of the target."""


def of_titles(title: Sequence[str], *, dimensions: int, seed: int) -> Float32[np.ndarray, "I E"]:
    """TF-IDF of words and word pairs, reduced by a truncated SVD, of unit length.

    Raises:
        DataError: an item has no title, or no words are shared.
    """
    bare = [row for row, text in enumerate(title) if not text.strip()]
    if bare:
        raise DataError(
            f"item row {bare[0]} has no title ({len(bare)} of {len(title)} items); add titles, or "
            "take --source interactions"
        )
    shared = 2 if len(title) > 100 else 1  # a word of one title relates it to no other
    words = TfidfVectorizer(
        sublinear_tf=True, ngram_range=(1, 2), min_df=shared, token_pattern=r"(?u)\b\w+\b"
    )
    try:
        table: Any = words.fit_transform(title)
    except ValueError as error:
        raise DataError(
            f"the titles have no words in common: {error}; take --source interactions"
        ) from error
    return _reduced(table, dimensions, seed)


def of_model(title: Sequence[str], folder: Path) -> Float32[np.ndarray, "I E"]:
    """What a sentence-transformers model in a local folder makes of the titles.

    Raises:
        ConfigError: the folder is no model, or the library is not installed.
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
    made: Any = model.encode(list(title), normalize_embeddings=True, show_progress_bar=True)
    return embeddings.check_embeddings(
        np.asarray(made, dtype=np.float32), len(title), where=str(folder)
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
    """Truncated SVD of positive pointwise mutual information between targets and recent items.

    This factorises what item2vec does (Levy and Goldberg, NeurIPS 2014). Items without a neighbour
    get a small random direction.

    Raises:
        DataError: no pair is known.
    """
    count = np.minimum(np.diff(start), _WINDOW)
    near = history[ragged.ranges(start[1:] - count, count)]
    pairs: Any = sparse.coo_array(
        (np.ones(len(near)), (near, np.repeat(target, count))), shape=(num_items, num_items)
    ).tocsr()
    pairs = (pairs + pairs.T).tocoo()
    total = np.asarray(pairs.sum(axis=1)).reshape(-1)
    if total.sum() == 0:
        raise DataError("train has no pairs of items to embed from; take --source titles")
    expected = total[pairs.row] * total[pairs.col] / total.sum()
    mutual = np.maximum(np.log(pairs.data / expected), 0)
    table: Any = sparse.csr_array((mutual, (pairs.row, pairs.col)), shape=pairs.shape)
    made = _reduced(table, dimensions, seed)
    lonely = np.flatnonzero(~made.any(axis=1))
    draw = np.random.default_rng(seed).standard_normal((len(lonely), made.shape[1]))
    made[lonely] = 1e-3 * draw
    return made


def _reduced(table: Any, dimensions: int, seed: int) -> Float32[np.ndarray, "I E"]:
    width = min(dimensions, min(table.shape) - 1)
    if width < 1:
        plain: Any = normalize(table)
        return np.asarray(plain.todense(), dtype=np.float32)
    made: Any = TruncatedSVD(width, random_state=seed).fit_transform(table)
    return np.asarray(normalize(made), dtype=np.float32)
