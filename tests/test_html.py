"""The report as a web page: what the file holds, and, where there is a Chromium, what a reader sees and can do."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

pytest.importorskip("transformers.models.deepseek_v4")

import dsv4_fusion
from dsv4_fusion import NearMiss, Report, Site
from examples.model import model

BROKEN = "model.layers.1.attn_hc"


class Breaks(CustomGraphPass):
    """Another epsilon in one Sinkhorn pass of one module."""

    def __call__(self, graph):
        adds = [
            node
            for node in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
            if node.meta.get("nn_module_stack") and list(node.meta["nn_module_stack"].values())[-1][0].endswith(BROKEN)
        ]
        adds[9].update_arg(1, 1e-5)

    def uuid(self):
        return "breaks"


@pytest.fixture(scope="module")
def report() -> Report:
    """Four layers, one of each kind of attention, one near miss."""
    net = model("tiny", 4, torch.bfloat16)
    return dsv4_fusion.explain(
        net, torch.zeros(1, 32, dtype=torch.long), use_cache=False, options={"joint_custom_pre_pass": Breaks()}
    )


@pytest.fixture(scope="module")
def page(report, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("html") / "report.html"
    report.save(file)
    return file


def data(page: Path) -> dict:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


# The file


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert "default-src 'none'" in text
    script = text.replace(data_text(text), "")
    assert not re.findall(r'(?:src|href)="(?!#)', script)
    assert not re.findall(r"\b(?:fetch|XMLHttpRequest|WebSocket|importScripts|eval)\b *\(", script)
    assert "sourceMappingURL" not in text
    assert "Chris Pettitt" in text  # dagre's licence
    assert "<!--data-->" not in text


def data_text(text: str) -> str:
    return text.partition('type="application/json">')[2].partition("</script>")[0]


def test_what_is_drawn(report):
    (drawing,) = report.drawings
    paths = [layer["path"] for layer in drawing["layers"]]
    layers = [f"model.layers.{index}" for index in range(4)]
    assert paths == ["(before the layers)", *layers, "(after the layers)"]
    assert (
        sum(len(drawing["templates"][layer["template"]]["nodes"]) for layer in drawing["layers"]) < report.nodes_before
    )
    kinds = [mark["kind"] for mark in drawing["marks"]]
    assert kinds.count("fused") == len(report.sites) == 9 + 3  # hyper-connections, compressors
    assert kinds.count("near") == len(report.near_misses) == 1
    assert kinds.count("left") == len(report.left_alone) == 1
    (near,) = [mark for mark in drawing["marks"] if mark["kind"] == "near"]
    code = drawing["codes"][near["before"]]
    assert near["path"] == BROKEN and near["differs"] in code and "1e-05" in code
    fused = next(mark for mark in drawing["marks"] if mark["fusion"] == "hc_post_pre")
    before, after = drawing["codes"][fused["before"]], drawing["codes"][fused["after"]]
    assert before.count("aten.div.Tensor") == 40 and before.endswith("return new_streams, new_post, new_comb, normed")
    assert "dsv4.hc_post_pre.default(output, hidden_streams, post, comb, fn, base, scale, norm_weight)" in after
    kernels, moved, kernels_after, moved_after = fused["cost"]
    assert kernels > 40 and kernels_after == 2 and moved > moved_after > 0
    assert drawing["cost"][0] > drawing["cost"][2] and drawing["cost"][1] > drawing["cost"][3]


def test_layers_of_one_structure_are_kept_once():
    net = model("tiny", 4, torch.bfloat16, layer_types=["sliding_attention"] * 4, hc_sinkhorn_iters=2)
    (drawing,) = dsv4_fusion.explain(net, torch.zeros(1, 8, dtype=torch.long), use_cache=False).drawings
    assert [layer["template"] for layer in drawing["layers"]] == [0, 1, 2, 2, 3, 4]  # the first pre, the last post
    assert [len(layer["marks"]) for layer in drawing["layers"]] == [0, 3, 3, 3, 3, 1]


def test_no_values_no_weights_and_no_drawing_in_compiles(page, tmp_path):
    text = page.read_text()
    assert str(Path.home()) not in data_text(text) and str(tmp_path.parent) not in data_text(text)
    assert "drawings" not in data(page)["report"]
    assert "drawings" not in repr(Report())


def test_text_of_the_model_is_no_markup(tmp_path):
    evil = "</script><script>document.title='hit'</script><!--style-->"
    Report([Site(evil, "hc_pre", "dsv4::hc_pre", 3, True)], [NearMiss("a", "b", evil)], notes=[evil]).save(
        tmp_path / "evil.html"
    )
    text = (tmp_path / "evil.html").read_text()
    assert text.count("</script>") == 3  # the library's, the data's, the page's own
    assert data(tmp_path / "evil.html")["report"]["notes"] == [evil]


def test_save(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.as_dict()
    report.save(str(tmp_path / "report.txt"))
    assert (tmp_path / "report.txt").read_text() == f"{report}\n"
    with pytest.raises(ValueError, match=r"saved as \.html, \.json or \.txt, got 'report\.pdf'"):
        report.save("report.pdf")


# In a browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    binary = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with api.sync_playwright() as playwright:
        try:
            running = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        except Exception as error:
            pytest.skip(f"there is no Chromium: {str(error).splitlines()[0]}")
        yield running
        running.close()


@pytest.fixture
def tab(browser, page):
    """The page, opened; whatever it complains of fails the test."""
    complaints = []
    opened = browser.new_page(viewport={"width": 1400, "height": 1000})
    opened.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "request", lambda request: complaints.append(request.url) if not request.url.startswith("file:") else None
    )
    opened.goto(page.as_uri())
    opened.wait_for_selector("html[data-ready]")
    yield opened
    assert not complaints
    opened.close()


def test_summary_and_near_miss(tab, report):
    assert tab.locator("#summary").inner_text() == report.summary()
    assert tab.locator("#cards .card").count() == 6
    (miss,) = report.near_misses
    assert miss.reason in tab.locator("#misses").inner_text() and miss.source in tab.locator("#misses").inner_text()
    assert tab.locator("details.layer[open] > summary .path").inner_text() == "model.layers.1"  # where the near miss is
    tab.locator("#misses button").click()
    panel = tab.locator("#panel").inner_text()
    assert "near miss: hc_pre" in panel and miss.reason in panel and "modeling_deepseek_v4.py:" in panel
    assert "1e-05" in tab.locator("#panel pre .differs").inner_text()


def test_regions_open_and_show_their_code(tab):
    layer = tab.locator("details.layer").nth(1)
    layer.locator("summary").click()
    region = layer.locator("g.item.fused").first
    region.click()
    assert "hc_pre" in tab.locator("#panel h3").inner_text()
    before, after = tab.locator("#panel pre").all_inner_texts()
    assert "aten.sum.dim_IntList" in before and "dsv4.hc_pre.default(" in after
    operations = layer.locator("g.item.op").count()
    region.locator(".toggle").click()
    assert layer.locator("g.item.op").count() > operations + 100
    layer.get_by_text("Close all").click()
    assert layer.locator("g.item.op").count() == operations


def test_the_keyboard_is_enough(tab):
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    layer = tab.locator("details.layer").nth(1)
    layer.locator("summary").focus()
    tab.keyboard.press("Enter")
    layer.locator("g.item").first.wait_for()
    layer.locator("g.item.fused").first.focus()
    where = tab.evaluate("document.activeElement.dataset.id")
    tab.keyboard.press("Enter")
    assert tab.locator("#panel").is_visible()
    tab.keyboard.press("Escape")
    assert tab.locator("#panel").is_hidden()
    assert tab.evaluate("document.activeElement.dataset.id") == where
    tab.keyboard.press("+")
    assert tab.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.dataset.id") != where
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("-")
    assert tab.evaluate("[document.activeElement.dataset.id, document.activeElement.ariaExpanded]") == [where, "false"]


def test_search(tab):
    tab.keyboard.press("/")
    tab.keyboard.type("indexer left alone")
    assert tab.locator("#results").inner_text().startswith("1 result")
    tab.keyboard.press("Enter")
    tab.locator("details.layer[open] g.item.left.selected").wait_for()
    assert "nothing is quantised here" in tab.locator("#panel").inner_text()
    tab.locator("#search").fill("no such thing")
    assert tab.locator("#results").inner_text() == "Nothing found."


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes_and_print(tab, theme):
    def paper() -> int:
        return int(re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[0])

    tab.emulate_media(color_scheme=theme)
    assert (paper() > 128) == (theme == "light")
    for chosen in ("light", "dark"):
        tab.locator("#theme").click()
        assert (paper() > 128) == (chosen == "light")
    tab.emulate_media(media="print", color_scheme=theme)
    assert paper() == 255 and tab.locator("#search").is_hidden()
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_43_layers_are_small_and_quick(browser, report, tmp_path):
    """Even if no two layers were alike."""
    (drawing,) = report.drawings
    layers = [layer for layer in drawing["layers"] if layer["path"].startswith("model.")]
    many, templates = [], []
    for index in range(43):
        layer = layers[index % len(layers)]
        many.append(layer | {"path": f"model.layers.{index}", "template": len(templates)})
        templates.append(drawing["templates"][layer["template"]])
    whole = Report(
        report.sites, report.near_misses, graphs=1, drawings=[drawing | {"layers": many, "templates": templates}]
    )
    file = tmp_path / "whole.html"
    whole.save(file)
    assert file.stat().st_size < 5_000_000
    opened = browser.new_page()
    opened.goto(file.as_uri())
    opened.wait_for_selector("html[data-ready]")
    assert int(opened.get_attribute("html", "data-ready")) < 2000
    assert opened.locator("details.layer").count() == 43
    opened.close()
