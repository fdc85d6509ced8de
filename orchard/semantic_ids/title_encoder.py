"""Embed titles by TF-IDF and a truncated SVD, fitted once and kept.

Shapes:  I items   F features   E dimensions
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float32, Float64
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from orchard.errors import DataError

_SCRIPTS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese characters."""
_UNSPACED = re.compile(f"[{_SCRIPTS}]")
_WORDS = re.compile(f"[{_SCRIPTS}]+|[^\\W{_SCRIPTS}]+")
_ROUNDING = 1e-6
"""Length below which a reduced row of unit length is rounding."""


def tokens(text: str) -> list[str]:
    """Return the words of a text, and pairs of characters of scripts without spaces."""
    parts: list[str] = []
    for part in _WORDS.findall(text):
        if _UNSPACED.match(part) and len(part) > 1:
            parts += (part[i : i + 2] for i in range(len(part) - 1))
        else:
            parts.append(part)
    return parts


_ANALYZERS: Mapping[str, Mapping[str, Any]] = {
    "words": {"tokenizer": tokens, "token_pattern": None, "ngram_range": (1, 2)},
    "characters": {"analyzer": "char", "ngram_range": (1, 3)},
}
"""Options of the vectorizer by the name of the features that it counts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TitleEncoder:
    """Fitted TF-IDF vectorizers of words, characters or both, and the axes of the SVD."""

    vectorizers: Mapping[str, Any]
    """Vectorizer of each kind of features, a key of `_ANALYZERS`."""
    components: Float64[np.ndarray, "E F"] | None
    """Axes of the SVD; None where there are too few titles or features to reduce."""

    @classmethod
    def fit(cls, title: Sequence[str], *, dimensions: int, seed: int) -> "TitleEncoder":
        """Fit the vocabulary and the axes.

        Words and word pairs are counted. Scripts that are written without spaces are read in pairs
        of characters. Where the words of a title are no other's, or it has none, characters and
        their sequences of up to three are added for all titles.

        Raises:
            DataError: the titles share no characters.
        """
        words = _fitted("words", title)
        if words is not None and (words.transform(title).getnnz(axis=1) > 0).all():
            vectorizers = {"words": words}
        else:
            characters = _fitted("characters", title)
            both = {"words": words, "characters": characters}
            vectorizers = {name: found for name, found in both.items() if found is not None}
        if not vectorizers:
            raise DataError(
                "the titles have no characters in common; take --source interactions, or "
                "--embeddings"
            )
        return cls(
            vectorizers=vectorizers,
            components=axes(_table(vectorizers, title), dimensions, seed),
        )

    def embed(self, title: Sequence[str]) -> Float32[np.ndarray, "I E"]:
        """Embed titles with unit length; one that shares no feature with the fitted is zero.

        A row's result does not depend on the rows beside it.
        """
        return reduced(_table(self.vectorizers, title), self.components)

    def to_state(self) -> tuple[str, dict[str, np.ndarray]]:
        """Return the vocabulary as JSON, and the arrays."""
        terms = {
            name: sorted(vectorizer.vocabulary_, key=vectorizer.vocabulary_.__getitem__)
            for name, vectorizer in self.vectorizers.items()
        }
        arrays: dict[str, np.ndarray] = {
            f"idf.{name}": np.asarray(vectorizer.idf_, dtype=np.float64)
            for name, vectorizer in self.vectorizers.items()
        }
        if self.components is not None:
            arrays["components"] = self.components
        return json.dumps({"features": terms}, ensure_ascii=False) + "\n", arrays

    @classmethod
    def from_state(cls, text: str, arrays: Mapping[str, np.ndarray]) -> "TitleEncoder":
        """Restore an encoder; raises ValueError or KeyError where a part is missing."""
        vectorizers: dict[str, Any] = {}
        for name, terms in json.loads(text)["features"].items():
            vocabulary = {term: column for column, term in enumerate(terms)}
            vectorizers[name] = TfidfVectorizer(
                sublinear_tf=True, vocabulary=vocabulary, **_ANALYZERS[name]
            )
            vectorizers[name].idf_ = arrays[f"idf.{name}"]
        return cls(vectorizers=vectorizers, components=arrays.get("components"))


def axes(table: Any, dimensions: int, seed: int) -> Float64[np.ndarray, "E F"] | None:
    """Fit the axes of a truncated SVD to a sparse matrix; None where it is too small."""
    width = min(dimensions, min(table.shape) - 1)
    if width < 1:
        return None
    fitted: Any = TruncatedSVD(width, random_state=seed).fit(table)
    return np.ascontiguousarray(fitted.components_, dtype=np.float64)


def reduced(
    table: Any, components: Float64[np.ndarray, "E F"] | None
) -> Float32[np.ndarray, "I E"]:
    """Reduce a sparse matrix to the axes and normalize its rows."""
    if components is None:
        dense: Any = normalize(table)
        return np.asarray(dense.todense(), dtype=np.float32)
    rows: Any = table @ components.T
    # What is left of a row that the retained dimensions do not hold is rounding.
    rows[np.linalg.norm(rows, axis=1) < _ROUNDING] = 0
    return np.asarray(normalize(rows), dtype=np.float32)


def _fitted(name: str, title: Sequence[str]) -> Any:
    """Fit a vectorizer; return None if no feature is in enough titles."""
    min_titles = 2 if len(title) > 100 else 1  # a feature of a single title relates no items
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=min_titles, **_ANALYZERS[name])
    try:
        return vectorizer.fit(title)
    except ValueError:  # no feature is left
        return None


def _table(vectorizers: Mapping[str, Any], title: Sequence[str]) -> Any:
    """Return the TF-IDF matrix of titles, of unit length over all kinds of features."""
    tables = [vectorizer.transform(title) for vectorizer in vectorizers.values()]
    if list(vectorizers) == ["words"]:
        return tables[0]
    return normalize(sparse.hstack(tables).tocsr())
