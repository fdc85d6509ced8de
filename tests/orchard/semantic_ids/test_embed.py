"""Embeddings of titles and of interactions."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import PreTrainedTokenizerFast

from orchard import ragged
from orchard.semantic_ids import embed
from orchard.semantic_ids.quantize import distances


def test_a_title_that_names_a_special_token_is_embedded_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is a stand-in; its tokenizer, which decides, is a real one."""
    words = ["[PAD]", "[UNK]", "[", "]", "PAD", "red", "shoe"]
    vocabulary = WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    inner = Tokenizer(vocabulary)
    inner.pre_tokenizer = BertPreTokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}

    class Counting:
        """Embeds a title as the counts of its tokens."""

        def __init__(self, folder: str, *, local_files_only: bool) -> None:
            self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)

        def encode(self, titles: list[str], **_: object) -> np.ndarray:
            rows = self.tokenizer(titles, add_special_tokens=False)["input_ids"]
            return np.stack([np.bincount(row, minlength=len(words)) for row in rows])

    library = ModuleType("sentence_transformers")
    monkeypatch.setattr(library, "SentenceTransformer", Counting, raising=False)
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).touch()
    vectors = embed.of_model(["red [PAD] shoe", "red shoe"], tmp_path)
    assert vectors.tolist() == [[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]]


def test_items_of_like_titles_and_of_like_company_lie_close() -> None:
    kinds = ["oak table"] * 6 + ["steel drill"] * 6
    titles = [f"{kind} model{number}" for number, kind in enumerate(kinds)]
    made = embed.of_titles(titles, dimensions=4, seed=0)
    near = distances(made, made)
    assert near[:6, :6].mean() < near[:6, 6:].min()
    draw = np.random.default_rng(0)
    side = draw.integers(2, size=400)  # a user stays on one side
    history = (draw.integers(6, size=(400, 3)) + 6 * side[:, None]).reshape(-1)
    made = embed.of_interactions(
        history, ragged.starts(np.full(400, 3)), draw.integers(6, size=400) + 6 * side,
        num_items=13, dimensions=4, seed=0,
    )  # fmt: skip
    near = distances(made[:12], made[:12])
    assert near[:6, :6].mean() < near[:6, 6:].min()
    assert 0 < np.abs(made[12]).max() < 0.01  # the item that nobody met


SCRIPTS = {
    "Chinese": [
        f"{a}{b}色的商品第{n}号"
        for n, (a, b) in enumerate(zip("红蓝绿黑" * 30, "深浅亮" * 40, strict=True))
    ],
    "Japanese": [f"赤青緑の商品{'あいうえお'[n % 5]}第{n}号" for n in range(120)],
    "Thai": [f"{'โคมไฟโต๊ะเก้าอี้'[n % 6 : n % 6 + 8]}สวยงาม{n}" for n in range(120)],
    "punctuation": [("!?" * (n % 4 + 1) + "..." * (n % 3 + 1)) for n in range(120)],
    "numbers": [f"X{n}Y{n * 7}" for n in range(120)],
    "mixed": [f"Sony {'赤青緑'[n % 3]}の商品第{n}号" if n % 2 else f"{n}-a!" for n in range(120)],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_titles_of_any_script_have_a_signal(script: str) -> None:
    vectors = embed.of_titles(SCRIPTS[script], dimensions=16, seed=0)
    assert embed.without_signal(vectors).sum() == 0
    assert len(np.unique(vectors.round(4), axis=0)) > 3
