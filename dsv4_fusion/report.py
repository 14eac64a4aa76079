"""What was matched, what nearly was, and why not."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
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
    """A place that holds most of a fusion's pattern, and the first thing that differs."""

    path: str
    fusion: str
    reason: str


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
        notes: what else there is to know (training graphs, the CPU…).
    """

    sites: list[Site] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    left_alone: list[NearMiss] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    graphs: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

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

    def summary(self) -> str:
        """One line: counts, near misses, nodes."""
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items())) or "nothing matched"
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        return (
            f"{counts}; {len(self.near_misses)} near misses; "
            f"{self.nodes_before} -> {self.nodes_after} nodes in {graphs}, {self.seconds:.2f} s"
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it as ``json.dump`` takes it.

        Returns:
            ``counts`` first, then every attribute under its own name; sites and near misses are dicts of theirs.
        """
        return {"counts": dict(sorted(self.counts.items()))} | asdict(self)

    def __str__(self) -> str:
        rows = [("module", "fusion", "op", "nodes")]
        rows += [(site.path, site.fusion, site.op, str(site.nodes)) for site in self.sites]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [self.summary()]
        if self.sites:
            lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        for title, entries in (("near misses:", self.near_misses), ("left alone:", self.left_alone)):
            lines += [title] if entries else []
            lines += [f"  {entry.path or '(no module)'}: {entry.fusion}: {entry.reason}" for entry in entries]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(line.rstrip() for line in lines)
