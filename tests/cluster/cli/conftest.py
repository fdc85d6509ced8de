"""Fixtures: a tiny run, and the refusal of a failing command."""

from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from cluster.cli import app as cli
from orchard.errors import OrchardError
from tests.fixtures.refusals import Refusal
from tests.fixtures.runs import TinyRun


@pytest.fixture
def world(tiny_run: TinyRun) -> Path:
    return tiny_run()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., Refusal]:
    """Return a function that runs a failing command and returns its refusal."""

    def run(*arguments: object) -> Refusal:
        capsys.readouterr()
        before = ray.is_initialized()  # by tests that share this process
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert "Traceback" not in said
        assert ray.is_initialized() == before
        error = end.value.__context__
        assert isinstance(error, OrchardError)
        return Refusal(said, error.code)

    return run
