"""An embedding for every item: from its text, from who met it, or from a file.

Shapes:  I items   E dimensions   R examples   H history items
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float, Float32, Int64
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from orchard import ragged
from orchard.errors import ConfigError, DataError
from orchard.tables import read_table

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
        raise DataError(f"the titles have no words in common: {error}") from error
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
    return checked(np.asarray(made, dtype=np.float32), len(title), where=str(folder))


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


def of_file(path: Path, item_id: Int64[np.ndarray, " I"]) -> Float32[np.ndarray, "I E"]:
    """Embeddings from Parquet (`item_id`, `embedding`) or from `.npy`, rows as the items file.

    Raises:
        DataError: the wrong number of items, lengths that differ, or values that are not finite.
    """
    if path.suffix == ".npy":
        if not path.is_file():
            raise DataError(f"embeddings file {path} does not exist; check --embeddings")
        return checked(np.load(path, allow_pickle=False), len(item_id), where=str(path))
    table = read_table(
        path, role="embeddings", columns=("item_id", "embedding"), remedy="--embeddings"
    )
    ids, column = table["item_id"].to_numpy(), table["embedding"].combine_chunks()
    length = column.value_lengths().fill_null(0).to_numpy()
    if len(ids) == 0 or length.min() == 0 or length.min() != length.max():
        raise DataError(
            f"embeddings of {path} have lengths from {length.min(initial=0)} to "
            f"{length.max(initial=0)}; all items must have one of the same length"
        )
    order = np.argsort(ids, kind="stable")
    place = order[np.searchsorted(ids, item_id, sorter=order).clip(max=len(ids) - 1)]
    missing = np.flatnonzero(ids[place] != item_id)
    if len(missing):
        raise DataError(
            f"item {item_id[missing[0]]} has no embedding in {path} ({len(missing)} of "
            f"{len(item_id)} items); add it"
        )
    flat = column.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), -1)
    return checked(flat[place], len(item_id), where=str(path))


def checked(
    made: Float[np.ndarray, "..."], num_items: int, *, where: str
) -> Float32[np.ndarray, "I E"]:
    """The embeddings in float32; raises DataError on a wrong number or values not finite."""
    if made.ndim != 2 or len(made) != num_items:
        raise DataError(
            f"{where} holds embeddings of shape {made.shape} for {num_items} items; one row per "
            "item is needed"
        )
    bad = np.flatnonzero(~np.isfinite(made).all(axis=1))
    if len(bad):
        raise DataError(
            f"the embedding of item row {bad[0]} in {where} is not finite ({len(bad)} such items); "
            "compute it anew"
        )
    return np.ascontiguousarray(made, dtype=np.float32)


def _reduced(table: Any, dimensions: int, seed: int) -> Float32[np.ndarray, "I E"]:
    width = min(dimensions, min(table.shape) - 1)
    if width < 1:
        plain: Any = normalize(table)
        return np.asarray(plain.todense(), dtype=np.float32)
    made: Any = TruncatedSVD(width, random_state=seed).fit_transform(table)
    return np.asarray(normalize(made), dtype=np.float32)
