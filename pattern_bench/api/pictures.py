"""A picture of explanations side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pattern_bench.api.arguments import file_to_write, some_images, writing
from pattern_bench.api.explanations import check_methods, explained
from pattern_bench.api.networks import answers, in_own_precision
from pattern_bench.core.half_precision import images_for, widened
from pattern_bench.core.predictions import prediction_of, target_outputs
from pattern_bench.core.rounding import float32_products
from pattern_bench.errors import UserError


@float32_products()
@in_own_precision
def draw_gallery(
    model: nn.Module, images: Tensor, methods: Mapping[str, Any], file: str | Path, target: Tensor | None = None
) -> None:
    """Draw a picture with a row per image and a column per explanation (those of signals in colour), as PNG.

    >>> import tempfile, torch
    >>> import pattern_bench as pb
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "gallery.png"
    ...     pb.draw_gallery(model, torch.eye(2)[None, None], {"input": lambda model, inputs, targets: inputs}, file)
    ...     file.read_bytes()[1:4]
    b'PNG'

    The arguments are those of :func:`degradation`; ``file`` may be of another type that Matplotlib draws.

    Raises:
        UserError: as :func:`degradation`; where ``file`` cannot be written.
    """
    check_methods(methods)
    path = file_to_write(file)
    from pattern_bench.plotting.figures import draw_explanations, suffixes

    if path.suffix.lower() not in suffixes():
        raise UserError(f"file={file} has no suffix of a picture: give one of {', '.join(suffixes())}")

    network, images = widened(model), some_images(images)
    own, images = images_for(model, images), images_for(network, images)
    network, logits = answers(network, images)
    _, predicted, confidence = prediction_of(network, logits)
    target = target_outputs(target, logits)
    columns = {}
    for name, explanation in methods.items():
        title = f"signal, {name}" if getattr(explanation, "kind", "") == "signal" else name
        columns[title] = explained(name, explanation, model, own, target).cpu()
    captions = [f"predicted {p} ({c:.0%})" for p, c in zip(predicted.tolist(), confidence.tolist(), strict=True)]
    with writing(file):
        draw_explanations(images.cpu(), columns, captions, path)
