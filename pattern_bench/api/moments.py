"""Statistics of a network's layers over images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.api.arguments import images_of, number, seed_of, whole
from pattern_bench.api.networks import REFUSALS, cannot_take, device_of, not_finite
from pattern_bench.core import responses, weight_digests
from pattern_bench.core.canonical import canonical
from pattern_bench.core.collector import Collector
from pattern_bench.core.half_precision import images_for, own_precision
from pattern_bench.core.layers import Scratch
from pattern_bench.core.memory import is_out_of_memory
from pattern_bench.core.moments import MEMORY, Moments
from pattern_bench.core.network import collecting, layers_in_order, refusing_other_layers, select_layers
from pattern_bench.core.rounding import float32_products
from pattern_bench.errors import UserError, told


class LayerMoments(dict[str, Moments]):
    """Moments by layer name, as :func:`collect_moments` returns them.

    Args:
        moments: by layer.
        example: (1, C, spatial...), one of the images that they were collected from.
        belongs_to: digests of the weights of that network (``core.weight_digests``); none for moments of unknown
            origin, which are not checked against a network's weights.
        responses: what the layers of that network took in and put out for one image of noise (``core.responses``).

    >>> import pattern_bench as pb
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1)).eval()
    >>> moments = pb.collect_moments(model, [torch.ones(3, 2)], gram=False)
    >>> moments.example, moments["0"].n.item()
    (tensor([[1., 1.]]), 3.0)
    """

    belongs_to: Mapping[str, str] = {}
    responses: Mapping[str, str] = {}

    def __init__(
        self,
        moments: Mapping[str, Moments],
        example: Tensor,
        belongs_to: Mapping[str, str] | None = None,
        responses: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(moments)
        self.example, self.belongs_to, self.responses = example, dict(belongs_to or {}), dict(responses or {})


@float32_products()
def collect_moments(
    model: nn.Module,
    loader: Iterable[Any],
    layers: str | Sequence[str] | None = None,
    gram: bool = True,
    *,
    memory: int = MEMORY,
    positions: float = 1.0,
    seed: int = 0,
) -> LayerMoments:
    """Sum what estimators and ρ need over all patches of each layer, in one pass (``core.collector``).

    The filter (1, -1) below answers y, and cancels the distractor e of x = (y + e, e).

    >>> import pattern_bench as pb
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    >>> images = torch.tensor([[2.0, 1.0], [0.0, -1.0], [0.0, 1.0], [-2.0, -1.0]])
    >>> moments = pb.collect_moments(model, [images[:2], images[2:]])
    >>> moments["0"].cov_xu  # cov[x, u], which the distractor has no part in
    tensor([[1., 0.]], dtype=torch.float64)

    Args:
        model: any network; it is not changed.
        loader: yields batches of images (B, C, spatial...), or tuples or lists that start with one.
        layers: names or globs of Conv and Linear layers; all for None.
        gram: whether to sum the Gram matrices, which :func:`evaluate` needs and :func:`fit_patterns` does not.
        memory: bytes that temporaries may take.
        positions: share of each layer's output positions to sample; 1.0 is exact.
        seed: of the sampled positions.

    Returns:
        Moments by layer name, in the order the layers run.

    Raises:
        UserError: where the loader yields no images, a layer does not exist, or the network is not supported; naming
            the layer, where one runs for some images and not for the first, or the other way round.
    """
    device, wanted = device_of(model), _names(layers)
    if not isinstance(gram, bool):
        raise UserError(f"gram={told(gram)} is not possible: give True or False")
    memory = whole("memory", memory, 1)
    positions = number("positions", positions, 1e-6, 1)
    seed = seed_of(seed)
    try:
        batches = iter(loader)
    except TypeError as error:
        raise UserError(
            f"loader={told(loader)} yields nothing: give a DataLoader, or a list of batches of images"
        ) from error
    network, collectors, seen = None, {}, 0
    for place, batch in enumerate(batches):
        first = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
        images = images_of(first, "loader yields").to(device)
        if not len(images):
            continue
        try:
            with own_precision(device), torch.no_grad():
                if network is None:
                    network = canonical(model, images[:1])
                    example = images_for(network, images[:1].clone())
                    scratch, names = Scratch(), layers_in_order(network, example)
                    for name in select_layers(names, wanted):
                        layer: Any = network.get_submodule(name)
                        collectors[name] = Collector(layer, gram, memory, positions, seed, scratch)
                    belongs_to = weight_digests.belongs_to(model, example, collectors)
                    answers = responses.responses(model, example.shape[1:], collectors)
                images = images_for(network, images)
                with collecting(network, collectors), refusing_other_layers(network, names, wanted):
                    network(images)
                ends = [*(collector.finite for collector in collectors.values()), images.isfinite().all()]
                finite = torch.stack(ends).tolist()
        except REFUSALS as error:
            if isinstance(error, UserError) or is_out_of_memory(error):
                raise
            raise cannot_take(model, images, error) from error
        if not all(finite):
            where = f"batch {place} of loader (images {seen} to {seen + len(images) - 1})"
            raise not_finite([*collectors, names[0]][finite.index(False)], where)
        seen += len(images)
    if network is None:
        raise UserError("loader yields no batch with images: give it some")
    moments = {name: collector.moments() for name, collector in collectors.items()}
    for name, sums in moments.items():
        if not sums.n:
            raise UserError(
                f"layer {name} runs for none of the batches of loader, though for their first image by itself: leave "
                "it out (layers), or give a network that runs the same layers for all images"
            )
    return LayerMoments(moments, example, belongs_to, answers)


def _names(layers: Any) -> list[str]:
    """
    Raises:
        UserError: where ``layers`` are not names.
    """
    wanted: list[Any]
    try:
        wanted = ["all"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    except (TypeError, RuntimeError):  # numbers, and tensors that are none
        wanted = [layers]
    if not all(isinstance(name, str) for name in wanted):
        shown = ", ".join(map(told, wanted[:3]))
        raise UserError(f"layers=[{shown}] is not possible: give a name, a glob, or a list of them")
    return wanted


def check_moments_given(argument: str, moments: Any) -> None:
    """Refuse what :func:`collect_moments` did not return, naming the ``argument`` that it was given as.

    >>> check_moments_given("probe", {})
    Traceback (most recent call last):
    pattern_bench.errors.UserError: probe=a dict is no moments: give what pb.collect_moments returned

    Raises:
        UserError: where ``moments`` are not of :func:`collect_moments`.
    """
    if not isinstance(moments, LayerMoments):
        raise UserError(f"{argument}={told(moments)} is no moments: give what pb.collect_moments returned")


def check_moments(model: nn.Module, network: nn.Module, given: Mapping[str, LayerMoments]) -> None:
    """Refuse moments of another network, of other weights, or where something else is computed with them.

    >>> import pattern_bench as pb
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1)).eval()
    >>> check_moments(model, model, {"moments": pb.collect_moments(model, [torch.ones(3, 2)])})

    Args:
        model: the network that is used.
        network: its canonical form, whose layers the moments name.
        given: moments by the argument that they were given as.

    Raises:
        UserError: naming argument and layer, where moments do not belong to the network, are of no patch, or are not
            finite.
    """
    now = weight_digests.digests(model) if any(moments.belongs_to for moments in given.values()) else {}
    modules = dict(network.named_modules())
    unchanged: list[Mapping[str, str]] = []  # responses that were compared: each comparison runs the network
    for argument, moments in given.items():
        for name, sums in moments.items():
            layer = modules.get(name)
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, Tensor) or sums.xg.shape != weight.flatten(1).shape:
                has = "is none" if weight is None else f"has a weight of shape {tuple(weight.shape)}"
                raise UserError(
                    f"{argument}: layer {name} {has} in {type(model).__name__}, and the moments are of "
                    f"{sums.xg.shape[0]} neurons with {sums.xg.shape[1]} inputs: give the network that they were "
                    "collected from"
                )
            if not sums.n:
                raise UserError(
                    f"{argument}: the moments of layer {name} are of no patch, since none of the images ran it: leave "
                    "it out (layers), or collect them over images that run it"
                )
            if not all(tensor.sum().isfinite() for tensor in sums.tensors().values()):
                raise UserError(f"{argument}: the moments of layer {name} hold NaN or Inf: collect them again")
        weights = weight_digests.difference(moments.belongs_to, now) if moments.belongs_to else None
        known = moments.responses in unchanged
        if what := weights or (None if known else responses.changed_response(moments.responses, model)):
            raise UserError(
                f"{argument}: {what} than when the moments were collected: collect them again, or give the network of "
                "then"
            )
        unchanged.append(moments.responses)
