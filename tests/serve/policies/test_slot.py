"""Served policies own their weights; files that change under them are noticed, never served."""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from orchard.errors import OrchardError
from orchard.policy import weights
from orchard.settings import ServeConfig
from orchard.testing import TinySetup
from serve.factory import open_service
from serve.metrics import InMemoryMetrics
from serve.policies.read import folder_stamp
from serve.schema import RecommendRequest
from serve.service import Service
from serve.testing import export_policy

SETTINGS = ServeConfig(poll_interval_s=3600.0)  # the tests poll themselves


@pytest.fixture
def folder(shop_world: TinySetup, tmp_path: Path) -> Path:
    return export_policy(shop_world, tmp_path / "policy", step=3)


def further(world: TinySetup, folder: Path, step: int) -> Path:
    """Export the policy after some more training."""
    values = weights.snapshot(world.model)
    name = next(iter(values))
    try:
        weights.restore(world.model, values | {name: values[name] + 0.05 * step})
        return export_policy(world, folder, step=step)
    finally:
        weights.restore(world.model, values)


def served(folder: Path, work: Callable[[Service], Awaitable[None]]) -> None:
    """Run `work` against a started service."""

    async def run() -> None:
        service = open_service(folder, SETTINGS, InMemoryMetrics())
        await service.start()
        await work(service)
        await service.close()

    asyncio.run(run())


async def scores(service: Service) -> tuple[str, list[float | None]]:
    """Return the version that answers, and the scores of every item."""
    answer = await service.recommend(RecommendRequest(history=[3, 17], k=40), "id")
    assert answer.source == "policy"
    return answer.policy, [item.score for item in answer.items]


def gauges(service: Service) -> dict[tuple[str, ...], float]:
    assert isinstance(service.metrics, InMemoryMetrics)
    return service.metrics.gauges


def garbage(path: Path) -> None:
    """Overwrite the middle of a file in place."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size // 4))


def half(path: Path) -> None:
    """Cut a file in place, as a copy that has not come further."""
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.slow
@pytest.mark.parametrize("change", [garbage, half])
def test_what_happens_to_the_file_does_not_reach_the_answers(
    folder: Path, change: Callable[[Path], None]
) -> None:
    async def work(service: Service) -> None:
        before = await scores(service)
        change(folder / "model.safetensors")
        assert await scores(service) == before
        await service.poll()
        assert await scores(service) == before
        assert service.slots["main"].refused != ""
        service._set_gauges()
        assert gauges(service)["orchard_serve_policy_refused", "main"] == 1

    served(folder, work)


@pytest.mark.slow
def test_other_weights_in_place_are_refused_until_they_are_whole(
    folder: Path, shop_world: TinySetup, tmp_path: Path
) -> None:
    other = further(shop_world, tmp_path / "other", 4)

    async def work(service: Service) -> None:
        before = await scores(service)
        data = (other / "model.safetensors").read_bytes()
        with (folder / "model.safetensors").open("r+b") as file:  # as `rsync --inplace` does
            file.write(data)
        await service.poll()
        assert await scores(service) == before
        assert "their folder names" in service.slots["main"].refused
        shutil.copy(other / "policy.json", folder / "policy.json")
        await service.poll()
        version, _ = await scores(service)
        assert version.startswith("4-")
        assert service.slots["main"].refused == ""

    served(folder, work)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "policy.json",
        "tokenizer.json",
        "catalogue/items.parquet",
    ],
)
@pytest.mark.parametrize("change", [garbage, half])
def test_a_replica_starts_with_the_newest_whole_copy(
    folder: Path, shop_world: TinySetup, name: str, change: Callable[[Path], None]
) -> None:
    async def first(service: Service) -> None:
        further(shop_world, folder, 4)
        await service.poll()
        assert (await scores(service))[0].startswith("4-")

    async def then(service: Service) -> None:
        version, _ = await scores(service)
        assert version.startswith("4-")
        assert service.slots["main"].refused != ""
        assert gauges(service)["orchard_serve_policy_refused", "main"] == 1
        further(shop_world, folder, 5)
        await service.poll()
        assert (await scores(service))[0].startswith("5-")
        assert service.slots["main"].refused == ""

    served(folder, first)
    change(folder / name)
    served(folder, then)


def test_without_a_whole_copy_a_damaged_folder_is_refused_in_a_sentence(folder: Path) -> None:
    half(folder / "model.safetensors")
    with pytest.raises(OrchardError, match=r"model\.safetensors are damaged or cut short"):
        open_service(folder, SETTINGS, InMemoryMetrics())


@pytest.mark.slow
def test_a_link_that_is_switched_to_another_policy_is_followed(
    shop_world: TinySetup, tmp_path: Path
) -> None:
    one, other = (further(shop_world, tmp_path / f"v{step}", step) for step in (1, 2))
    link = tmp_path / "current"
    link.symlink_to(one, target_is_directory=True)

    async def work(service: Service) -> None:
        assert (await scores(service))[0].startswith("1-")
        new = tmp_path / "new"
        new.symlink_to(other, target_is_directory=True)
        new.rename(link)
        await service.poll()
        assert (await scores(service))[0].startswith("2-")
        assert [version[:2] for version in service.slots["main"].kept] == ["1-", "2-"]

    served(link, work)


def test_the_stamp_of_a_folder_changes_with_any_of_its_files(folder: Path) -> None:
    stamps = [folder_stamp(folder)]
    for change in (
        lambda: garbage(folder / "model.safetensors"),
        lambda: (folder / "policy.json").write_text("{}"),
        lambda: (folder / "tokenizer.json").unlink(),
    ):
        change()
        stamps.append(folder_stamp(folder))
    assert len(set(stamps)) == 4
    assert folder_stamp(folder) == stamps[-1]
    assert folder_stamp(folder / "missing") == ""
