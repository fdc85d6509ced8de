"""The README's lines of Python, as printed, on a tiny run."""

import re
from pathlib import Path
from typing import Any

import pytest

from orchard.testing import tiny_setup
from orchard.tracking.metrics_log import MetricsLogger
from serve.testing import export_policy

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_lines_of_python_work_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    run = tmp_path / "runs" / "quickstart"
    export_policy(tiny_setup(num_items=40), run / "policy", step=1)
    with MetricsLogger(run) as metrics_logger:
        metrics_logger.log("train", 1, {"rewards/mean": 0.5})
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(line[0]) for line in printed] == list(range(1, 11))
    assert not {3, 17, 5} & {int(line[1]) for line in printed}
    assert len(names["trees"]) == 1
