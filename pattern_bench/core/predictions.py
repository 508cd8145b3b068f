"""Read a network's logits: the probabilities they stand for, the class predicted, and the outputs asked for.

Shapes: B images, K outputs.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pattern_bench.core.network import first_not_finite
from pattern_bench.core.outputs import Logits
from pattern_bench.core.tensor_checks import unusable, whole_numbers
from pattern_bench.errors import UserError, told


def probabilities(network: Any, logits: Tensor) -> Tensor:
    """Return the probabilities that ``logits`` (B, K) of ``network`` stand for, (B, K).

    Their softmax. Of a single logit, and of a network that ends in a sigmoid, each output's own sigmoid: a network with
    one logit z tells class 1 from class 0, z is evidence for class 1, and sigmoid(z) is the probability of class 1.

    >>> model = torch.nn.Identity()
    >>> probabilities(model, torch.zeros(1, 4)).tolist(), probabilities(model, torch.zeros(1, 1)).tolist()
    ([[0.25, 0.25, 0.25, 0.25]], [[0.5]])
    """
    return logits.sigmoid() if has_independent_outputs(network, logits) else logits.softmax(1)


def has_independent_outputs(network: Any, logits: Tensor) -> bool:
    """Return whether each of the ``logits`` (B, K) is evidence by itself, rather than against the others: whether
    probabilities are sigmoids.

    >>> model = torch.nn.Identity()
    >>> has_independent_outputs(model, torch.zeros(1, 1)), has_independent_outputs(model, torch.zeros(1, 4))
    (True, False)
    """
    return logits.shape[1] == 1 or (isinstance(network, Logits) and network._independent)


def first_broken_layer(network: Any, images: Tensor, logits: Tensor) -> str | None:
    """Return the first layer where a value is NaN or infinite, where that shows in the probabilities; None otherwise.

    Args:
        network: which put out ``logits`` (B, K) for ``images`` (B, C, spatial...).

    >>> model = torch.nn.Linear(1, 2)
    >>> image = torch.tensor([[float("nan")]])
    >>> first_broken_layer(torch.nn.Sequential(model), image, model(image))
    '0'
    """
    if probabilities(network, logits).isfinite().all():
        return None
    return first_not_finite(network, images) or "after the last one"


class Prediction(NamedTuple):
    """The output to explain, the class predicted and the probability of that class, each (B,).

    Output and class are the same but for networks with one logit z, which have output 0 alone: the class is 1 where
    z > 0 and 0 elsewhere, with the larger of sigmoid(z) and sigmoid(-z) for its probability.

    >>> prediction_of(torch.nn.Identity(), torch.tensor([[0.0]])).confidence.item()
    0.5
    """

    output: Tensor
    label: Tensor
    confidence: Tensor


def prediction_of(network: Any, logits: Tensor) -> Prediction:
    """Return the prediction that ``logits`` (B, K) of ``network`` stand for.

    >>> output, label, confidence = prediction_of(torch.nn.Identity(), torch.tensor([[-3.0, 3.0], [0.0, -0.0]]))
    >>> label.tolist(), confidence.round(decimals=2).tolist()
    ([1, 0], [1.0, 0.5])
    """
    p = probabilities(network, logits)
    confidence, output = p.max(1)
    if logits.shape[1] > 1:
        return Prediction(output, output, confidence)
    return Prediction(output, (logits[:, 0] > 0).long(), torch.maximum(confidence, 1 - confidence))


def target_outputs(target: Any, logits: Tensor, who: str = "") -> Tensor:
    """Return the outputs that ``target`` asks for, (B,) int64.

    Args:
        target: a whole number, a tensor of one for each image, or None for the outputs of the largest logits.
        logits: (B, K).
        who: what errors begin with, such as the name of a method.

    Raises:
        UserError: where the target is neither a whole number nor B of them, or out of range.

    >>> logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    >>> target_outputs(None, logits).tolist(), target_outputs(1, logits).tolist()
    ([1, 0], [1, 1])
    """
    if target is None:
        return logits.detach().argmax(1)
    asked, outputs = target_per_image(target, len(logits), logits.device, who), logits.shape[1]
    outside = asked[(asked < 0) | (asked >= outputs)]
    if len(outside):
        raise UserError(
            f"{who}target={int(outside[0])} is out of range: the network has {outputs} outputs, so give 0 to "
            f"{outputs - 1}, or None for the predicted class"
        )
    return asked


def target_per_image(target: Any, images: int, device: torch.device, who: str = "") -> Tensor:
    """Return one whole number, or a tensor of one for each image, as a tensor (images,) int64 on ``device``.

    Raises:
        UserError: where it is neither, or beyond 64 bits; the message begins with ``who``.

    >>> target_per_image(3, 2, torch.device("cpu"))
    tensor([3, 3])
    """
    if isinstance(target, Integral) and not isinstance(target, bool):
        if not -(2**63) <= int(target) < 2**63:
            raise UserError(
                f"{who}target={told(int(target))} is out of range: give the number of one of the network's outputs, or "
                "None for the predicted class"
            )
        return torch.full((images,), int(target), device=device)
    if not isinstance(target, Tensor) or not whole_numbers(target) or target.shape not in ((), (images,)):
        what = told(target)
        if isinstance(target, Tensor):
            what = unusable(target) or f"{target.dtype} of shape {tuple(target.shape)}"
        raise UserError(
            f"{who}target={what} is not possible: give one whole number, a tensor of {images} (one for each image), or "
            "None for the predicted class"
        )
    return target.detach().to(device, torch.int64).expand(images).clone()
