"""Sentences where vLLM cannot run, before anything has started."""

import ctypes
from importlib import metadata

import pytest

from orchard.errors import EngineError
from rollout.engine import availability


def without_library(name: str) -> ctypes.CDLL:
    raise OSError(f"{name}: cannot open shared object file")


def test_a_missing_library_of_the_system_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0")
    monkeypatch.setattr(ctypes, "CDLL", without_library)
    with pytest.raises(EngineError, match="apt-get install libnuma1"):
        availability.check_vllm()


def test_the_build_for_gpus_needs_no_such_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", unknown)
    monkeypatch.setattr(ctypes, "CDLL", without_library)
    availability.check_vllm()


def test_without_vllm_the_remedy_is_its_requirements_or_the_other_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"requirements/cpu\.txt .* \"torch\""):
        availability.check_vllm()
