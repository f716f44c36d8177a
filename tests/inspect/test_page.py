"""The dump's HTML page: what it embeds, that no name is markup, and how it behaves in a browser."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from memrewrite.inspect.page import page
from memrewrite.record.listing import changed, difference

SITE = "blocks.0.down_proj"
HOSTILE = "</script><script>document.title = 'harmed'</script><b>& \u2028 <!--"
BEFORE = """\
primals_1: f32[8, 16] = input
primals_2: f32[4, 16] = input
tangents_1: f32[4, 8] = input
tanh: f32[4, 16] = tanh(primals_2)  # blocks.0.act: h = torch.tanh(x)
t: f32[16, 8] = t(primals_1)  # blocks.0.down_proj: y = self.down_proj(h)  # "<b>bold</b>"
mm: f32[4, 8] = mm(tanh, t)  # blocks.0.down_proj: y = self.down_proj(h)  # "<b>bold</b>"
exp: f32[4, 8] = exp(mm)  # blocks.0: </script><script>document.title = "harmed"</script>
cos: f32[4, 8] = cos(exp)  # blocks.0: return y.exp().cos()
t_1: f32[8, 4] = t(tangents_1)  # blocks.0.down_proj: y = self.down_proj(h)
mm_1: f32[8, 16] = mm(t_1, tanh)  # blocks.0.down_proj: y = self.down_proj(h)
t_2: f32[16, 8] = t(mm_1)  # blocks.0.down_proj: y = self.down_proj(h)
return [cos, t_2, None]
"""
AFTER = BEFORE.replace(
    "t_1: f32[8, 4]",
    "view: f32[4, 4, 4] = view(tanh, [4, 4, 4])  # blocks.0.act: h = torch.tanh(x)\n"
    "sum_1: f32[4, 4] = sum(view, [2])  # blocks.0.act: h = torch.tanh(x)\n"
    "t_1: f32[8, 4]",
).replace(
    "mm_1: f32[8, 16] = mm(t_1, tanh)  #",
    "mm_9: f32[8, 4] = mm(t_1, sum_1)  # blocks.0.down_proj: y = self.down_proj(h)\n"
    "mm_1: f32[8, 16] = repeat(mm_9, [1, 4])  #",
)


def trace(high: int) -> dict[str, Any]:
    culprit = {"name": "tanh", "module": "blocks.0.act", "operation": "tanh"}
    return {
        "forward": [["tanh of blocks.0.act", 256], ["mm of blocks.0.down_proj", 384]],
        "backward": [["t of blocks.0", high - 9], ["mm of blocks.0", high], ["t", 0]],
        "peak_bytes": high,
        "peak_half": "backward",
        "peak_index": 1,
        "culprits": [{**culprit, "bytes": 256, "kind": "saved"}],
        "composition": [["blocks.*.act", high - 1], ["", 1]],
    }


def graph(folder: str = "graph0") -> tuple[dict[str, Any], dict[str, str]]:
    inserted, removed = changed(BEFORE, AFTER)
    compress = f"{folder}/1-compress"
    texts = {
        f"{folder}/0-joint.txt": BEFORE,
        f"{compress}.txt": AFTER,
        f"{compress}.diff": difference(BEFORE, AFTER, ("joint", "compress")),
        f"{folder}/forward.txt": "return []\n",
    }
    row = {"name": "compress", "exact": False, "seconds": 0.02, "inserted": 3, "removed": 0}
    kept = {"name": "tanh", "module": "blocks.0.act", "operation": "tanh", "dtype": "torch.float32"}
    stage = {"name": "compress", "file": f"{compress}.txt", "diff": f"{compress}.diff"}
    data = {
        "training": True,
        "note": "",
        "modules": [SITE],
        "passes": [{**row, "identity": "z = <x, v>"}],
        "kept": [{**kept, "shape": [4, "s0"], "bytes": 256, "compressed": True, "used_by": ["mm"]}],
        "stages": [
            {"name": "joint", "file": f"{folder}/0-joint.txt"},
            {**stage, "inserted": inserted, "removed": removed},
            {"name": "forward", "file": f"{folder}/forward.txt"},
        ],
        "memory": {"before": trace(900), "after": trace(640)},
    }
    return data, texts


def small() -> tuple[dict[str, Any], dict[str, str]]:
    data, texts = graph()
    site = {"shape": [8, 16], "decision": "compressed", "reason": "z saved in place of x"}
    sizes = {"bytes_before": 256, "bytes_after": 64}
    other = {"name": HOSTILE, "decision": "exact", "reason": HOSTILE}
    optimizer = {"name": SITE, "decision": "projected", "side": "left", "rank": 4, "energy": 0.9}
    totals = {"saved_bytes_before": 512, "saved_bytes_after": 320, "peak_bytes_before": 900}
    record = {
        "memrewrite": "0.1.0",
        "torch": "2.13.0",
        "model": "Stack",
        "report": {
            "sites": [{"name": SITE, **site, **sizes}, {**site, **other, **sizes}],
            "optimizer": [{**optimizer, "shape": [8, 16], **sizes}],
            "totals": {"graphs": 1, **totals, "peak_bytes_after": 640},
        },
        "graphs": [data],
        "updates": [{"kind": {"shape": "(8, 16)"}, "stages": data["stages"][:2]}],
    }
    return record, texts


class Reader(HTMLParser):
    """Fails on an element that is not closed; collects ids, links and scripts."""

    VOID = frozenset({"meta", "input", "br", "hr", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def embedded(text: str) -> dict[str, Any]:
    data, _program = Reader(text).scripts
    found: dict[str, Any] = json.loads(data)
    return found


def test_the_document_is_well_formed_and_needs_nothing_else() -> None:
    text = page(*small())
    read = Reader(text)
    assert text.startswith("<!doctype html>\n")
    assert len(read.ids) == len(set(read.ids))
    assert read.links and all(link.removeprefix("#") in read.ids for link in read.links)
    assert "://" not in text and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_what_is_embedded_comes_back() -> None:
    record, texts = small()
    data = embedded(page(record, texts))
    assert data["record"] == record
    unpacked = {k: zlib.decompress(base64.b64decode(v)).decode() for k, v in data["texts"].items()}
    assert unpacked == texts


def test_arbitrary_text_is_harmless() -> None:
    record, texts = small()
    record["model"] = HOSTILE + "\ud800"
    record["report"]["totals"]["energy"] = float("nan")
    texts[HOSTILE] = HOSTILE + "\ud800"
    text = page(record, texts)
    assert len(Reader(text).scripts) == 2
    assert text.count("</script>") == 2 and "<b>" not in text
    data = embedded(text)
    assert data["record"]["model"] == record["model"]
    assert data["record"]["report"]["totals"]["energy"] is None
    assert zlib.decompress(base64.b64decode(data["texts"][HOSTILE])).decode() == HOSTILE + "?"


def test_a_large_dump_stays_below_five_megabytes() -> None:
    record, texts = small()
    lines = (
        f"mm_{i}: f32[{i % 97}, 512] = mm(view_{i * 7 % 1501}, permute_{i * 13 % 1499})  "
        f"# model.layers.{i % 8}.mlp.down_proj: down_proj = self.down_proj(self.act_fn(x) * x)\n"
        for i in range(2500)
    )
    listing = "".join(lines)
    assert len(listing) > 300_000
    texts |= {f"graph0/{i}.txt": listing for i in range(14)}
    assert len(page(record, texts)) < 5_000_000


# ---- in a browser


CHROMIUMS = (
    "chromium",
    "chromium-browser",
    "chromium-headless-shell",
    "chrome-headless-shell",
    "google-chrome",
)
# The browser reads commands from descriptor 3 and answers on descriptor 4.
LAUNCH = "import os, sys; os.dup2({0}, 3); os.dup2({1}, 4); os.execv(sys.argv[1], sys.argv[1:])"


def chromium() -> str | None:
    found = filter(None, map(shutil.which, CHROMIUMS))
    return os.environ.get("MEMREWRITE_CHROMIUM") or next(found, None)


class Browser:
    """Headless Chromium, driven over its debugging pipe."""

    def __init__(self, binary: str, home: Path) -> None:
        to_read, self.to_write = os.pipe()
        self.answers, to_answer = os.pipe()
        flags = ["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"]
        command = [binary, *flags, "--disable-dev-shm-usage", f"--user-data-dir={home}"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH.format(to_read, to_answer), *command],
            pass_fds=(to_read, to_answer),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_answer)
        self.rest, self.count, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.send("Browser.close")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.to_write)
        os.close(self.answers)

    def send(self, method: str, **params: Any) -> int:
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self.session
        os.write(self.to_write, json.dumps(message).encode() + b"\0")
        return self.count

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = self.send(method, **params)
        while True:
            message = self.receive()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.answers], [], [], 60)
            assert ready, "the browser does not answer"
            piece = os.read(self.answers, 1 << 20)
            assert piece, "the browser has ended"
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        read: dict[str, Any] = json.loads(message)
        return read

    def open(self, address: str, width: int = 1280) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session, self.events = attached["sessionId"], []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        given = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **given)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        end = time.monotonic() + 20
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < end, f"still not so: {expression}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        found: str = self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")
        return found

    def click(self, selector: str) -> None:
        """With the mouse, where the middle of the element is."""
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            given = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", **given)

    def press(self, key: str) -> None:
        given = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        typed = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **given, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def errors(self) -> list[Any]:
        """What the page threw or logged as an error."""
        self.evaluate("new Promise(done => setTimeout(done, 50))")
        thrown = [e["params"] for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        logged = [
            e["params"]
            for e in self.events
            if e.get("method") in ("Runtime.consoleAPICalled", "Log.entryAdded")
        ]
        return thrown + logged


KEYS = {"Enter": 13, "Home": 36, "ArrowRight": 39, "ArrowDown": 40}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = chromium()
    if binary is None:
        pytest.skip(
            "these drive the page by mouse and key in Chromium, and there is none on PATH nor in "
            "MEMREWRITE_CHROMIUM; what the page says is tested above without one"
        )
    opened = Browser(binary, tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def written(folder: Path, record: dict[str, Any], texts: dict[str, str]) -> str:
    """The page's address, as a file."""
    path = folder / "index.html"
    path.write_text(page(record, texts), encoding="utf-8")
    return path.as_uri()


def shown(browser: Browser, folder: Path, record: dict[str, Any], texts: dict[str, str]) -> None:
    browser.open(written(folder, record, texts))


def lines(browser: Browser, side: str) -> list[str]:
    """`-mm`, `+mm_9`, ...: the marked lines of one side."""
    found: list[str] = browser.evaluate(
        f"[...document.querySelectorAll('#detail .half.{side}')]"
        ".filter(e => e.querySelector('.sign')?.textContent)"
        ".map(e => e.querySelector('.sign').textContent + "
        "e.querySelector('.text').textContent.split(':')[0])"
    )
    return found


def test_a_site_shows_its_lines_before_and_after(browser: Browser, tmp_path: Path) -> None:
    shown(browser, tmp_path, *small())
    assert "Stack" in browser.text("#model") and "(0.63 " in browser.text(".sentence")
    browser.wait("document.querySelector('#detail .half')")
    assert lines(browser, "left") == ["~mm_1"]
    assert lines(browser, "right") == ["+view", "+sum_1", "+mm_9", "~mm_1"]
    told = browser.text("#detail")
    assert '# "<b>bold</b>"' in told and "primals_1: f32[8, 16] = input" in told
    assert "cos: f32" not in told  # two steps away
    browser.click("#sites tbody tr:nth-child(2) button")
    browser.wait("document.querySelector('#detail .empty')")
    assert "<!--" in browser.text("#facts")
    browser.press("ArrowDown")
    browser.evaluate("document.querySelector('#sites tbody button').focus()")
    browser.press("Enter")
    browser.wait("document.querySelector('#detail .half')")
    assert browser.evaluate("document.title") == "Stack · memrewrite"
    assert not browser.errors()


def test_a_node_that_moved_is_neither_removed_nor_inserted(
    browser: Browser, tmp_path: Path
) -> None:
    record, texts = small()
    rows = BEFORE.splitlines(keepends=True)
    texts["graph0/1-compress.txt"] = "".join([*rows[:3], rows[8], *rows[3:8], *rows[9:]])
    shown(browser, tmp_path, record, texts)
    browser.wait("document.querySelector('#detail .half')")
    assert lines(browser, "left") == lines(browser, "right") == ["\u2195t_1"]
    assert not browser.errors()


def test_an_address_names_its_site(browser: Browser, tmp_path: Path) -> None:
    record, texts = small()
    site = {**record["report"]["sites"][0], "name": "blocks.0.act", "decision": "exact"}
    record["report"]["sites"].append(site)
    browser.open(written(tmp_path, record, texts) + "#site=blocks.0.act")
    browser.wait("document.querySelector('#facts code')?.textContent === 'blocks.0.act'")
    browser.click("#sites tbody tr button")
    assert browser.evaluate("location.hash") == f"#site={SITE}"
    browser.evaluate("history.back()")
    browser.wait("document.querySelector('#facts code').textContent === 'blocks.0.act'")
    assert not browser.errors()


def test_tables_sort_and_filter(browser: Browser, tmp_path: Path) -> None:
    record, texts = small()
    sites = record["report"]["sites"]
    sites.append({**sites[0], "name": "head", "bytes_before": 5000})
    shown(browser, tmp_path, record, texts)
    first = "document.querySelector('#sites tbody tr').innerText"
    assert SITE in browser.evaluate(first)
    browser.click("#sites th:nth-child(4) button")
    assert browser.evaluate(first).startswith("head") and "5.0" in browser.evaluate(first)
    assert browser.evaluate("document.querySelector('#sites th:nth-child(4)').ariaSort") == (
        "descending"
    )
    browser.click("#sites input")
    browser.call("Input.insertText", text="down_proj z")
    assert browser.text("#sites output") == "1 of 3 sites"
    assert SITE in browser.evaluate(first)
    assert not browser.errors()


def test_the_theme_turns(browser: Browser, tmp_path: Path) -> None:
    shown(browser, tmp_path, *small())
    ground = "getComputedStyle(document.body).backgroundColor"
    before, word = browser.evaluate(ground), browser.text("#theme")
    browser.click("#theme")
    assert browser.evaluate(ground) != before and browser.text("#theme") != word
    browser.click("#theme")
    assert browser.evaluate(ground) == before and browser.text("#theme") == word
    assert not browser.errors()


def test_the_chart_tells_each_operation(browser: Browser, tmp_path: Path) -> None:
    shown(browser, tmp_path, *small())
    told = "document.querySelector('.plot').ariaValueText"
    assert "backward 2 of 3" in browser.evaluate(told)  # the peak
    assert "mm of blocks.0" in browser.text(".readout")
    assert browser.evaluate("document.querySelectorAll('.plot path.line').length") == 2
    browser.evaluate("document.querySelector('.plot').focus()")
    browser.press("Home")
    browser.press("ArrowRight")
    assert "forward 2 of 2" in browser.evaluate(told)
    assert "mm of blocks.0.down_proj" in browser.text(".readout")
    assert "blocks.*.act" in browser.text(".owners") and "tanh" in browser.text(".halves")
    assert not browser.errors()


def test_a_pass_opens_its_diff(browser: Browser, tmp_path: Path) -> None:
    shown(browser, tmp_path, *small())
    steps = browser.text("#passes .steps")
    assert "≈ approximate" in steps and "z = <x, v>" in steps and "20 ms" in steps
    browser.click("#passes li:nth-child(2) summary")
    browser.wait("document.querySelector('#passes .code .add')")
    assert "+mm_9: f32[8, 4] = mm(t_1, sum_1)" in browser.text("#passes .code")
    assert not browser.errors()


def test_several_graphs_and_one_that_failed(browser: Browser, tmp_path: Path) -> None:
    record, texts = small()
    failed, more = graph("graph1")
    failed |= {"note": f"fold: {HOSTILE}", "passes": [], "memory": None}
    inference = {"training": False, "note": "only inference graphs", "memory": None}
    record["graphs"] += [failed, inference]
    shown(browser, tmp_path, record, texts | more)
    assert "the rewrite failed and was undone" in browser.text(".loud")
    assert "<!--" in browser.text(".loud")
    browser.click("#choice button:nth-of-type(3)")
    assert "inference graph" in browser.text("#memory")
    assert "No pass ran" in browser.text("#passes")
    browser.click("#choice button:nth-of-type(2)")
    assert "rewrite failed" in browser.text("#passes")
    assert not browser.errors()


@pytest.mark.parametrize("rest", [{}, {"report": {}, "graphs": [{}]}, {"graphs": [], "model": "M"}])
def test_nothing_to_show(browser: Browser, tmp_path: Path, rest: dict[str, Any]) -> None:
    shown(browser, tmp_path, rest, {})
    assert "no linear" in browser.text("#sites")
    assert not browser.errors()


def test_nothing_is_wider_than_a_narrow_window(browser: Browser, tmp_path: Path) -> None:
    address = written(tmp_path, *small())
    for width in (700, 1280):
        browser.open(address, width)
        browser.wait("document.querySelector('#detail .half')")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
