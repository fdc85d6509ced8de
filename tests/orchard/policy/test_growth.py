"""A policy goes on with another catalog of its bundle, and with no other."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchard.catalog.catalog import Catalog, from_codes
from orchard.errors import CheckpointError
from orchard.policy import weights
from orchard.policy.growth import growth_of
from orchard.policy.token_embeddings import start_unseen
from orchard.semantic_ids import bundle as bundles
from orchard.semantic_ids.bundle import Bundle
from orchard.testing import tiny_catalog, tiny_policy
from tests.fixtures.bundles import bundle_of, save_carrying_policy

SIZES = (5, 4, 40)


@pytest.fixture
def first(tmp_path: Path) -> Bundle:
    codes = tiny_catalog(level_size=(5, 4, 20)).codes
    return bundle_of(from_codes(codes, level_size=SIZES), tmp_path / "sids")


def catalog_of(bundle: Bundle) -> Catalog:
    table = bundle.table
    return from_codes(table.sid, item_id=table.item_id, level_size=SIZES)


def grown(bundle: Bundle, *codes: tuple[int, int, int]) -> Bundle:
    """Append items with given codes."""
    rows = np.zeros(len(codes), dtype=np.int64)
    added = replace(
        bundle.table.take(rows), item_id=900 + np.arange(len(codes)), sid=np.array(codes)
    )
    return bundles.append(bundle, added, {})


@pytest.mark.parametrize("levels", [3, 2])
def test_unseen_codes_start_from_their_neighbors_and_others_stay(
    first: Bundle, tmp_path: Path, levels: int
) -> None:
    policy = save_carrying_policy(first, tmp_path / "policy")
    later = grown(first, (0, 0, 33), (4, 3, 39))
    catalog = catalog_of(later)
    growth = growth_of(tmp_path / "policy", catalog, later)
    assert growth is not None
    growth = replace(growth, books=growth.books[:levels])
    seen = np.isin(np.arange(40), first.table.sid[:, 2])
    assert (growth.num_new, growth.num_unseen) == (2, int((~seen).sum()))
    assert "goes on with 2 new ones" in str(growth)
    before = dict(weights.snapshot(policy.model))
    model, tokenizer = policy.model, policy.tokenizer.with_catalog(catalog)
    start_unseen(model, tokenizer, growth, seed=1)
    tokens = tokenizer.tokens_at(2).numpy()
    for name, value in weights.snapshot(model).items():
        if value.shape[:1] != (tokenizer.size,):
            assert np.array_equal(value, before[name])
            continue
        changed = np.flatnonzero((value != before[name]).any(axis=1))
        assert set(changed.tolist()) == set(tokens[~seen].tolist())
        known = np.flatnonzero(seen)
        for code in (33, 39):
            near = known
            if levels == 3:
                far = np.linalg.norm(first.books[2][known] - first.books[2][code], axis=1)
                near = known[np.argsort(far)[:5]]
            expected = before[name][tokens[near]].mean(axis=0)
            spread = before[name][tokens[known]].std(axis=0)
            assert (np.abs(value[tokens[code]] - expected) < 6e-2 * spread).all()
        rows = value[tokens[~seen]]
        assert len(np.unique(rows, axis=0)) == len(rows)  # no two are alike


def test_a_policy_of_the_same_catalog_does_not_grow(first: Bundle, tmp_path: Path) -> None:
    policy = save_carrying_policy(first, tmp_path / "policy")
    assert growth_of(tmp_path / "policy", catalog_of(first), first) is None
    replace(policy, new_bundle=None, folder=None).save(tmp_path / "plain")
    assert growth_of(tmp_path / "plain", catalog_of(first), None) is None


def test_a_catalog_of_another_bundle_is_refused(first: Bundle, tmp_path: Path) -> None:
    policy = save_carrying_policy(first, tmp_path / "policy")
    later = grown(first, (0, 0, 33))
    catalog = catalog_of(later)

    def refused(message: str, bundle: Bundle | None, folder: Path = tmp_path / "policy") -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            growth_of(folder, catalog, bundle)
        assert catalog.digest[:12] in str(caught.value)
        assert caught.value.code == "catalog.mismatch"

    refused("the data has no tokenizer bundle", None)
    replace(policy, new_bundle=None, folder=None).save(tmp_path / "plain")
    refused("it carries no tokenizer bundle", later, tmp_path / "plain")
    other = bundle_of(catalog, tmp_path / "other", dimensions=3)
    refused("their tokenizer bundles have codebooks", other)
    same_books = bundle_of(catalog, tmp_path / "again")
    assert growth_of(tmp_path / "policy", catalog, same_books) is not None
    codes = catalog.codes.copy()
    codes[4, 2] = (codes[4, 2] + 1) % 20
    moved = from_codes(codes, item_id=catalog.item_id, level_size=SIZES)
    refused("such as that of item 4", bundle_of(moved, tmp_path / "moved"))


def test_levels_of_another_size_are_refused(first: Bundle, tmp_path: Path) -> None:
    save_carrying_policy(first, tmp_path / "policy")
    later = grown(first, (0, 0, 33))
    table = later.table
    wide = from_codes(table.sid, item_id=table.item_id, level_size=(5, 4, 50))
    with pytest.raises(CheckpointError, match=r"levels have \(5, 4, 40\) and \(5, 4, 50\) codes"):
        growth_of(tmp_path / "policy", wide, later)


@pytest.mark.slow
def test_rows_of_a_tied_head_are_started_once(first: Bundle, tmp_path: Path) -> None:
    policy = save_carrying_policy(first, tmp_path / "policy")
    later = grown(first, (0, 0, 33))
    growth = growth_of(tmp_path / "policy", catalog_of(later), later)
    assert growth is not None
    model, tokenizer = tiny_policy(policy.tokenizer.catalog, seed=3)
    model.set_output_embeddings(model.get_input_embeddings())
    start_unseen(model, tokenizer, growth, seed=1)
    once = model.get_input_embeddings().weight.detach().clone()  # type: ignore[union-attr]
    again, _ = tiny_policy(policy.tokenizer.catalog, seed=3)
    start_unseen(again, tokenizer, growth, seed=1)
    assert torch.equal(once, again.get_input_embeddings().weight)  # type: ignore[arg-type, union-attr]
