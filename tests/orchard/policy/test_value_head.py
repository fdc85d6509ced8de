"""The value head as a function of hidden states, and as a part of a policy."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from orchard.errors import CheckpointError
from orchard.policy import value_head
from orchard.policy.model import load
from orchard.policy.value_head import ValueHead
from orchard.policy.weights import digest, restore, snapshot
from orchard.testing import TinySetup, tiny_setup


def trained_head(width: int = 8) -> ValueHead:
    head = ValueHead(width)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0.0, 0.5)
    return head


def valued_world() -> TinySetup:
    world = tiny_setup()
    value_head.attach(world.model, seed=3)
    return world


def test_a_value_depends_on_its_own_path_alone_and_on_all_of_it() -> None:
    head, hidden = trained_head(), torch.randn(6, 8)
    path = torch.tensor([[0, 1, -1], [0, 1, 3], [0, 2, 4]])
    before = head(hidden, path)
    for place in range(6):
        moved = hidden.clone()
        moved[place, 0] += 1.0
        differs = (head(moved, path) - before).abs() > 1e-6
        assert differs.tolist() == [(place in row) for row in path.tolist()], place


def test_a_value_is_the_same_alone_as_among_longer_paths() -> None:
    head, hidden = trained_head(), torch.randn(5, 8)
    together = head(hidden, torch.tensor([[0, 1, -1, -1], [0, 1, 2, 4]]))
    assert torch.allclose(together[:1], head(hidden, torch.tensor([[0, 1]])), atol=1e-6)
    assert head(hidden, torch.zeros(0, 3, dtype=torch.long)).shape == (0,)


def test_a_fresh_head_has_nothing_to_say_and_equal_seeds_make_equal_heads() -> None:
    first, second = valued_world().model, valued_world().model
    assert digest(snapshot(first)) == digest(snapshot(second))
    head = value_head.value_head_of(first)
    assert head is not None
    assert not head(torch.randn(3, 32), torch.tensor([[0, 1, 2]])).any()


def test_a_head_travels_with_the_weights_of_its_policy() -> None:
    ours, theirs = valued_world().model, tiny_setup(seed=1).model
    sent = snapshot(ours)
    assert any(name.startswith("value_head.") for name in sent)
    value_head.adapt_weights(theirs, sent)
    restore(theirs, sent)
    assert digest(snapshot(theirs)) == digest(sent)
    plain = snapshot(tiny_setup().model)
    value_head.adapt_weights(theirs, plain)
    restore(theirs, plain)
    assert digest(snapshot(theirs)) == digest(plain)


def test_the_head_is_split_from_the_weights_of_its_policy() -> None:
    world = valued_world()
    weights, plain = snapshot(world.model), snapshot(tiny_setup().model)
    attached = value_head.value_head_of(world.model)
    assert attached is not None
    attached.scalar.bias.data.fill_(0.25)
    random = torch.get_rng_state()
    policy, head = value_head.split(snapshot(world.model), 32)
    assert torch.equal(torch.get_rng_state(), random)
    assert policy.keys() == plain.keys()
    assert head is not None
    assert digest(snapshot(head)) == digest(snapshot(attached)) != digest(weights)
    assert value_head.split(plain, 32)[1] is None
    with pytest.raises(CheckpointError, match="belong to another model"):
        value_head.split(weights, 16)
    del weights["value_head.gate.bias"]
    with pytest.raises(CheckpointError, match=r"gate\.bias among them"):
        value_head.split(weights, 32)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_an_index_keeps_the_head_from_those_who_would_load_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    world = valued_world()
    write = world.model.save_pretrained
    monkeypatch.setattr(world.model, "save_pretrained", partial(write, max_shard_size=shard))
    value_head.save(world.model, tmp_path)
    place = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == {*place.values(), value_head.FILE}
    assert (len(files) > 2) == (shard == "20KB")
    assert not any(name.startswith(value_head.NAME) for name in place)
    assert digest(snapshot(load(tmp_path))) == world.version.digest


def test_a_saved_policy_keeps_its_head_in_a_file_of_its_own(tmp_path: Path) -> None:
    world = valued_world()
    with torch.no_grad():
        for parameter in world.model.get_submodule(value_head.NAME).parameters():
            parameter.normal_()
    folder = world.save(tmp_path / "policy")
    assert digest(snapshot(load(folder))) == world.version.digest
    assert value_head.value_head_of(world.model) is not None
    (folder / value_head.FILE).unlink()
    plain = tiny_setup()
    assert digest(snapshot(load(folder))) == plain.version.digest


def test_a_damaged_or_foreign_head_is_refused(tmp_path: Path) -> None:
    folder = valued_world().save(tmp_path / "policy")
    (folder / value_head.FILE).write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="is not a value head of this policy"):
        load(folder)
