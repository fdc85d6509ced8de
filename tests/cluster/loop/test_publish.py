"""Publishing: links that are switched at once, and an endpoint that is waited for."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.loop.publish import Policies, wait_until_served
from orchard.errors import CheckpointError


def test_links_lead_to_the_policies(tmp_path: Path) -> None:
    policies = Policies(folder=tmp_path / "loop")
    for name in ("00000", "00001"):
        source = tmp_path / name
        source.mkdir()
        (source / "policy.json").write_text(
            json.dumps({"version": {"step": 3, "digest": name * 4}})
        )
        policies.keep(name, source)
    (tmp_path / "00000" / "policy.json").write_text("another")
    policies.keep("00000", tmp_path / "00000")  # what is kept stays
    assert policies.version("00000") == "3-00000000"
    policies.switch("00000", "00000")
    policies.switch("00000", "00001")
    assert policies.link("main").resolve() == policies.path("00000")
    assert policies.link("canary").resolve() == policies.path("00001")
    assert sorted(p.name for p in (tmp_path / "loop" / "serving").iterdir()) == ["canary", "main"]


@pytest.mark.slow
def test_an_endpoint_is_waited_for_and_its_reason_is_told() -> None:
    answers = [
        [{"name": "main", "policy": "1-a", "refused": ""}],
        [{"name": "main", "policy": "2-b", "refused": ""}],
    ]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            variants = answers[0] if len(answers) == 1 else answers.pop(0)
            data = json.dumps({"variants": variants}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        wait_until_served(url, {"main": "2-b"}, sleep=lambda _: None)
        assert len(answers) == 1
        answers[0] = [{"name": "main", "policy": "2-b", "refused": "the digest is wrong"}]
        with pytest.raises(CheckpointError, match="the digest is wrong"):
            wait_until_served(url, {"main": "3-c"}, timeout_s=0.0)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    with pytest.raises(CheckpointError, match="gives no answer"):
        wait_until_served(url, {"main": "2-b"}, timeout_s=0.0)
