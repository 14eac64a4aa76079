"""A report as one HTML file: a summary, every site, and a picture of every layer. It needs no network.

The pictures are laid out in the browser, when a layer is opened, by dagre (``_report/dagre.LICENSE``).
"""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

import torch

from .report import Report


def page(report: Report) -> str:
    """The whole file."""
    data = json.dumps(_data(report), ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    data = data.replace("<!--", "<\\u0021--")
    text = _asset("report.html")
    parts = {
        "title": html.escape(f"dsv4_fusion: {report.summary()}"),
        "style": _asset("report.css"),
        "licence": _asset("dagre.LICENSE"),
        "layout": _asset("dagre.min.js").partition("//# sourceMappingURL")[0],
        "script": _asset("report.js"),
        "data": data,  # last: what it holds is not searched for further parts
    }
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part)
    return text


def _asset(name: str) -> str:
    return (resources.files(__package__) / "_report" / name).read_text(encoding="utf-8")


def _data(report: Report) -> dict[str, Any]:
    from . import __version__

    return {
        "summary": report.summary(),
        "versions": {"dsv4_fusion": __version__, "torch": str(torch.__version__)},
        "report": report.as_dict(),
        "drawings": report.drawings,
    }
