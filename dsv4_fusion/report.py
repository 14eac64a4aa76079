"""What was matched, what nearly was, and why not."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Site:
    """A place in the model that a fusion covers.

    Attributes:
        path: the module it stands in, as ``model.layers.0.ffn_hc``; empty outside modules.
        fusion: the fusion's name.
        op: the operator it becomes, as ``dsv4::hc_post_pre``.
        nodes: how many nodes of the graph it covers.
        rewritten: whether the graph was rewritten; False on the CPU unless ``reference`` is set.
    """

    path: str
    fusion: str
    op: str
    nodes: int
    rewritten: bool


@dataclass(frozen=True)
class NearMiss:
    """A place that holds most of a fusion's pattern, and the first thing that differs.

    Attributes:
        path: the module it stands in, as of :class:`Site`.
        fusion: the fusion's name.
        reason: what was expected and what was found: an operator, a dtype, a shape, a constant, another user.
        source: the line of the model's source that the differing node comes from, as ``file.py:12: code``; or empty.
    """

    path: str
    fusion: str
    reason: str
    source: str = ""


@dataclass
class Report:
    """The matches of all graphs of one model.

    Attributes:
        sites: every fused site, graph by graph, in program order.
        near_misses: every site that holds most of a pattern and was left alone.
        left_alone: sites that were recognised, and for which there is no rewrite yet.
        nodes_before, nodes_after: nodes of the graphs before and after the rewrites.
        graphs: how many graphs there were.
        seconds: CPU time that matching and rewriting took.
        notes: what else there is to know (training graphs, the CPU, Inductor's cache…).
        cached: the code came out of Inductor's cache; the report is of when it was compiled.
        drawings: of every graph what :meth:`save` draws; ``explain`` collects it, and nothing else does.
    """

    sites: list[Site] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    left_alone: list[NearMiss] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    graphs: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    cached: bool = False
    drawings: list[dict[str, Any]] = field(default_factory=list, repr=False, compare=False)

    @property
    def counts(self) -> Counter[str]:
        """Number of fused sites by operator name, as ``{"hc_post_pre": 7}``; 0 for one that is not there."""
        return Counter(site.fusion for site in self.sites)

    def add(self, other: Report) -> None:
        """Add the report of another graph."""
        self.sites += other.sites
        self.near_misses += other.near_misses
        self.left_alone += other.left_alone
        self.nodes_before += other.nodes_before
        self.nodes_after += other.nodes_after
        self.graphs += other.graphs
        self.seconds += other.seconds
        self.notes += [note for note in other.notes if note not in self.notes]
        self.cached |= other.cached
        self.drawings += other.drawings

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Report:
        """The report of which :meth:`as_dict` gave ``fields``."""
        fields = {name: value for name, value in fields.items() if name != "counts"}
        kinds = {"sites": Site, "near_misses": NearMiss, "left_alone": NearMiss}
        return cls(**fields | {name: [kind(**entry) for entry in fields[name]] for name, kind in kinds.items()})

    def summary(self) -> str:
        """One line: counts, near misses, nodes."""
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items())) or "nothing matched"
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        return (
            f"{counts}; {len(self.near_misses)} near misses; "
            f"{self.nodes_before} -> {self.nodes_after} nodes in {graphs}, {self.seconds:.2f} s"
            + ("; from Inductor's cache" if self.cached else "")
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it as ``json.dump`` takes it.

        Returns:
            ``counts`` first, then every attribute but ``drawings`` under its own name; sites and near misses are dicts.
        """
        fields = asdict(replace(self, drawings=[]))
        del fields["drawings"]
        return {"counts": dict(sorted(self.counts.items()))} | fields

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to a file.

        Args:
            path: by its suffix ``.html``, one file that needs no network, with a picture of every layer if the report
                is one of ``explain``; ``.json``, :meth:`as_dict`; ``.txt``, the table that is printed.

        Raises:
            ValueError: another suffix.
            OSError: the file cannot be written.
        """
        file = Path(path)
        if file.suffix == ".html":
            from ._html import page

            text = page(self)
        elif file.suffix in (".json", ".txt"):
            text = (json.dumps(self.as_dict(), indent=1) if file.suffix == ".json" else str(self)) + "\n"
        else:
            raise ValueError(f"a report is saved as .html, .json or .txt, got {str(path)!r}")
        file.write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        rows = [("module", "fusion", "op", "nodes")]
        rows += [(site.path, site.fusion, site.op, str(site.nodes)) for site in self.sites]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [self.summary()]
        if self.sites:
            lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        for title, entries in (("near misses:", self.near_misses), ("left alone:", self.left_alone)):
            lines += [title] if entries else []
            for entry in entries:
                lines.append(f"  {entry.path or '(no module)'}: {entry.fusion}: {entry.reason}")
                lines += [f"    {entry.source}"] if entry.source else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(line.rstrip() for line in lines)
