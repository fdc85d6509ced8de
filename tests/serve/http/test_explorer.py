"""The explorer page in a real browser, if one is installed."""

import html
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi.responses import HTMLResponse

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


def test_the_explorer_has_a_live_region_names_its_parts_and_folds_on_a_phone() -> None:
    text = PAGE.read_text()
    assert re.search(r'<p id="said"[^>]* role="status">', text)
    assert text.count('at("said").textContent = ') == 2  # results, and what went wrong
    assert 'svg.setAttribute("role", "img")' in text
    assert 'link.setAttribute("aria-label"' in text
    narrow = text[text.index("@media (max-width: 800px)") : text.index("</style>")]
    assert "body { display: block; }" in narrow
    assert "#sides { grid-auto-flow: row; }" in narrow
    assert 'at("sides").replaceChildren(...boxes)' in text[text.index("function show") :]


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


NARROW = """<!doctype html><iframe id="page" src="/" width="390" height="800"></iframe>
<pre id="said">nothing</pre><script>
const page = document.getElementById("page");
const wait = () => new Promise(done => setTimeout(done, 100));
page.onload = async () => {
  const inner = page.contentDocument, shown = selector => inner.querySelector(selector);
  while (!shown("tr button")) await wait();
  const facts = {width: inner.documentElement.scrollWidth, view: page.contentWindow.innerWidth,
    results: shown("section").getBoundingClientRect().width,
    said: shown("[role=status]").textContent,
    tree: shown("svg[role=img]").getAttribute("aria-label"),
    length: shown("#history").value.split(" ").length};
  const second = inner.querySelectorAll("tr button")[1];
  second.focus();
  second.click();
  while (inner.contains(second)) await wait();
  facts.focus = {...inner.activeElement.dataset};
  facts.then = shown("[role=status]").textContent;
  document.getElementById("said").textContent = JSON.stringify(facts);
};
</script>"""
"""The page in a frame of 390 pixels, where a person follows the second item by keyboard."""


@pytest.fixture
def browse(shop_world: TinySetup, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Returns the document of an address of a served explorer, as a browser has it in the end."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium is installed")
    folder = export_policy(shop_world, tmp_path / "policy", step=3)
    app = create_app(open_service(folder, ServeConfig(), InMemoryMetrics()))
    app.add_api_route("/narrow", lambda: HTMLResponse(NARROW))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()

    def document(path: str) -> str:
        port = server.servers[0].sockets[0].getsockname()[1]
        return subprocess.run(
            [browser, "--headless=new", "--no-sandbox", "--disable-gpu",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
             "--dump-dom", f"http://127.0.0.1:{port}{path}"],
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout  # fmt: skip

    try:
        while not server.started:
            time.sleep(0.05)
            assert thread.is_alive()
        yield document
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.slow
def test_a_browser_shows_recommendations_and_the_tree(browse: Callable[[str], str]) -> None:
    text = browse("/")
    assert "policy 3-" in text
    assert text.count("<tr>") == 11
    assert 'class="kept"' in text
    assert 'class="pruned"' in text
    assert "problem" not in re.sub(r"(?s)<(style|script)>.*?</\1>", "", text)


@pytest.mark.slow
def test_the_page_fits_a_phone_keeps_the_focus_and_says_what_changed(
    browse: Callable[[str], str],
) -> None:
    found = re.search(r'<pre id="said">(.*?)</pre>', browse("/narrow"))
    assert found is not None
    facts = json.loads(html.unescape(found[1]))
    assert facts["width"] <= facts["view"] <= 390
    assert facts["results"] > 300
    length = facts["length"]
    assert facts["said"] == f"main: 10 of 10 items for a history of {length}"
    assert facts["then"] == f"main: 10 of 10 items for a history of {length + 1}"
    assert facts["focus"] == {"side": "0", "row": "2"}
    assert re.fullmatch(r"search tree of \d+ prefixes, \d+ of them kept", facts["tree"])
