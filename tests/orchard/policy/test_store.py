"""A policy folder is read and written by one type, whole, and verified."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchard.errors import CatalogError, CheckpointError, DataError
from orchard.policy import value_head
from orchard.policy.item_tokenizer import compact_tokenizer
from orchard.policy.store import FILE, Policy, PolicyFacts
from orchard.policy.weights import digest
from orchard.semantic_ids.bundle import CODEBOOKS, Bundle, append
from orchard.semantic_ids.item_table import digest_of
from orchard.testing import TinySetup, tiny_setup
from tests.fixtures.bundles import bundle_of
from tests.fixtures.guides import random_guide


@pytest.fixture(scope="module")
def setup() -> TinySetup:
    setup = tiny_setup(num_items=20)
    value_head.attach(setup.model, seed=1)
    return setup


@pytest.fixture
def policy(setup: TinySetup) -> Policy:
    return Policy(
        version=replace(setup.version, step=7),
        model=setup.model,
        tokenizer=setup.tokenizer,
        text_tokenizer=compact_tokenizer(setup.catalog),
        facts=PolicyFacts(max_history=9, measurements={"valid_score": 0.25}),
    )


def test_what_is_saved_is_read_back(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "policy")
    read = Policy.open(tmp_path / "policy")
    assert read.version == policy.version
    assert read.version.digest == policy.version.digest == digest(read.weights)
    assert read.tokenizer.catalog.digest == policy.tokenizer.catalog.digest
    assert read.facts.max_history == 9
    assert read.facts.measurements == {"valid_score": 0.25}
    assert value_head.value_head_of(read.model) is not None
    assert all(np.array_equal(read.weights[name], value) for name, value in policy.weights.items())


def test_a_guide_travels_with_its_policy(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "policy")
    assert Policy.open(tmp_path / "policy").guide is None
    guide = random_guide(policy.tokenizer.catalog, seed=1)
    guide.save(tmp_path / "policy" / "guide")
    Policy.open(tmp_path / "policy").save(tmp_path / "copy")
    copied = Policy.open(tmp_path / "copy").guide
    assert copied is not None
    assert copied.digest == guide.digest
    random_guide(tiny_setup(seed=5).catalog, seed=1).save(tmp_path / "copy" / "guide")
    with pytest.raises(CatalogError, match="was fitted on catalog"):
        _ = Policy.open(tmp_path / "copy").guide


def test_a_folder_in_use_is_replaced_as_a_whole(policy: Policy, tmp_path: Path) -> None:
    out = tmp_path / "policy"
    policy.save(out)
    (out / "left").write_text("over")

    def fail(partial: Path) -> None:
        assert (partial / FILE).is_file()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        policy.save(out, fail)
    assert (out / "left").is_file()
    policy.save(out, lambda partial: (partial / "note").touch())
    assert (out / "note").is_file()
    assert not (out / "left").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_weights_that_are_not_the_named_ones_are_refused(policy: Policy, tmp_path: Path) -> None:
    other = replace(policy, version=replace(policy.version, digest="0" * 64))
    other.save(tmp_path / "policy")
    with pytest.raises(CheckpointError, match="their folder names 00000000"):
        Policy.open(tmp_path / "policy")


def test_an_open_policy_owns_its_weights(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "policy")
    read = Policy.open(tmp_path / "policy")
    for file in (tmp_path / "policy").glob("*.safetensors"):
        with file.open("r+b") as stream:  # in place, as a copy over the folder writes
            stream.seek(-64, os.SEEK_END)
            stream.write(bytes(64))
    assert digest(read.weights) == policy.version.digest
    with pytest.raises(CheckpointError, match="their folder names"):
        Policy.open(tmp_path / "policy")


def test_weights_are_readable_like_the_files_beside_them(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "policy")
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "policy").glob("*.*")}
    assert {"model.safetensors", "value_head.safetensors", FILE} <= modes.keys()
    assert len(set(modes.values())) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", FILE])
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    name: str, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.save(tmp_path / "policy")
    real = os.open

    def guarded(path: Path, *more: int) -> int:  # root may read everything
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *more)

    monkeypatch.setattr(os, "open", guarded)
    with pytest.raises(DataError, match=rf"{name} may not be read: Permission denied"):
        Policy.open(tmp_path / "policy")


def test_a_generation_config_that_cannot_be_saved_is_replaced(
    policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy.save(tmp_path / "policy")
    file = tmp_path / "policy" / "generation_config.json"
    file.write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 2}')
    read = Policy.open(tmp_path / "policy")
    assert "contradicts itself" in caplog.text
    read.save(tmp_path / "again")
    assert Policy.open(tmp_path / "again").version == policy.version


def test_a_policy_of_another_catalog_is_refused(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "policy")
    with pytest.raises(CheckpointError, match="was trained on catalog"):
        Policy.open(tmp_path / "policy", tiny_setup(num_items=21).tokenizer)


def test_a_folder_of_others_has_no_facts_and_a_damaged_one_says_so(
    policy: Policy, tmp_path: Path
) -> None:
    policy.save(tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / FILE).read_text())["version"]["step"] == 7
    (tmp_path / "policy" / FILE).unlink()
    read = Policy.open(tmp_path / "policy")
    assert (read.facts, read.version.step) == (PolicyFacts(), 0)
    (tmp_path / "policy" / FILE).write_text("{")
    with pytest.raises(CheckpointError, match="policy.json is damaged"):
        Policy.open(tmp_path / "policy")
    with pytest.raises(DataError):
        Policy.open(tmp_path / "nothing")


def with_bundle(policy: Policy, folder: Path) -> tuple[Policy, Bundle]:
    """Give a policy a bundle of its catalog's items, as if those had been made by it."""
    bundle = bundle_of(policy.tokenizer.catalog, folder)
    return replace(policy, new_bundle=bundle), bundle


def test_a_bundle_travels_with_its_policy(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "before")
    assert Policy.open(tmp_path / "before").bundle is None
    assert "bundle" not in json.loads((tmp_path / "before" / FILE).read_text())
    carrying, bundle = with_bundle(policy, tmp_path / "sids")
    carrying.save(tmp_path / "policy")
    shutil.rmtree(tmp_path / "sids")
    Policy.open(tmp_path / "policy").save(tmp_path / "copy")
    copied = Policy.open(tmp_path / "copy").bundle
    assert copied is not None
    assert (copied.digest, copied.table.digest) == (bundle.digest, bundle.table.digest)
    copied_files = {path.name for path in (tmp_path / "copy" / "sids").iterdir()}
    assert copied_files == {"bundle-1.json", *bundle.files}
    # A version that was appended to is copied alone.
    item = copied.table.take(np.array([0]))
    later = append(copied, replace(item, item_id=np.array([900])), {})
    replace(policy, new_bundle=later).save(tmp_path / "later")
    found = Policy.open(tmp_path / "later").bundle
    assert found is not None
    assert (found.version, found.digest) == (2, later.digest)


def test_a_damaged_or_swapped_bundle_is_refused(policy: Policy, tmp_path: Path) -> None:
    carrying, _ = with_bundle(policy, tmp_path / "sids")
    carrying.save(tmp_path / "policy")
    inside = tmp_path / "policy" / "sids"
    content = (inside / CODEBOOKS).read_bytes()
    (inside / CODEBOOKS).write_bytes(content[:-1] + b"x")
    with pytest.raises(DataError, match="is damaged or was changed"):
        _ = Policy.open(tmp_path / "policy").bundle
    (inside / CODEBOOKS).unlink()
    with pytest.raises(DataError, match="is missing"):
        _ = Policy.open(tmp_path / "policy").bundle
    shutil.rmtree(inside)
    with pytest.raises(DataError, match="holds no tokenizer bundle"):
        _ = Policy.open(tmp_path / "policy").bundle
    other = bundle_of(policy.tokenizer.catalog, inside, dimensions=3)
    named = json.loads((tmp_path / "policy" / FILE).read_text())["bundle"]
    with pytest.raises(CheckpointError, match=f"{other.digest[:12]}.*{named[:12]}"):
        _ = Policy.open(tmp_path / "policy").bundle


def test_a_bundle_of_another_catalog_is_refused_with_both_digests(
    policy: Policy, tmp_path: Path
) -> None:
    policy.save(tmp_path / "policy")
    other = bundle_of(tiny_setup(seed=5).catalog, tmp_path / "policy" / "sids")
    catalog = policy.tokenizer.catalog
    own = digest_of(catalog.item_id, catalog.plain_codes)
    with pytest.raises(CatalogError, match="save or export the policy again") as caught:
        _ = Policy.open(tmp_path / "policy").bundle
    assert other.table.digest[:12] in str(caught.value)
    assert own[:12] in str(caught.value)
