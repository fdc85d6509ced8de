"""Semantic IDs: quantised, balanced, settled, measured."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import PreTrainedTokenizerFast

pytest.importorskip("faiss", reason="faiss is not installed; `make env` brings it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; `make env` brings it")

from orchard import ragged
from orchard.catalog import catalog as catalogs
from orchard.errors import ConfigError, DataError
from orchard.semantic_ids import embed, rqvae, title_encoder
from orchard.semantic_ids.build import (
    EMBEDDINGS,
    PICTURE,
    QUANTIZERS,
    REPORT,
    SemanticIdConfig,
    build,
)
from orchard.semantic_ids.collisions import (
    POLICIES,
    ResolvedCodes,
    extra_level,
    keep,
    reassign,
)
from orchard.semantic_ids.measure import measure_codes
from orchard.semantic_ids.projection import Projection
from orchard.semantic_ids.quantize import Quantized, distances, match, quantize


def blobs(per: int = 10, *, seed: int = 0) -> np.ndarray[Any, Any]:
    """Four coarse groups of four fine ones each, far apart at each scale."""
    draw = np.random.default_rng(seed)
    coarse = np.repeat(100 * np.eye(8, dtype=np.float32)[:4], 4 * per, axis=0)
    fine = np.tile(np.repeat(10 * np.eye(8, dtype=np.float32)[4:], per, axis=0), (4, 1))
    return (coarse + fine + 0.1 * draw.standard_normal(coarse.shape)).astype(np.float32)


def of_codes(codes: list[list[int]], *, last: int = 4) -> Quantized:
    """Codes whose items lie on the centroids of their last level, on a line."""
    book = np.arange(last, dtype=np.float32)[:, None]
    table = np.array(codes)
    return Quantized(
        codes=table,
        codebook=(book, book),
        error=np.zeros(2),
        last=book[table[:, -1]],
        projection=Projection(mean=np.zeros(1, dtype=np.float32)),
    )


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


def test_levels_find_the_scales_of_the_data() -> None:
    points = blobs()
    found = quantize(points, (4, 4))
    coarse, fine = np.repeat(np.arange(4), 40), np.tile(np.repeat(np.arange(4), 10), 4)
    for level, truth in enumerate((coarse, fine)):
        pairs = np.unique(np.stack([found.codes[:, level], truth]), axis=1)
        assert pairs.shape[1] == 4  # one to one
    assert 1 > found.error[0] > 100 * found.error[1] > 0


def test_residuals_add_up_to_the_embedding() -> None:
    points = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    found = quantize(points, (8, 8, 8))
    parts = [book[found.codes[:, level]] for level, book in enumerate(found.codebook)]
    centred = points - points.mean(0)
    rest = ((centred - sum(parts)) ** 2).sum() / (centred**2).sum()
    assert rest == pytest.approx(found.error[-1], rel=1e-4)
    assert (np.diff(found.error) < 0).all()
    again = quantize(points, (8, 8, 8))
    assert (again.codes == found.codes).all()


@given(st.integers(2, 40), st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=25)
def test_a_match_fits_and_is_stable(items: int, codes: int, seed: int) -> None:
    distance = np.random.default_rng(seed).random((items, codes), dtype=np.float32)
    most = math.ceil(items / codes)
    code = match(distance, most)
    own = distance[np.arange(items), code]
    count = np.bincount(code, minlength=codes)
    assert count.max() <= most
    for item in range(items):
        for other in np.flatnonzero(distance[item] < own[item]):
            assert count[other] == most
            assert own[code == other].max() <= distance[item, other]


def test_balanced_codes_are_used_alike() -> None:
    draw = np.random.default_rng(0)
    skewed = (draw.standard_normal((300, 4)) * np.array([9, 1, 1, 1])).astype(np.float32)
    plain, even = (quantize(skewed, (7, 7), balanced=b) for b in (False, True))
    for level in (0, 1):
        assert np.bincount(even.codes[:, level]).max() <= math.ceil(300 / 7)
    assert np.bincount(plain.codes[:, 0]).max() > math.ceil(300 / 7)
    assert even.error[-1] < 1


def test_a_learned_quantiser_recovers_the_scales_of_the_data_and_repeats_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rqvae, "_UPDATES", 100)
    points, before = blobs(), torch.random.get_rng_state()
    found = rqvae.quantize_learned(points, (4, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = np.unique(np.stack([found.codes[:, 0], np.repeat(np.arange(4), 40)]), axis=1)
    assert pairs.shape[1] == 4  # one to one
    assert 1 > found.error[0] > found.error[1] > 0
    near = distances(found.last, found.codebook[-1]).argmin(1)
    assert (near == found.codes[:, -1]).all()
    again, other = (rqvae.quantize_learned(points, (4, 4), seed=seed) for seed in (0, 1))
    assert (again.codes == found.codes).all()
    assert (again.codebook[0] == found.codebook[0]).all()
    assert (other.codebook[0] != found.codebook[0]).any()
    with pytest.raises(DataError, match="lower --levels"):
        rqvae.quantize_learned(points[:3], (4, 4))


def test_gradients_pass_through_the_quantisation_and_idle_codes_begin_anew() -> None:
    torch.manual_seed(0)
    points = torch.from_numpy(blobs())
    made = rqvae.RqVae(8, (4, 6))
    made.begin(points, seed=0)
    vector = made.encoder(points)
    codes, taken, left = made.quantize(vector)
    assert (left[0] == vector).all()
    torch.testing.assert_close(left[1], vector - taken[0])
    loss, seen = made.loss(points)
    loss.backward()
    assert (seen == codes).all()
    for parameter in made.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0
    with torch.no_grad():
        made.books[1][5] = 1e6  # out of reach
    used = [torch.bincount(level, minlength=6) for level in made.quantize(vector)[0].T]
    assert used[1][5] == 0
    made.revive([used[0][:4], used[1]], points)
    assert float(made.books[1][5].detach().abs().max()) < 1e3


def test_an_extra_level_counts_those_that_share_by_the_prior() -> None:
    made = of_codes([[0, 1], [0, 1], [2, 0], [0, 1]])
    settled = extra_level(made, np.array([1.0, 3.0, 9.0, 2.0]))
    assert settled.codes.tolist() == [[0, 1, 2], [0, 1, 0], [2, 0, 0], [0, 1, 1]]


def test_keeping_lists_the_likelier_item_first() -> None:
    made = of_codes([[0, 1], [2, 0], [0, 1], [0, 1]])
    settled = keep(made, np.array([1.0, 9.0, 2.0, 3.0]))
    assert settled.codes.tolist() == made.codes.tolist()
    assert settled.order.tolist() == [3, 1, 2, 0]


def test_reassigning_moves_as_little_as_it_can() -> None:
    made = of_codes([[0, 1], [0, 1], [0, 2], [1, 1]])
    settled = reassign(made, np.zeros(4))
    assert sorted(settled.codes[:2, 1].tolist()) == [0, 1]  # 2 is taken, 3 is farther
    assert settled.codes[2:].tolist() == [[0, 2], [1, 1]]
    crowded = reassign(of_codes([[0, 1]] * 6), np.zeros(6))
    quality = measure_codes(crowded.codes)
    assert (quality["distinct"], quality["items"]) == (4, 6)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=30))
@settings(max_examples=25)
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_touch_the_last_level_and_those_that_collide_alone(
    policy: str, rows: list[tuple[int, int]]
) -> None:
    made = of_codes([list(row) for row in rows])
    prior = np.random.default_rng(len(rows)).random(len(rows))
    settled: ResolvedCodes = POLICIES[policy](made, prior)
    assert sorted(settled.order.tolist()) == list(range(len(rows)))
    assert (settled.codes[:, 0] == made.codes[:, 0]).all()
    alone = [rows.count(row) == 1 for row in rows]
    assert (settled.codes[alone, 1] == made.codes[alone, 1]).all()
    if policy == "extra_level":
        assert measure_codes(settled.codes)["colliding_items"] == 0
    per_prefix = [min(4, sum(r[0] == p for r in rows)) for p in {r[0] for r in rows}]
    if policy == "reassign":  # as many distinct codes as fit below each prefix
        assert measure_codes(settled.codes)["distinct"] == sum(per_prefix)


def test_the_published_ids_measure_as_published(shared_data: Path) -> None:
    folder = shared_data / "amazon_industrial"
    stats = json.loads((folder / "stats.json").read_text())["sid"]
    found = measure_codes(catalogs.read(folder / "items.parquet").codes)
    assert found["distinct"] == stats["unique_sids"]
    assert found["colliding_items"] == stats["items_in_collisions"]
    assert found["largest_collision"] == stats["largest_group"]
    for level, known in zip(found["levels"], stats["levels"], strict=True):
        assert level["codes_used"] == known["codes_used"]
        assert level["perplexity"] == pytest.approx(known["code_perplexity"], abs=0.05)
        assert level["prefixes"] == known["parent_prefixes"]
        assert level["children_max"] == known["children_max"]
        assert level["single_child_share"] == pytest.approx(known["forced_share"], abs=5e-5)


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


def shop(folder: Path, titles: list[str | None]) -> Path:
    folder.mkdir()
    ids = np.arange(len(titles)) + 7
    pq.write_table(pa.table({"item_id": ids, "title": titles}), folder / "items.parquet")
    rows = [[int(ids[i % len(ids)]), int(ids[(i + 1) % len(ids)])] for i in range(60)]
    table = {"history": rows, "target": [int(ids[(i + 2) % len(ids)]) for i in range(60)]}
    pq.write_table(pa.table(table), folder / "train.parquet")
    return folder


TITLES: list[str | None] = [f"{a} {b}" for a in ("red", "blue", "black") for b in "uvwxyz"]


@pytest.mark.parametrize("quantiser", QUANTIZERS)
def test_every_quantiser_leaves_the_same_report(
    quantiser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rqvae, "_UPDATES", 20)
    folder = shop(tmp_path / "shop", TITLES)
    report = build(folder, SemanticIdConfig(levels=(3, 4), quantiser=quantiser, dimensions=8))
    assert report["recipe"]["quantiser"] == quantiser
    assert len(report["residual"]) == 2
    assert report["after"]["distinct"] == catalogs.read(folder / "items.parquet").trie.num_leaves


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("source", ["titles", "interactions"])
def test_a_data_set_gets_semantic_ids_that_make_a_catalog(
    policy: str, source: Any, tmp_path: Path
) -> None:
    folder = shop(tmp_path / "shop", TITLES)
    recipe = SemanticIdConfig(levels=(3, 4), collisions=policy, source=source, dimensions=8)
    report = build(folder, recipe)
    items = catalogs.read(folder / "items.parquet")
    assert items.trie.num_leaves == report["after"]["distinct"]
    assert sorted(items.item_id.tolist()) == list(range(7, 25))
    assert items.title[int(items.rows(np.array([7]))[0])] == "red u"
    vectors = catalogs.read_embeddings(folder / EMBEDDINGS, items)
    assert vectors.shape == (18, report["recipe"]["dimensions"])
    assert json.loads((folder / REPORT).read_text()) == report
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="pass --overwrite to replace them"):
        build(folder, recipe)
    build(folder, recipe, overwrite=True)


def test_embeddings_of_ones_own_are_taken_by_identifier(tmp_path: Path) -> None:
    folder = shop(tmp_path / "shop", TITLES)
    points = blobs(per=2)[:18]
    np.save(tmp_path / "e.npy", points)
    order = np.random.default_rng(0).permutation(18)
    table = {"item_id": order + 7, "embedding": list(points[order])}
    pq.write_table(pa.table(table), tmp_path / "e.parquet")
    tables: list[Any] = []
    for name in ("e.npy", "e.parquet"):
        build(folder, SemanticIdConfig(levels=(2, 4), embeddings=tmp_path / name), overwrite=True)
        tables.append(pq.read_table(folder / "items.parquet"))
    assert tables[0].equals(tables[1])


def test_what_cannot_be_embedded_is_refused_and_the_folder_stays_as_it_was(tmp_path: Path) -> None:
    folder = shop(tmp_path / "shop", [*TITLES[:-1], None])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    points = blobs(per=2)[:18]
    np.save(tmp_path / "few.npy", points[:17])
    np.save(tmp_path / "nan.npy", np.where(np.arange(18)[:, None] == 5, np.nan, points))
    few = pa.table({"item_id": np.arange(17) + 7, "embedding": list(points[:17])})
    pq.write_table(few, tmp_path / "few.parquet")
    np.save(tmp_path / "words.npy", np.array([["a"]] * 18))
    (tmp_path / "junk.npy").write_text("junk")
    twice = pa.table({"item_id": [7, *range(7, 25)], "embedding": list(points[[0, *range(18)]])})
    pq.write_table(twice, tmp_path / "twice.parquet")
    words = pa.table({"item_id": np.arange(18) + 7, "embedding": ["a"] * 18})
    pq.write_table(words, tmp_path / "words.parquet")
    (tmp_path / "model").mkdir()
    small = {"levels": (2, 2)}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({**small, "source": "titles"}, DataError, "item row 17 has no title"),
        ({**small, "embeddings": tmp_path / "few.npy"}, DataError, r"\(17, 8\) for 18 items"),
        ({**small, "embeddings": tmp_path / "few.parquet"}, DataError, "item 24 has no embedding"),
        ({**small, "embeddings": tmp_path / "nan.npy"}, DataError, "item row 5 in .* not finite"),
        ({**small, "embeddings": tmp_path / "no.npy"}, DataError, "does not exist"),
        ({**small, "embeddings": tmp_path / "junk.npy"}, DataError, "is no array of numbers"),
        ({**small, "embeddings": tmp_path / "words.npy"}, DataError, "save real numbers"),
        ({**small, "embeddings": tmp_path / "words.parquet"}, DataError, "as a list of numbers"),
        ({**small, "embeddings": tmp_path / "twice.parquet"}, DataError, "item 7 has several"),
        ({**small, "model": tmp_path / "model"}, ConfigError, "holds no config.json"),
        ({"levels": (256,)}, DataError, "lower --levels"),
        ({"levels": (1, 4)}, ConfigError, "at least 2 codes"),
        ({"levels": (4,) * 9}, ConfigError, "has 9 codebooks, at most 8"),
        ({**small, "quantiser": "magic"}, ConfigError, "choose from kmeans, balanced, rqvae"),
        ({**small, "collisions": "pray"}, ConfigError, "choose from extra_level, reassign, keep"),
    ]
    for recipe, kind, message in cases:
        with pytest.raises(kind, match=message):
            build(folder, SemanticIdConfig(**recipe))
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no weights"):
        build(folder, SemanticIdConfig(levels=(2, 2), model=tmp_path / "model"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("suffix", ["npy", "npz", "pt"])
def test_rows_without_identifiers_stay_with_their_items_when_those_are_reordered(
    suffix: str, tmp_path: Path
) -> None:
    folder = shop(tmp_path / "shop", TITLES)
    points = blobs(per=2)[:18]
    path = tmp_path / f"e.{suffix}"
    if suffix == "npy":
        np.save(path, points)
    elif suffix == "npz":
        np.savez(path, points)
    else:
        torch.save(torch.from_numpy(points), path)
    rng = np.random.default_rng(1)
    target = rng.choice(np.arange(7, 25), 200, p=rng.dirichlet(np.ones(18)))
    rows = {"history": [[7]] * 200, "target": target}
    pq.write_table(pa.table(rows), folder / "train.parquet")
    recipe = SemanticIdConfig(levels=(2, 4), embeddings=path, collisions="keep")
    found: list[tuple[list[int], dict[int, list[int]]]] = []
    for _ in range(3):
        build(folder, recipe, overwrite=True)
        table = pq.read_table(folder / "items.parquet").to_pydict()
        found.append((table["item_id"], dict(zip(table["item_id"], table["sid"], strict=True))))
        vectors = catalogs.read_embeddings(
            folder / EMBEDDINGS, catalogs.read(folder / "items.parquet")
        )
        assert (vectors == points[np.array(table["item_id"]) - 7]).all()
    assert found[0][0] != list(range(7, 25))  # the items were put in another order
    assert found[0] == found[1] == found[2]
    for file in (folder / "items.parquet", None):  # a run reads the file the same way
        read = catalogs.read_embeddings(path, catalogs.read(folder / "items.parquet"), items=file)
        if file is not None:
            assert (read == points[np.array(found[0][0]) - 7]).all()
    np.save(tmp_path / "other.npy", points + 1)  # in which order is it?
    other = SemanticIdConfig(levels=(2, 4), embeddings=tmp_path / "other.npy", collisions="keep")
    with pytest.raises(DataError, match="have no identifiers, and .* was put in another order"):
        build(folder, other, overwrite=True)


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


def test_words_are_read_as_before_where_every_title_shares_one() -> None:
    assert title_encoder.tokens("oak-table no. 5") == ["oak", "table", "no", "5"]
    assert title_encoder.tokens("Sony赤の椅子 x") == ["Sony", "赤の", "の椅", "椅子", "x"]


def test_items_without_signal_are_counted_and_bounded(tmp_path: Path) -> None:
    folder = shop(tmp_path / "shop", TITLES)
    points = blobs(per=2)[:18]
    points[:4] = 0
    np.save(tmp_path / "e.npy", points)
    recipe = {"levels": (2, 4), "embeddings": tmp_path / "e.npy"}
    with pytest.raises(
        DataError, match=r"of 4 of 18 items say nothing .* such as item 7; at most 20%"
    ):
        build(folder, SemanticIdConfig(**recipe))
    report = build(folder, SemanticIdConfig(**recipe, max_without_signal=0.25))
    assert (report["items_without_signal"], report["items_sharing_an_embedding"]) == (4, 4)
