"""Pictures of runs, made small enough to stand in the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from pattern_bench.reporting.blocks import Picture
from pattern_bench.reporting.runs import Pictures, Run
from pattern_bench.results.labels import plain
from pattern_bench.storage.untrusted import regular

PICTURE_WIDTH = 1600
MOST_PICTURE_BYTES = 30 * 2**20


def pictures(runs: Iterable[Run], galleries: Iterable[Pictures]) -> list[Picture]:
    """Return the pictures of galleries, of sanity checks and of each run's explanations, as many as the page has room
    for."""
    wanted = [entry for gallery in galleries for entry in _of_gallery(gallery)]
    wanted += [_of_run(run) for run in runs if (run.folder / "explanations.png").exists()]
    room = MOST_PICTURE_BYTES
    shown: dict[tuple[str, str], Picture] = {}
    for file, name, heading, alt, caption in wanted:
        try:
            source, width, height = _embedded(file)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            shown[str(file), heading] = Picture(heading, "", alt, f"{name}/{file.name} cannot be read: {error}")
            continue
        if before := shown.get((source, heading)):  # the same from several runs, as under other criteria
            shown[source, heading] = replace(before, caption=f"{before.caption}, {caption}")
            continue
        room -= len(source)
        if room < 0:
            shown[str(file), heading] = Picture(
                heading, "", alt, f"{name}/{file.name} is left out: the page would grow too large"
            )
        else:
            shown[source, heading] = Picture(heading, source, alt, caption, width, height)
    return list(shown.values())


Wanted = tuple[Path, str, str, str, str]
"""A picture's file, its run's name, a heading, what it shows, and a caption."""


def _of_gallery(gallery: Pictures) -> list[Wanted]:
    about = gallery.summary
    where = f"{about.get('model')} on {about.get('data')}"
    if gallery.kind == "sanity":
        return [
            (
                gallery.folder / "randomisation.png", gallery.name, f"Cascading randomisation, {where}",
                f"Curves for each method: how similar its heat maps stay while the layers of {where} are randomised "
                "from the output down", f"{gallery.name}: cascading randomisation (Adebayo et al. 2018)",
            ),
            (
                gallery.folder / "convergence.png", gallery.name, f"Convergence of directions, {where}",
                f"Curves for each method: how similar directions from different outputs become on their way back "
                f"through {where}", f"{gallery.name}: convergence of directions (Sixt et al. 2020)",
            ),
        ]  # fmt: skip
    figure = str(about.get("figure"))
    shown, columns = _dicts(about.get("images")), _dicts(about.get("columns"))
    keys = ", ".join(plain(str(column.get("key"))) for column in columns)
    seen = "; ".join(_image(image) for image in shown)
    alt = f"Explanations of {len(shown)} images by {where}. Columns: {keys}. Images: {seen}"
    return [(gallery.folder / f"{figure}.png", gallery.name, f"Gallery {figure}, {where}", alt,
             f"{gallery.name}: {keys}")]  # fmt: skip


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _image(about: dict[str, Any]) -> str:
    true = f"true {about['true']}, " if about.get("true") is not None else ""
    return f"{true}predicted {about.get('predicted_name')}"


def _of_run(run: Run) -> Wanted:
    about = run.summary
    method = plain(str(about.get("method")))
    estimator, where = plain(str(about.get("estimator"))), f"{about.get('model')} on {about.get('data')}"
    alt = (
        f"Validation images of {where}, a row each, with their explanations beside them: estimator {estimator}, "
        f"method {method}; the prediction stands at the left of each row"
    )
    return run.folder / "explanations.png", run.name, f"{method}, {estimator}, {where}", alt, run.name


def _embedded(file: Path) -> tuple[str, int, int]:
    """Return a picture as data URI, made smaller where it is wider than a page, with its width and height."""
    with Image.open(regular(file)) as opened:
        picture = opened.convert("RGB")
    if picture.width > PICTURE_WIDTH:
        picture = picture.resize((PICTURE_WIDTH, max(1, picture.height * PICTURE_WIDTH // picture.width)))
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=88, method=4)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}", picture.width, picture.height
