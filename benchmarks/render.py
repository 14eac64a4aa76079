"""Writes the tables of README.md and docs/measurements.md from the measurements in benchmarks/results/<gpu>/*.json.

    python benchmarks/render.py            write them
    python benchmarks/render.py --check    exit 1 if they are out of date
    python benchmarks/render.py --plot     draw benchmarks/results/<gpu>/<work>.png, time over tokens (needs matplotlib)

A table stands between ``<!-- table: WORK KEY=VALUE … -->`` and ``<!-- end -->``. A key is a parameter of the rows
(``D=4096``, ``timer=graph,flush`` for either; ``gpu`` is the folder's name), or one of

    rows=impl      the parameter down the side
    columns=T      the parameter across the top
    values=us      what the cells show; several (``values=us,kernels,peak_gib``) take the place of the columns
    unit=us        us, ms or s, for times

``<!-- ratio: WORK KEY=VALUE … -->`` and ``<!-- end -->`` on one line hold how many times faster ours is than Inductor;
with ``against=floor`` how much of the time of ours the floor is, in percent.

Of two measurements of the same thing the newer file's counts; a ratio is that of one file, the newest that has both
times. A table in which two measurements that differ in some other parameter compete for a cell is an error, which names
that parameter. The JSON format is in CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "measurements.md")

TABLE = re.compile(r"(<!-- table: (?P<spec>[^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
RATIO = re.compile(r"(<!-- ratio: (?P<spec>[^\n]*?) -->)[^\n]*?(<!-- end -->)")
MEASURED = {"us", "kernels", "peak_gib", "compile_s", "recall", "error"}  # all other keys say what was measured
TOKENS = ("T", "M")  # what counts them
FILE_KEYS = {"gpu", "date", "commit", "versions", "rows"}
FIRST, LAST = ["eager", "inductor"], ["ours", "floor"]  # the order of impl; the peers come between, by name
TITLES = {"us": "{unit}", "peak_gib": "peak GiB", "compile_s": "compile s"}
TITLES |= {"recall": "recall in %", "error": "error in 10⁻⁶"}
UNITS = {"us": ("µs", 1.0), "ms": ("ms", 1e-3), "s": ("s", 1e-6)}

Row = dict[str, Any]


def load(results: Path) -> list[Row]:
    """Every row, oldest files first; each with its file's gpu folder and, under "file", the file's head."""
    files = []
    for path in results.glob("*/*.json"):
        content = json.loads(path.read_text())
        if missing := FILE_KEYS - content.keys():
            raise ValueError(f"{path.name} lacks {', '.join(sorted(missing))}")
        files.append((content["date"], path.name, path.parent.name, content))
    rows = []
    for *_, folder, content in sorted(files, key=lambda file: file[:2]):
        for number, row in enumerate(content["rows"]):
            if missing := {"work", "impl"} - row.keys():
                raise ValueError(f"a row (number {number}) of {content['date']} lacks {', '.join(sorted(missing))}")
            rows.append({**row, "gpu": folder, "file": content})
    return rows


def newest(rows: list[Row]) -> list[Row]:
    """The last row of everything measured."""
    skipped = MEASURED | {"file"}
    return list({tuple(sorted((k, str(v)) for k, v in row.items() if k not in skipped)): row for row in rows}.values())


def number(value: float) -> str:
    """Three digits: 1.23, 12.3, 123, 1,234."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def order(values: set[Any]) -> list[Any]:
    def key(value: Any) -> tuple:
        if isinstance(value, str):
            place = FIRST.index(value) if value in FIRST else 100 + LAST.index(value) if value in LAST else 50
            return 1, place, value
        return 0, value, ""

    return sorted(values, key=key)


def table(spec: str, rows: list[Row]) -> str:
    """The Markdown table that a marker asks for, with the line that says where its numbers come from."""
    work, *settings = spec.split()
    wanted = dict(setting.split("=", 1) for setting in settings)
    side, top = wanted.pop("rows", "impl"), wanted.pop("columns", "T")
    values = wanted.pop("values", "us").split(",")
    unit, factor = UNITS[wanted.pop("unit", "us")]
    factors = {"us": factor, "recall": 100.0, "error": 1e6}

    rows = [
        row
        for row in newest(rows)
        if row["work"] == work and side in row and all(str(row.get(k)) in v.split(",") for k, v in wanted.items())
    ]
    if len(values) == 1:
        rows = [row for row in rows if top in row and values[0] in row]
    if not rows:
        return "Not measured yet.\n"

    cells: dict[tuple, tuple[Row, float]] = {}
    for row in rows:
        for value in values:
            if value not in row:
                continue
            place = row[side], row[top] if len(values) == 1 else value
            if place in cells:
                other = cells[place][0]
                keys = {k for k in row.keys() | other.keys() if row.get(k) != other.get(k)} - MEASURED - {"file"}
                raise ValueError(f"table: {spec}: two measurements for {place}; fix {' or '.join(sorted(keys))}")
            cells[place] = row, row[value] * factors.get(value, 1)

    def title(value: Any) -> str:
        return TITLES.get(value, str(value)).format(unit=unit) if len(values) > 1 else str(value)

    columns = values if len(values) > 1 else order({place[1] for place in cells})
    corner = side if len(values) > 1 else f"{TITLES.get(values[0], values[0]).format(unit=unit)} at {top} ="
    lines = [
        " | ".join(["", corner, *map(title, columns), ""]).strip(),
        "|".join(["", "---", *["---:"] * len(columns), ""]),
    ]
    for label in order({place[0] for place in cells}):
        line = [number(cells[label, column][1]) if (label, column) in cells else "–" for column in columns]
        lines.append(" | ".join(["", str(label), *line, ""]).strip())
    return "\n".join([*lines, "", *sources(row for row, _ in cells.values())]) + "\n"


def ratio(spec: str, rows: list[Row]) -> str:
    """Inductor's time over ours, or the floor's, of the one measurement that a marker asks for, in one run."""
    work, *settings = spec.split()
    wanted = dict(setting.split("=", 1) for setting in settings)
    against = wanted.pop("against", "inductor")
    files: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["work"] == work and all(str(row.get(k)) == v for k, v in wanted.items()):
            times = files.setdefault(id(row["file"]), {})
            if row["impl"] in times:
                raise ValueError(f"ratio: {spec}: two measurements of {row['impl']}; fix more parameters")
            times[row["impl"]] = row["us"]
    both = [times for times in files.values() if {against, "ours"} <= times.keys()]
    if not both:
        return "not measured"
    share = both[-1][against] / both[-1]["ours"]
    return f"{100 * share:.0f} %" if against == "floor" else f"{share:.1f}×"


def sources(rows: Any) -> list[str]:
    """One line for each file the rows come from."""
    files = {id(row["file"]): row["file"] for row in rows}
    lines = []
    for file in sorted(files.values(), key=lambda file: file["date"]):
        versions = ", ".join(f"{name} {version}" for name, version in file["versions"].items())
        lines.append(f"<sub>{file['gpu']} · {versions} · {file['date']} · commit {file['commit'][:10]}</sub>")
    return list(dict.fromkeys(lines))


def render(text: str, rows: list[Row]) -> str:
    """``text`` with every table and every ratio in it written anew."""
    if text.count("<!-- table:") != len(TABLE.findall(text)):
        raise ValueError("a <!-- table: … --> has no <!-- end -->, or is not alone on its line")
    text = RATIO.sub(lambda match: f"{match[1]}{ratio(match['spec'], rows)}{match[3]}", text)
    return TABLE.sub(lambda match: f"{match[1]}\n{table(match['spec'], rows)}\n{match[3]}", text)


def plot(rows: list[Row], results: Path) -> list[Path]:
    """One picture per GPU and work: time over tokens, a panel for each set of the other parameters.

    Graph replay and single launches, which take over where the one ends, are one line; the CPU's time is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    timed = [row for row in newest(rows) if _tokens(row) and "us" in row and row.get("timer") != "wall"]
    for gpu, work in sorted({(row["gpu"], row["work"]) for row in timed}):
        panels: dict[str, dict[str, dict[int, float]]] = {}
        for row in timed:
            if (row["gpu"], row["work"]) == (gpu, work):
                fixed = row.keys() - MEASURED - {"file", "gpu", "work", "impl", "timer", *TOKENS}
                panel = panels.setdefault(", ".join(f"{key}={row[key]}" for key in sorted(fixed)), {})
                panel.setdefault(row["impl"], {})[_tokens(row)] = row["us"]
        panels = {name: lines for name, lines in panels.items() if max(map(len, lines.values())) > 1}
        if not panels:  # points, and no lines
            continue
        wide = min(3, len(panels))
        high = -(-len(panels) // wide)
        figure, axes = pyplot.subplots(high, wide, figsize=(5 * wide, 3.6 * high), squeeze=False, layout="constrained")
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, (name, lines) in zip(axes.flat, sorted(panels.items()), strict=False):
            for impl in order(set(lines)):
                style = {"color": "black", "linestyle": "--"} if impl == "floor" else {"marker": "."}
                axis.plot(*zip(*sorted(lines[impl].items()), strict=True), label=impl, **style)
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="µs", title=name)
            axis.grid(alpha=0.3)
            axis.legend()
        figure.suptitle(f"{work}, {gpu}")
        written.append(results / gpu / f"{work}.png")
        figure.savefig(written[-1], dpi=80)
        pyplot.close(figure)
    return written


def _tokens(row: Row) -> int:
    return next((row[key] for key in TOKENS if key in row), 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the tables of README.md and docs/measurements.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    parser.add_argument("--plot", action="store_true", help="draw one picture per work as well")
    options = parser.parse_args(arguments)
    rows = load(RESULTS)
    stale = 0
    for page in PAGES:
        before = page.read_text()
        after = render(before, rows)
        if options.check and after != before:
            print(f"{page.relative_to(ROOT)} is out of date: run python benchmarks/render.py")
            stale = 1
        elif after != before:
            page.write_text(after)
    if options.check:
        return stale
    if options.plot:
        print(*plot(rows, RESULTS), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
