"""New items get semantic IDs of a bundle, old ones keep theirs."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("faiss", reason="faiss is not installed; `make env` brings it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; `make env` brings it")

from orchard.errors import ConfigError, DataError
from orchard.semantic_ids import assign, bundle, rqvae
from orchard.semantic_ids.build import QUANTIZERS, SemanticIdConfig, build
from orchard.semantic_ids.bundle import BUNDLE, Bundle
from orchard.semantic_ids.collisions import POLICIES
from orchard.semantic_ids.encode import EncodeOptions, encode

WORDS = ["red", "blue", "black", "oak", "steel", "table", "drill", "lamp", "chair", "shelf"]
IDS = np.arange(60) + 7
VECTORS = np.random.default_rng(5).standard_normal((64, 6)).astype(np.float32)


def shop(folder: Path, **recipe: Any) -> Path:
    """Make a data set with semantic IDs, and return its bundle."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    title = [" ".join(draw.choice(WORDS, 3)) for _ in IDS]
    pq.write_table(pa.table({"item_id": IDS, "title": title}), folder / "items.parquet")
    rows = {"history": [[7]] * 90, "target": draw.choice(IDS, 90)}
    pq.write_table(pa.table(rows), folder / "train.parquet")
    build(folder, SemanticIdConfig(**({"levels": (3, 12), "dimensions": 8} | recipe)))
    return folder / BUNDLE


def of_vectors(tmp_path: Path, **recipe: Any) -> Path:
    np.save(tmp_path / "e.npy", VECTORS[:60])
    recipe = {"levels": (3, 40), "embeddings": tmp_path / "e.npy"} | recipe
    return shop(tmp_path / "shop", **recipe)


def new_items(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def sids(path: Path) -> dict[int, list[int]]:
    table = pq.read_table(path)
    return dict(zip(table["item_id"].to_pylist(), table["sid"].to_pylist(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("quantiser", QUANTIZERS)
def test_the_items_of_a_bundle_get_their_ids_again_to_the_last_code(
    quantiser: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rqvae, "_UPDATES", 20)
    folder = shop(tmp_path / "shop", quantiser=quantiser, collisions=policy)
    own = folder.parent / "items.parquet"
    report = encode(folder, own, tmp_path / "out.parquet", EncodeOptions(verify=True))
    assert (report.num_known, report.num_new, report.num_repeated) == (60, 0, 60)
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(own))
    known = Bundle.open(folder)
    assert known.titles is not None
    title = dict(pq.read_table(own, columns=["item_id", "title"]).to_pandas().to_numpy().tolist())
    vectors = known.titles.embed([title[item] for item in known.table.item_id.tolist()])
    whole = assign.quantize(known, vectors)
    if quantiser != "balanced":
        assert (whole.codes == known.table.quantized).all()
    for row in range(0, 60, 7):  # one item alone has the codes that it has among others
        alone = assign.quantize(known, vectors[row : row + 1])
        assert (alone.codes[0] == whole.codes[row]).all()
    broken = vectors.copy()
    broken[3] = -broken[3]
    assert (assign.repeat(known, broken) != known.table.sid).any()


@pytest.mark.slow
@pytest.mark.parametrize("quantiser", QUANTIZERS)
def test_new_items_take_free_codes_and_old_ones_never_move(
    quantiser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rqvae, "_UPDATES", 20)
    folder = shop(tmp_path / "shop", quantiser=quantiser, levels=(3, 40))
    before = sids(folder.parent / "items.parquet")
    twins = pq.read_table(folder.parent / "items.parquet")["title"].to_pylist()[:5]
    items = new_items(tmp_path / "new.parquet", item_id=[1, 2, 3, 4, 5, 7], title=[*twins, "x"])
    out = tmp_path / "out.parquet"
    report = encode(folder, items, out, EncodeOptions(append=True))
    assert (report.version, report.num_known, report.num_new) == (2, 1, 5)
    assert report.num_moved > 0
    found = sids(out)
    assert found[7] == before[7]
    assert pq.read_table(out)["sid_text"][5].as_py() == "<a_{}><b_{}>".format(*before[7])
    every = [tuple(sid) for sid in (before | found).values()]
    assert len(set(every)) == len(set(map(tuple, before.values()))) + 5
    # A later append, and an encoding of everything, leaves all of them.
    more = new_items(tmp_path / "more.parquet", item_id=[8, 66, 67], title=["x", *twins[:2]])
    encode(folder, more, tmp_path / "out3.parquet", EncodeOptions(append=True))
    both = new_items(tmp_path / "all.parquet", item_id=[*(before | found)])
    last = encode(folder, both, tmp_path / "all-out.parquet", EncodeOptions(append=True))
    assert (last.version, last.num_new) == (3, 0)
    assert sids(tmp_path / "all-out.parquet") == before | found


@pytest.mark.slow
def test_a_new_item_takes_the_nearest_free_code_below_its_prefix(tmp_path: Path) -> None:
    folder = of_vectors(tmp_path)
    known = Bundle.open(folder)
    made = assign.assign(known, np.arange(4) + 900, VECTORS[60:])
    quantized = assign.quantize(known, VECTORS[60:])
    assert (made.items.sid[:, 0] == made.items.quantized[:, 0]).all()
    for row in range(4):
        prefix = made.items.sid[row, 0]
        others = np.concatenate([known.table.sid, np.delete(made.items.sid, row, axis=0)])
        free = np.setdiff1d(np.arange(40), others[others[:, 0] == prefix, 1])
        distance = ((quantized.last[row] - known.books[1]) ** 2).sum(axis=1)
        assert made.items.sid[row, 1] in free
        alone = assign.assign(known, np.array([900]), VECTORS[60 + row : 61 + row])
        taken = known.table.sid[known.table.sid[:, 0] == prefix, 1]
        free = np.setdiff1d(np.arange(40), taken)
        assert alone.items.sid[0, 1] == free[distance[free].argmin()]
        assert alone.items.distance[0] == pytest.approx(distance[free].min(), rel=1e-4)
        assert alone.items.nearest[0] == pytest.approx(distance.min(), rel=1e-4)


@pytest.mark.slow
def test_an_extra_level_counts_on_and_keeping_shares(tmp_path: Path) -> None:
    for policy in ("extra_level", "keep"):
        (tmp_path / policy).mkdir()
        folder = of_vectors(tmp_path / policy, collisions=policy, levels=(2, 3))
        known = Bundle.open(folder)
        made = assign.assign(known, np.array([900, 901]), VECTORS[[0, 0]], share_when_full=True)
        own = known.table.sid[0]
        if policy == "keep":
            assert made.items.sid.tolist() == [own.tolist()] * 2
            continue
        sid = known.table.sid
        ranks = sid[(sid[:, :2] == own[:2]).all(axis=1), 2]
        size = known.description.level_size[2]
        expected = [min(len(ranks), size - 1), min(len(ranks) + 1, size - 1)]
        assert made.items.sid[:, 2].tolist() == expected
        assert made.is_shared.tolist() == [len(ranks) >= size, len(ranks) + 1 >= size]


@pytest.mark.slow
def test_a_full_level_refuses_or_is_shared(tmp_path: Path) -> None:
    folder = of_vectors(tmp_path, levels=(2, 2))
    items = new_items(tmp_path / "new.parquet", item_id=[900, 901])
    np.save(tmp_path / "new.npy", VECTORS[60:62])
    options = {"embeddings": tmp_path / "new.npy", "append": True}
    with pytest.raises(
        DataError, match=r"all 2 codes of the last level are taken below \(\d\), where item 900"
    ):
        encode(folder, items, tmp_path / "out.parquet", EncodeOptions(**options))
    assert bundle.versions(folder) == [1]
    assert not (tmp_path / "out.parquet").exists()
    report = encode(
        folder, items, tmp_path / "out.parquet", EncodeOptions(**options, share_when_full=True)
    )
    assert (report.num_shared, report.version) == (2, 2)


@pytest.mark.slow
def test_narrow_numbers_are_taken_and_zeros_counted(tmp_path: Path) -> None:
    folder = of_vectors(tmp_path)
    items = new_items(tmp_path / "new.parquet", item_id=[900, 901, 902, 903])
    vectors = VECTORS[60:].copy()
    vectors[2] = 0
    rounded = torch.from_numpy(vectors).bfloat16()
    half = vectors.astype(np.float16)
    np.save(tmp_path / "half.npy", half)
    torch.save(rounded, tmp_path / "brain.pt")
    lists = pa.FixedSizeListArray.from_arrays(pa.array(half.reshape(-1)), 6)
    pq.write_table(
        pa.table({"item_id": [900, 901, 902, 903], "embedding": lists}), tmp_path / "half.parquet"
    )
    found: list[dict[int, list[int]]] = []
    for name in ("half.npy", "half.parquet", "brain.pt"):
        options = EncodeOptions(embeddings=tmp_path / name)
        report = encode(folder, items, tmp_path / "out.parquet", options)
        assert (report.num_silent, report.num_new, report.version) == (1, 4, 1)
        found.append(sids(tmp_path / "out.parquet"))
    known = Bundle.open(folder)
    assert found[0] == found[1]
    made = assign.assign(known, np.arange(4), rounded.float().numpy())
    assert list(found[2].values()) == made.items.sid.tolist()


@pytest.mark.slow
def test_what_does_not_fit_a_bundle_is_refused(tmp_path: Path) -> None:
    folder = of_vectors(tmp_path)
    items = new_items(tmp_path / "new.parquet", item_id=[900, 901])
    np.save(tmp_path / "wide.npy", np.ones((2, 7)))
    np.save(tmp_path / "nan.npy", np.array([[1.0] * 6, [np.nan] * 6]))
    titles = shop(tmp_path / "titles")
    named = new_items(tmp_path / "named.parquet", item_id=[900, 901], title=["red oak", " "])
    twice = new_items(tmp_path / "twice.parquet", item_id=[900, 900], title=["red", "red"])
    foreign = new_items(tmp_path / "foreign.parquet", item_id=[7], title=["red"], sid=[[2, 99]])
    unknown = new_items(tmp_path / "unknown.parquet", item_id=[900], title=["red"], sid=[[0, 0]])
    few = new_items(tmp_path / "few.parquet", item_id=[7, 8], title=["red", "oak"])
    cases: list[tuple[Path, Path, dict[str, Any], type[Exception], str]] = [
        (folder, items, {}, ConfigError, "was made from e.npy, and cannot embed .* pass --embed"),
        (folder, items, {"embeddings": tmp_path / "wide.npy"}, DataError, "have 7 dim.* have 6"),
        (folder, items, {"embeddings": tmp_path / "nan.npy"}, DataError, "row 1 .* not finite"),
        (folder, items, {"model": tmp_path}, ConfigError, "--model is given"),
        (titles, items, {}, DataError, r"item 900 of .* has no title \(2 of 2"),
        (titles, named, {}, DataError, r"item 901 of .* has no title \(1 of 2"),
        (titles, named, {"embeddings": tmp_path / "x"}, ConfigError, "--embeddings is given"),
        (titles, twice, {}, DataError, "item 900 is in .* several times"),
        (titles, foreign, {}, DataError, r"item 7 has .* \[2, 99\] .* is another catalog's"),
        (titles, unknown, {}, DataError, r"item 900 has .* \[0, 0\] in .* and none in the bundle"),
        (titles, few, {"verify": True}, DataError, "--verify needs all 60 items"),
        (tmp_path, few, {}, DataError, "holds no tokenizer bundle"),
        (titles, tmp_path / "no.parquet", {}, DataError, "does not exist; check ITEMS"),
    ]
    for where, path, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            encode(where, path, tmp_path / "out.parquet", EncodeOptions(**options))
    assert not (tmp_path / "out.parquet").exists()
    assert bundle.versions(folder) == bundle.versions(titles) == [1]


@pytest.mark.slow
def test_a_title_without_a_known_word_is_assigned_and_counted(tmp_path: Path) -> None:
    folder = shop(tmp_path / "shop", levels=(3, 40))
    items = new_items(tmp_path / "new.parquet", item_id=[900, 901], title=["zzz", "red oak lamp"])
    report = encode(folder, items, tmp_path / "out.parquet", EncodeOptions(append=True))
    assert (report.num_silent, report.num_new) == (1, 2)
    known = Bundle.open(folder)
    assert known.table.item_id[-2:].tolist() == [900, 901]
    own = {tuple(sid) for sid in known.table.sid[:-2].tolist()}
    assert tuple(sids(tmp_path / "out.parquet")[900]) not in own


@pytest.mark.slow
def test_an_encoder_is_named_by_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_model(title: list[str], folder: Path) -> np.ndarray[Any, Any]:
        return np.stack([VECTORS[sum(map(ord, text)) % 64] for text in title])

    monkeypatch.setattr("orchard.semantic_ids.embed.of_model", of_model)
    for name in ("encoder", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    folder = shop(tmp_path / "shop", model=tmp_path / "encoder", levels=(3, 30))
    items = new_items(tmp_path / "new.parquet", item_id=[900], title=["red oak lamp"])
    out = tmp_path / "out.parquet"
    with pytest.raises(ConfigError, match="by the encoder encoder; pass --model with its folder"):
        encode(folder, items, out, EncodeOptions())
    with pytest.raises(ConfigError, match="has digest .* was made with encoder"):
        encode(folder, items, out, EncodeOptions(model=tmp_path / "other"))
    report = encode(folder, items, out, EncodeOptions(model=tmp_path / "encoder"))
    assert report.num_new == 1


@pytest.mark.slow
def test_codes_of_items_elsewhere_are_in_the_way_and_sizes_are_kept(tmp_path: Path) -> None:
    known = Bundle.open(of_vectors(tmp_path))
    ids, vectors = np.arange(4) + 900, VECTORS[60:]
    alone = assign.assign(known, ids, vectors).items.sid
    beside = assign.assign(known, ids, vectors, taken=alone).items.sid
    assert not set(map(tuple, beside.tolist())) & set(map(tuple, alone.tolist()))
    assert (beside[:, 0] == alone[:, 0]).all()
    small = assign.assign(known, ids, vectors, level_size=(2, 30)).items
    assert (small.sid < (2, 30)).all()
    first = ((vectors - known.projection.mean)[:, None] - known.books[0][:2]) ** 2
    assert (small.quantized[:, 0] == first.sum(axis=2).argmin(axis=1)).all()
