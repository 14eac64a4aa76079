"""Tables of the README and docs/measurements.md: the newest measurement in each cell, and only what was measured."""

import json

import pytest

from benchmarks import render

HEAD = {"gpu": "NVIDIA H200", "versions": {"torch": "2.13.0"}, "copy_tb_s": 4.0, "matmul_tflops": 700.0}


@pytest.fixture
def results(tmp_path):
    """A folder of results and a function that puts a file into it."""

    def write(date, rows, name=None, gpu="h200"):
        path = tmp_path / gpu / (name or f"{date}-x.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**HEAD, "date": date, "commit": "0123456789abcdef", "rows": rows}))

    return tmp_path, write


def row(impl, us, **parameters):
    return {"work": "hc_pre", "impl": impl, "timer": "graph", "us": us, "T": 1, "D": 4096, **parameters}


def test_newest_measurement_counts(results):
    folder, write = results
    write("2026-11-02", [row("ours", 2.0)], name="a.json")
    write("2026-11-01", [row("ours", 9.0), row("floor", 1.0)], name="b.json")
    text = render.table("hc_pre D=4096", render.load(folder))
    assert text.splitlines() == [
        "| µs at T = | 1 |",
        "|---|---:|",
        "| ours | 2.00 |",
        "| floor | 1.00 |",
        "",
        "<sub>NVIDIA H200 · torch 2.13.0 · 2026-11-01 · commit 0123456789</sub>",
        "<sub>NVIDIA H200 · torch 2.13.0 · 2026-11-02 · commit 0123456789</sub>",
    ]


def test_columns_rows_and_gaps(results):
    folder, write = results
    write("2026-11-01", [row("ours", 1234.5, T=4096), row("inductor", 12.34, T=16), row("peer", 99.96, T=4096)])
    assert render.table("hc_pre unit=us", render.load(folder)).splitlines()[:5] == [
        "| µs at T = | 16 | 4096 |",
        "|---|---:|---:|",
        "| inductor | 12.3 | – |",
        "| peer | – | 100 |",
        "| ours | – | 1,234 |",
    ]
    assert "| 1.23 |" in render.table("hc_pre impl=ours unit=ms", render.load(folder))


def test_either_of_two_values(results):
    folder, write = results
    timers = ("graph", "flush", "wall")
    write("2026-11-01", [row("ours", 1.0 + n, timer=timer, T=n) for n, timer in enumerate(timers)])
    assert render.table("hc_pre timer=graph,flush", render.load(folder)).splitlines()[:3] == [
        "| µs at T = | 0 | 1 |",
        "|---|---:|---:|",
        "| ours | 1.00 | 2.00 |",
    ]


def test_recall_in_percent(results):
    folder, write = results
    write("2026-11-01", [{"work": "recall", "impl": "fp8", "data": "gaussian", "recall": 0.964}])
    text = render.table("recall columns=data values=recall", render.load(folder))
    assert text.splitlines()[:3] == ["| recall in % at data = | gaussian |", "|---|---:|", "| fp8 | 96.4 |"]


def test_errors_in_millionths(results):
    folder, write = results
    write("2026-11-01", [{"work": "error", "impl": "fp8", "data": "gaussian", "error": 1.28e-4}])
    text = render.table("error columns=data values=error", render.load(folder))
    assert text.splitlines()[:3] == ["| error in 10⁻⁶ at data = | gaussian |", "|---|---:|", "| fp8 | 128 |"]


def test_several_values(results):
    folder, write = results
    rows = [{"work": "prefill", "impl": impl, "us": 2000.0, "kernels": 50, "S": 4096} for impl in ("eager", "ours")]
    write("2026-11-01", rows)
    assert render.table("prefill values=us,kernels unit=ms", render.load(folder)).splitlines()[:4] == [
        "| impl | ms | kernels |",
        "|---|---:|---:|",
        "| eager | 2.00 | 50 |",
        "| ours | 2.00 | 50 |",
    ]


def test_ambiguous_cell_names_the_parameter(results):
    folder, write = results
    write("2026-11-01", [row("ours", 1.0), row("ours", 2.0, D=7168)])
    with pytest.raises(ValueError, match=r"fix D$"):
        render.table("hc_pre", render.load(folder))


def test_file_without_its_head_is_refused(tmp_path):
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "x.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"x\.json lacks commit, date, gpu, versions"):
        render.load(tmp_path)


def test_text_outside_the_tables_is_kept():
    text = "before\n<!-- table: hc_pre D=1 -->\nold\n<!-- end -->\nafter\n"
    once = render.render(text, [])
    assert once == "before\n<!-- table: hc_pre D=1 -->\n\nNot measured yet.\n\n<!-- end -->\nafter\n"
    assert render.render(once, []) == once
    with pytest.raises(ValueError, match="no <!-- end -->"):
        render.render("<!-- table: hc_pre -->\nold\n", [])


def test_pages_are_up_to_date(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().out


def test_ratio(results):
    folder, write = results
    write("2026-11-01", [row("ours", 4.0), row("inductor", 10.0), row("ours", 1.0, T=2)])
    rows = render.load(folder)
    text = "| hc_pre | <!-- ratio: hc_pre T=1 -->old<!-- end -->, <!-- ratio: hc_pre T=2 --><!-- end --> |"
    assert render.render(text, rows) == (
        "| hc_pre | <!-- ratio: hc_pre T=1 -->2.5×<!-- end -->, <!-- ratio: hc_pre T=2 -->not measured<!-- end --> |"
    )
    with pytest.raises(ValueError, match="two measurements of ours; fix more parameters"):
        render.ratio("hc_pre timer=graph", rows)


def test_a_ratio_is_of_one_run(results):
    folder, write = results
    write("2026-11-01", [row("ours", 4.0), row("inductor", 10.0), row("floor", 1.0)])
    write("2026-11-02", [row("ours", 2.0), row("floor", 1.5)])
    rows = render.load(folder)
    assert render.ratio("hc_pre T=1", rows) == "2.5×"
    assert render.ratio("hc_pre T=1 against=floor", rows) == "75 %"
    assert render.ratio("hc_pre T=1 against=peer", rows) == "not measured"
