"""The page of a report: one HTML file that asks nothing of any other. How it looks is in ``template``."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pattern_bench.plotting.styles import GREY, PALETTE, legible
from pattern_bench.reporting.plots import Plot
from pattern_bench.results.labels import estimators
from pattern_bench.storage.atomic import write_file

TEMPLATE = Path(__file__).parent / "template"
COLOURS = [*PALETTE, GREY]
LIGHT, DARK = "#ffffff", "#1b1e23"
"""What figures are drawn on."""


def write_page(path: Path, title: str, content: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: HTML file.
        title: its heading.
        content: its sections; see ``template/index.html``.
    """
    html = render(title, content)
    write_file(path, lambda file: file.write_text(html))


def render(title: str, content: Mapping[str, Any]) -> str:
    """Return the page as HTML.

    Whatever stands in ``content`` is text: it is escaped, and the page's policy lets it run and load nothing else than
    what the template has.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"estimator": _estimator, "points": _points, "colour": _colour}
    style = (TEMPLATE / "style.css").read_text() + _colours()
    script = (TEMPLATE / "page.js").read_text()
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    page = environment.get_template("index.html")
    return page.render(title=title, style=Markup(style), script=Markup(script), policy=policy, **content)  # noqa: S704


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _colours() -> str:
    """Return a CSS rule for each colour of the figures, legible on both backgrounds."""
    return "".join(
        f".k{i} {{ --k: light-dark({legible(colour, LIGHT)}, {legible(colour, DARK)}) }}\n"
        for i, colour in enumerate(COLOURS)
    )


def _colour(colour: str) -> str:
    """Return the CSS class of one of COLOURS."""
    return f"k{COLOURS.index(colour)}"


def _estimator(name: str) -> str:
    """Return a name that begins with an estimator's as the paper writes it, with a subscript."""
    first, comma, rest = name.partition(", ")
    labels = {known: facts.label for known, facts in estimators().items()}
    short = labels.get(first, first)
    if short not in labels.values():
        return name
    letter, _, index = short.partition("_")
    return Markup("{}<sub>{}</sub>{}").format(letter, index.replace("-", "−"), comma + rest)


def _points(plot: Plot) -> Markup:
    """Return the figure's points as JSON that can stand in a script element."""
    text = json.dumps([one.points for one in plot.series], ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))  # noqa: S704
