"""The explorer page in a real browser, if one is installed."""

import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import uvicorn

from orchard.settings import ServeConfig
from orchard.testing import TinySetup
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import InMemoryMetrics
from serve.testing import export_policy

DOCS = Path(__file__).parents[3] / "serve" / "http" / "docs.html"
PAGE = Path(__file__).parents[3] / "serve" / "http" / "explorer.html"


@pytest.mark.parametrize("page", [PAGE, DOCS])
def test_the_page_needs_nothing_from_elsewhere(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert "innerHTML" not in text  # titles are the users' text


def test_item_ids_beyond_the_numbers_of_javascript_survive() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js is installed")
    text = PAGE.read_text()
    code = text[text.index("const ids =") : text.index("const make =")]
    asked = 'write({history: ids("9007199254740993 -3 9223372036854775807"), k: 5, exclude: []})'
    answer = (
        r'{"item_id":9007199254740993,"score":-0.12345678901234567,"title":"1 \"1234567890123456"}'
    )
    program = f"{code}; console.log({asked}); console.log(JSON.stringify(parse({answer!r})));"
    done = subprocess.run([node, "-e", program], capture_output=True, text=True, check=True)
    sent, read = done.stdout.splitlines()
    assert sent == '{"history":[9007199254740993,-3,9223372036854775807],"k":5,"exclude":[]}'
    assert json.loads(read)["item_id"] == "9007199254740993"
    assert json.loads(read)["score"] == -0.12345678901234567
    assert json.loads(read)["title"] == '1 "1234567890123456'


@pytest.mark.slow
def test_a_browser_shows_recommendations_and_the_tree(
    shop_world: TinySetup, tmp_path: Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium is installed")
    threads = torch.get_num_threads()
    folder = export_policy(shop_world, tmp_path / "policy", step=3)
    app = create_app(open_service(folder, ServeConfig(), InMemoryMetrics()))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        completed = subprocess.run(
            [browser, "--headless=new", "--no-sandbox", "--disable-gpu",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
             "--dump-dom", f"http://127.0.0.1:{port}/"],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    finally:
        server.should_exit = True
        thread.join()
        torch.set_num_threads(threads)
    assert "policy 3-" in completed.stdout
    assert completed.stdout.count("<tr>") == 11
    assert 'class="kept"' in completed.stdout
    assert 'class="pruned"' in completed.stdout
    assert "problem" not in re.sub(r"(?s)<(style|script)>.*?</\1>", "", completed.stdout)
