"""The suite from Python: statistics, patterns, ρ, explanations and degradation of any network, in a few calls.

Everything is exported by ``pattern_bench`` itself: ``import pattern_bench as pb``.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from hashlib import sha256
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pattern_bench.core import estimators, weight_digests
from pattern_bench.core.canonical import canonical
from pattern_bench.core.collector import Collector
from pattern_bench.core.estimators import Estimator, Pattern
from pattern_bench.core.half_precision import images_for, is_wide, own_precision, wide, widened
from pattern_bench.core.layers import Scratch
from pattern_bench.core.memory import is_out_of_memory
from pattern_bench.core.moments import MEMORY, Moments
from pattern_bench.core.network import (
    collecting,
    layers_in_order,
    refuse_training,
    refuse_without_weights,
    select_layers,
)
from pattern_bench.core.outputs import Logits as Logits
from pattern_bench.core.outputs import as_logits
from pattern_bench.core.predictions import first_broken_layer, prediction_of, target_outputs
from pattern_bench.core.probe_closed_form import CLOSED_FORM, Probe, Target, rho
from pattern_bench.core.rounding import float32_products
from pattern_bench.core.snapshot import Snapshot
from pattern_bench.core.tensor_checks import unusable
from pattern_bench.errors import UserError, did_you_mean, told
from pattern_bench.methods import patterns as pattern_methods
from pattern_bench.methods.base import Method
from pattern_bench.metrics import degradation as core_degradation
from pattern_bench.storage.tensor_files import Damaged, read_tensors, write_tensors

RANDOM_ORDER = "random_order"
ESTIMATORS: dict[str, type[Estimator]] = {
    kind.name: kind for kind in vars(estimators).values()
    if isinstance(kind, type) and issubclass(kind, Estimator) and kind is not Estimator
}  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)
_canonical: WeakKeyDictionary[nn.Module, tuple[Snapshot, nn.Module]] = WeakKeyDictionary()


def _in_own_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Autocast and inference mode of the caller do not reach into ``function``, whose first argument is a model."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0] if args else kwargs.get("model")
        with own_precision(_device(model)):
            return function(*args, **kwargs)

    return inside


def _device(model: nn.Module) -> torch.device:
    """
    Raises:
        UserError: where ``model`` is no network.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model={told(model)} is no network: give a torch.nn.Module")
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def canonical_form(model: nn.Module, example: Tensor) -> nn.Module:
    """The network in canonical form (``core.canonical``), kept for networks whose every change can be noticed
    (``core.unchanged``) until one is, or the images have another shape."""
    refuse_training(model)
    example = images_for(model, example[:1])
    if (kept := _kept_form(model, example)) is not None:
        return kept
    network = canonical(model, example)
    if is_wide(model):
        with suppress(ValueError):
            _canonical[model] = Snapshot(model, example, network.state_dict()), network
    return network


def _kept_form(model: nn.Module, example: Tensor) -> nn.Module | None:
    """The canonical form that is kept and still the network's, for images of the shape of ``example``."""
    if model not in _canonical:
        return None
    remembered, network = _canonical[model]
    if remembered.example.shape[1:] == example.shape[1:] and remembered.matches(model):
        return network
    _canonical.pop(model, None)
    return None


def _whole(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """``value``, where it is a whole number between ``least`` and ``most``, both included.

    Raises:
        UserError: where it is none.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most:
        return int(value)
    to = f"of at least {least}" if most == 2**63 - 1 else f"from {least} to {most}"
    raise UserError(f"{name}={told(value)} is not possible: give a whole number {to}")


def _number(name: str, value: Any, least: float, most: float = 1e30) -> float:
    """``value``, where it is a number between ``least`` and ``most``, both included.

    Raises:
        UserError: where it is none.
    """
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else None
    if number is not None and least <= number <= most:
        return float(value)
    raise UserError(f"{name}={told(value)} is not possible: give a number from {least:g} to {most:g}")


def _seed(value: Any) -> int:
    return _whole("seed", value, -(2**63), 2**62)


def _check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """
    Raises:
        UserError: where ``value`` is none of ``choices``.
    """
    if not isinstance(value, str) or value not in choices:
        shown = told(value, quoted=False)
        raise UserError(f"{name}={shown} is unknown: choose from {', '.join(choices)}")


def _file_to_write(file: Any) -> Path:
    """The path of a file that is to be written, before any work is done for it.

    Raises:
        UserError: where it is no path, or of a folder, a device, or a file in a folder that is not there.
    """
    if not isinstance(file, str | Path) or not str(file).strip(".") or "\0" in str(file):
        raise UserError(f"file={told(file)} is not possible: give the path of the file to write")
    path = Path(file).expanduser()
    with _writing(file):
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"file={file} is {what}: give the path of the file to write")
        if not path.parent.is_dir():
            raise UserError(f"file={file} is in no folder that is there: make {path.parent}, or give another path")
    return path


@contextmanager
def _writing(file: str | Path) -> Iterator[None]:
    """
    Raises:
        UserError: where the disk refuses what is written within.
    """
    try:
        yield
    except OSError as error:
        free = "free space, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(
            f"file={file} cannot be written ({error.strerror or error}): {free}give another path"
        ) from error


def _check_moments_given(argument: str, moments: Any) -> None:
    """
    Raises:
        UserError: where ``moments`` are not of :func:`collect_moments`.
    """
    if not isinstance(moments, LayerMoments):
        raise UserError(f"{argument}={told(moments)} is no moments: give what pb.collect_moments returned")


def _check_methods(methods: Any) -> None:
    """
    Raises:
        UserError: where ``methods`` are not explanations by name.
    """
    if not isinstance(methods, Mapping):
        raise UserError(f"methods={told(methods)} is not possible: give explanations by name, as {{'mine': method}}")
    for name, method in methods.items():
        explains = getattr(method, "attribute", method)
        wanted: Any = ((None,), {"target": None}) if explains is not method else ((None, None, None), {})
        if not isinstance(name, str) or isinstance(method, type) or not _takes(explains, *wanted):
            shown = repr(name) if isinstance(name, str) else told(name)
            raise UserError(
                f"methods: {shown}={told(method)} is not possible: give, by a name, an object with "
                "attribute(inputs, target=...), or a function of model, inputs and targets"
            )
        if name == RANDOM_ORDER:
            raise UserError(f"methods: {name!r} is what the random order is called: give the method another name")


def _check_patterns(patterns: Any) -> None:
    """
    Raises:
        UserError: where ``patterns`` are not patterns by layer, or one of them has other parts than a pattern.
    """
    if not isinstance(patterns, Mapping) or not all(
        isinstance(name, str) and isinstance(pattern, Pattern) for name, pattern in patterns.items()
    ):
        raise UserError(f"patterns={told(patterns)} is no patterns by layer: give what pb.fit_patterns returned")
    for name, pattern in patterns.items():
        for part in (positive := pattern.positive, pattern.negative):
            if not isinstance(part, Tensor) or unusable(part) or not part.is_floating_point():
                what = f"{unusable(part) or part.dtype}" if isinstance(part, Tensor) else told(part)
                raise UserError(
                    f"patterns: that of layer {name} is {what}: give dense tensors of floating-point numbers, as "
                    "pb.fit_patterns does"
                )
            if part.shape != positive.shape:
                raise UserError(
                    f"patterns: that of layer {name} has parts of shape {tuple(positive.shape)} and "
                    f"{tuple(part.shape)}: give both in the shape of its weight"
                )
            if not wide(part).isfinite().all():
                raise UserError(f"patterns: that of layer {name} is not finite: fit it again on finite images")
        dead = pattern.dead
        if not isinstance(dead, Tensor) or dead.dtype != torch.bool or dead.shape != positive.shape[:1]:
            raise UserError(
                f"patterns: that of layer {name} does not tell which of its neurons are dead: give a bool for each, as "
                "pb.fit_patterns does"
            )


def _images(images: Any, where: str) -> Tensor:
    """
    Raises:
        UserError: where ``images`` are no tensor of a floating type.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise UserError(
            f"{where} {kind} where images should be: give batches of float tensors (B, C, ...), or tuples "
            "that start with one"
        )
    if what := unusable(images):
        raise UserError(f"{where} a {what} tensor where images should be: give dense ones, with values")
    if images.ndim < 2:
        raise UserError(f"{where} a tensor of shape {tuple(images.shape)}, which is no batch: give (B, C, ...)")
    return images.detach().clone() if images.is_inference() else images.detach()


def _not_finite(layer: str, where: str) -> UserError:
    return UserError(
        f"layer {layer}: NaN or Inf in its input or output, for {where}: mend the weights of the network or the images"
    )


def _cannot_take(model: nn.Module, images: Tensor, error: Exception) -> UserError:
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"model={type(model).__name__} cannot take images of shape {tuple(images.shape)} in {images.dtype} ({why}): "
        "give images of the size and channels that it is made for, and where it casts to half precision by itself a "
        "model in float32"
    )


_CANNOT = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What networks raise for images of a shape that they are not made for."""


class LayerMoments(dict[str, Moments]):
    """Moments by layer, one image that they were collected from (1, C, spatial...), and the weights that they belong to
    (``core.belonging``; none for moments of unknown origin)."""

    belongs_to: Mapping[str, str] = {}

    def __init__(
        self, moments: Mapping[str, Moments], example: Tensor, belongs_to: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(moments)
        self.example, self.belongs_to = example, dict(belongs_to or {})


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
    """Sums over all patches of each layer, in one pass (``core.collector``).

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
        UserError: where the loader yields no images, a layer does not exist, or the network is not supported.
    """
    device = _device(model)
    wanted: list[Any]
    try:
        wanted = ["all"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    except (TypeError, RuntimeError):  # numbers, and tensors that are none
        wanted = [layers]
    if not all(isinstance(name, str) for name in wanted):
        shown = ", ".join(map(told, wanted[:3]))
        raise UserError(f"layers=[{shown}] is not possible: give a name, a glob, or a list of them")
    if not isinstance(gram, bool):
        raise UserError(f"gram={told(gram)} is not possible: give True or False")
    memory = _whole("memory", memory, 1)
    positions = _number("positions", positions, 1e-6, 1)
    seed = _seed(seed)
    try:
        batches = iter(loader)
    except TypeError as error:
        raise UserError(
            f"loader={told(loader)} yields nothing: give a DataLoader, or a list of batches of images"
        ) from error
    network, collectors, seen = None, {}, 0
    for number, batch in enumerate(batches):
        first = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
        images = _images(first, "loader yields").to(device)
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
                images = images_for(network, images)
                with collecting(network, collectors):
                    network(images)
                ends = [*(collector.finite for collector in collectors.values()), images.isfinite().all()]
                finite = torch.stack(ends).tolist()
        except _CANNOT as error:
            if isinstance(error, UserError) or is_out_of_memory(error):
                raise
            raise _cannot_take(model, images, error) from error
        if not all(finite):
            where = f"batch {number} of loader (images {seen} to {seen + len(images) - 1})"
            raise _not_finite([*collectors, names[0]][finite.index(False)], where)
        seen += len(images)
    if network is None:
        raise UserError("loader yields no batch with images: give it some")
    return LayerMoments({name: collector.moments() for name, collector in collectors.items()}, example, belongs_to)


class Patterns(Mapping[str, Pattern]):
    """Patterns by layer name; each has ``positive`` and ``negative`` in the weight's shape and float64, and ``dead``
    (N,). ``belongs_to`` tells the weights that they were fitted on (``core.belonging``)."""

    def __init__(self, patterns: Mapping[str, Pattern], estimator: str, belongs_to: Mapping[str, str]) -> None:
        self._patterns, self.estimator, self.belongs_to = dict(patterns), estimator, dict(belongs_to)

    def __getitem__(self, layer: str) -> Pattern:
        return self._patterns[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    def save(self, file: str | Path) -> None:
        """Writes a safetensors file that :func:`load_patterns` reads.

        Raises:
            UserError: where ``file`` cannot be written.
        """
        path = _file_to_write(file)
        tensors = {
            f"{layer}/{part}": getattr(pattern, part).detach().cpu().contiguous()
            for layer, pattern in self.items()
            for part in ("positive", "negative", "dead")
        }
        with _writing(file):
            write_tensors(path, tensors, {"estimator": self.estimator, **weight_digests.metadata(self.belongs_to)})


@float32_products()
@_in_own_precision
def fit_patterns(
    model: nn.Module, moments: LayerMoments, estimator: str | Estimator = "a_plus_minus", *, seed: int = 0
) -> Patterns:
    """Patterns of every layer in ``moments`` (``core.estimators``).

    Args:
        model: the network that the moments were collected from.
        moments: from :func:`collect_moments`.
        estimator: a name (``random``, ``w``, ``a``, ``a_plus_minus``), or an estimator of your own.
        seed: for estimators that draw.

    Raises:
        UserError: where the estimator is unknown or has no patterns; naming the layer, where the moments belong to
            another network or to other weights.
    """
    if isinstance(estimator, str):
        if estimator not in ESTIMATORS:
            raise UserError(
                f"estimator={told(estimator, quoted=False)} is unknown: {did_you_mean(estimator, ESTIMATORS)}"
            )
        estimator = ESTIMATORS[estimator]()
    if not isinstance(estimator, Estimator):
        raise UserError(f"estimator={told(estimator)} is none: give {', '.join(ESTIMATORS)}, or an Estimator")
    if not estimator.has_pattern:
        raise UserError(f"estimator={estimator.name} has no patterns: {estimator.no_pattern_reason}")
    seed = _seed(seed)
    _check_moments_given("moments", moments)
    network, found = canonical_form(model, moments.example), {}
    _check_moments(model, network, {"moments": moments})
    for place, (name, sums) in enumerate(moments.items()):
        weight: Any = network.get_submodule(name).weight
        flat = weight.detach().flatten(1).double()
        pattern = estimator.fit(flat, sums, torch.Generator().manual_seed(seed + place))
        # In float64: what is left of x - a u, where u is large, is as small as a is exact.
        found[name] = Pattern(pattern.positive.view_as(weight), pattern.negative.view_as(weight), pattern.dead)
    belongs_to = moments.belongs_to or weight_digests.belongs_to(model, moments.example, moments)
    return Patterns(found, estimator.name, belongs_to)


def _check_moments(model: nn.Module, network: nn.Module, given: Mapping[str, LayerMoments]) -> None:
    """
    Raises:
        UserError: naming argument and layer, where moments do not belong to the model, whose canonical form is
            ``network``, or are not finite.
    """
    now = weight_digests.digests(model) if any(moments.belongs_to for moments in given.values()) else {}
    for argument, moments in given.items():
        for name, sums in moments.items():
            layer = dict(network.named_modules()).get(name)
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, Tensor) or sums.xg.shape != weight.flatten(1).shape:
                has = "is none" if weight is None else f"has a weight of shape {tuple(weight.shape)}"
                raise UserError(
                    f"{argument}: layer {name} {has} in {type(model).__name__}, and the moments are of "
                    f"{sums.xg.shape[0]} neurons with {sums.xg.shape[1]} inputs: give the network that they were "
                    "collected from"
                )
            if not all(tensor.sum().isfinite() for tensor in sums.tensors().values()):
                raise UserError(f"{argument}: the moments of layer {name} hold NaN or Inf: collect them again")
        if moments.belongs_to and (what := weight_digests.difference(moments.belongs_to, now)):
            raise UserError(
                f"{argument}: {what} than when the moments were collected: collect them again, or give the network of "
                "then"
            )


def load_patterns(file: str | Path, model: nn.Module) -> Patterns:
    """Patterns from a file of :meth:`Patterns.save`, or a run's ``patterns.safetensors``.

    Raises:
        UserError: where the file cannot be read, was damaged since it was written, or was not fitted on this network:
            naming the first layer that the network lacks, or that has another shape or other weights. Files of earlier
            versions tell less, and a warning says so.
    """
    _device(model)  # refuses what is no network
    if not isinstance(file, str | Path):
        raise UserError(f"file={told(file)} is not a file: give one that patterns were saved to")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"file={file} is not a file: give one that patterns were saved to")
    try:
        tensors, metadata = read_tensors(path, unsigned=True)
    except (Damaged, OSError) as error:
        raise UserError(
            f"file={file} is damaged or cannot be read as safetensors ({error}): save the patterns again"
        ) from error
    modules = dict(model.named_modules())
    found: dict[str, Pattern] = {}
    for name in dict.fromkeys(key.rpartition("/")[0] for key in tensors):
        positive, negative, dead = (tensors.get(f"{name}/{part}") for part in ("positive", "negative", "dead"))
        if positive is None or negative is None or dead is None:
            raise UserError(f"file={file} holds no whole pattern of layer {name}: save the patterns again")
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise UserError(
                f"file={file} has patterns of layer {name}, which {type(model).__name__} lacks: "
                f"{did_you_mean(name, [n for n, m in modules.items() if hasattr(m, 'weight')])}"
            )
        for part in (positive, negative):
            if part.shape != weight.shape:
                raise UserError(
                    f"file={file}: the pattern of layer {name} has shape {tuple(part.shape)} and its weight "
                    f"{tuple(weight.shape)}: give the network that the patterns were fitted on"
                )
            if part.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                raise UserError(f"file={file}: the pattern of layer {name} is {part.dtype}: save the patterns again")
            if not part.isfinite().all():
                raise UserError(f"file={file}: the pattern of layer {name} is not finite: save the patterns again")
        if dead.dtype != torch.bool or dead.shape != weight.shape[:1]:
            raise UserError(
                f"file={file} does not tell which neurons of layer {name} are dead: save the patterns again"
            )
        mark = metadata.get(f"weight/{name}")  # the raw bytes' digest, which earlier versions wrote
        if mark is not None and mark != sha256(_raw_bytes(weight)).hexdigest():
            raise _other(file, f"layer {name} has other weights")
        found[name] = Pattern(*(part.to(weight.device) for part in (positive, negative, dead)))
    if not found:
        raise UserError(f"file={file} holds no patterns: S_x, for one, has none")
    belongs_to = weight_digests.from_metadata(metadata)
    if not belongs_to:
        log.warning("%s does not tell all weights that its patterns were fitted on, so others may go unnoticed", file)
    elif what := weight_digests.difference(belongs_to, weight_digests.digests(model)):
        raise _other(file, what)
    return Patterns(found, metadata.get("estimator", "unknown"), belongs_to)


def _raw_bytes(weight: Tensor) -> bytes:
    return weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _other(file: str | Path, what: str) -> UserError:
    return UserError(
        f"file={file}: {what} than when its patterns were fitted: load the weights of then, or fit the patterns again"
    )


@float32_products()
@_in_own_precision
def evaluate(
    model: nn.Module,
    patterns: Mapping[str, Pattern],
    probe: LayerMoments,
    test: LayerMoments,
    criterion: str = "all",
    *,
    regularisation: float = 1e-4,
    memory: int = MEMORY,
) -> dict[str, Tensor]:
    """ρ(S) of every neuron, in closed form (``core.quality``).

    Args:
        model: the network that patterns and moments belong to.
        patterns: by layer.
        probe: moments with Gram matrices, of the images that v is fitted on.
        test: the same, of other images, that ρ is measured on.
        criterion: ``all`` or ``rectified``.
        regularisation: λ as a multiple of Σ's mean diagonal.
        memory: bytes for temporaries.

    Returns:
        By layer, one value per neuron (N,); NaN for dead neurons.

    Raises:
        UserError: where a layer's moments are missing, have no Gram matrix or belong to another network or other
            weights, or the criterion is another.
    """
    if not isinstance(criterion, str) or criterion not in CLOSED_FORM:
        shown = told(criterion, quoted=False)
        raise UserError(f"criterion={shown} is not measured here: give one of {', '.join(CLOSED_FORM)}")
    regularisation = _number("regularisation", regularisation, 0)
    memory = _whole("memory", memory, 1)
    _check_moments_given("probe", probe)
    _check_moments_given("test", test)
    _check_patterns(patterns)
    if not patterns:
        raise UserError("patterns has none: give what pb.fit_patterns returned")
    network, values = canonical_form(model, probe.example), {}
    _check_moments(model, network, {"probe": probe, "test": test})
    belongs_to = patterns.belongs_to if isinstance(patterns, Patterns) else {}
    if belongs_to and (what := weight_digests.difference(belongs_to, weight_digests.digests(model))):
        raise UserError(f"patterns: {what} than when they were fitted: fit them again, or give the network of then")
    for name, pattern in patterns.items():
        for setting, moments in (("probe", probe), ("test", test)):
            if name not in moments:
                raise UserError(f"{setting} has no moments of layer {name}: collect them with layers=None")
            if moments[name].gram is None:
                raise UserError(f"{setting} has no Gram matrix of layer {name}: collect it with gram=True")
        if pattern.positive.flatten(1).shape != probe[name].xg.shape:
            raise UserError(
                f"patterns: that of layer {name} has shape {tuple(pattern.positive.shape)}, and the layer "
                f"{probe[name].xg.shape[0]} neurons with {probe[name].xg.shape[1]} inputs: give this network's"
            )
        bias: Any = network.get_submodule(name).bias
        target = Target(criterion, None if bias is None else bias.detach().double())
        flat = Pattern(pattern.positive.flatten(1).double(), pattern.negative.flatten(1).double(), pattern.dead)
        try:
            direction = Probe(probe[name], regularisation, memory).direction(flat, target)
        except ValueError as error:
            raise UserError(f"layer {name}: {error}") from error
        values[name] = rho(direction, test[name], flat, target, memory).masked_fill(pattern.dead, torch.nan)
    return values


# --- explanations ---


class _OnAnyNetwork(Method):
    """A layer-wise method, on the canonical form of whatever network it is given."""

    method: ClassVar[Any]
    needs_patterns = True

    def __init__(self, model: nn.Module, patterns: Mapping[str, Pattern], last_layer: str = "positive") -> None:
        super().__init__(model)
        if patterns is None or (isinstance(patterns, Mapping) and not patterns):
            raise UserError(f"{self.name} needs patterns, and there are none: fit them with pb.fit_patterns")
        _check_patterns(patterns)
        self.patterns, self.last_layer = patterns, last_layer

    def _attribute(self, x: Tensor, target: Tensor | None) -> Tensor:
        network = _kept_form(self.model, x)
        if network is None:
            self._logits(x[:1])  # an input that does not fit is this method's to refuse, not the canonical form's
            network = canonical_form(self.model, x)
        return self.method(network, self.patterns, self.last_layer)._attribute(x, target)


class PatternNet(_OnAnyNetwork):
    """The signal in an image (``methods.patterns.PatternNet``), for networks in any form."""

    method, name, kind = pattern_methods.PatternNet, "pattern_net", "signal"


class PatternAttribution(_OnAnyNetwork):
    """The attribution of an answer (``methods.patterns.PatternAttribution``), for networks in any form."""

    method, name, kind = pattern_methods.PatternAttribution, "pattern_attribution", "attribution"


def _explained(name: str, explanation: Any, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """A heat map (B, C or 1, spatial...) from anything that explains: an object with ``attribute``, or a function.

    Raises:
        UserError: where it returns something else.
    """
    attribute = getattr(explanation, "attribute", None)
    with nullcontext() if isinstance(explanation, Method) else _as_before(model):
        given = images.clone(), target.clone()
        returned = attribute(given[0], target=given[1]) if attribute is not None else explanation(model, *given)
    wrong = f"methods: {name!r}: an explanation"
    try:
        found = torch.as_tensor(returned).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{wrong} is {told(returned)}: return one tensor or array, a value for each pixel") from error
    if what := unusable(found):
        raise UserError(f"{wrong} is a {what} tensor: return a dense one of real numbers, with values")
    found = (wide(found) if found.is_floating_point() else found.double()).to(images.device)
    if found.ndim == images.ndim - 1:  # one value per pixel
        found = found[:, None]
    rows, channels, *size = images.shape
    if found.ndim != images.ndim or tuple(found.shape) not in ((rows, 1, *size), (rows, channels, *size)):
        raise UserError(
            f"{wrong} has shape {tuple(found.shape)} and the images {tuple(images.shape)}: it must give one value per "
            "pixel, or per pixel and channel"
        )
    if not found.isfinite().all():
        raise UserError(f"{wrong} holds NaN or Inf: mend it, or choose another method")
    return found


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Within, explanations of the user's are made; modes, values and gradients that they change are put back."""
    modes = [(module, module.training) for module in model.modules()]
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    gradients = [(p, p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
            for parameter, requires_grad, gradient, its in gradients:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
                if gradient is not None and its is not None:
                    gradient.copy_(its)


def _takes(function: Any, arguments: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Whether a function can be called with these arguments; of some that are not Python's nobody knows."""
    if not callable(function):
        return False
    try:
        signature(function.forward if isinstance(function, nn.Module) else function).bind(*arguments, **named)
    except ValueError:
        return True
    except TypeError:
        return False
    return True


def _answers(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """The network that puts out logits, and those for the images, (B, K).

    Raises:
        UserError: where it cannot take the images, or has no row of logits for each; naming a layer, where images or
            outputs are NaN or infinite.
    """
    where = f"the batch of images 0 to {len(images) - 1}"
    refuse_without_weights(model)
    with torch.no_grad():
        try:
            if not images.isfinite().all():
                raise _not_finite(next(iter(layers_in_order(model, images.clone())), "none"), where)
            network = as_logits(model, images[:1].clone())
            logits: Tensor = network(images.clone())
            if logits.ndim != 2 or len(logits) != len(images):
                raise UserError(
                    f"model={type(model).__name__} makes outputs of shape {tuple(logits.shape)} from images of shape "
                    f"{tuple(images.shape)}: give a network with one row of outputs for each image"
                )
            if (layer := first_broken_layer(network, images.clone(), logits)) is not None:
                raise _not_finite(layer, where)
        except _CANNOT as error:
            if isinstance(error, UserError) or is_out_of_memory(error):
                raise
            raise _cannot_take(model, images, error) from error
    return network, logits


@float32_products()
@_in_own_precision
def degradation(
    model: nn.Module,
    images: Tensor,
    methods: Mapping[str, Any],
    target: Tensor | None = None,
    *,
    patch: int = 9,
    steps: int = 100,
    order: str = "most",
    replacement: str = "mean",
    value: float = 0.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Degradation curves (``core.degradation``) of any explanations, and of a random order.

    Args:
        model: the network, in evaluation mode.
        images: (B, C, spatial...): signals, images or volumes, of any floating type.
        methods: by name, objects with ``attribute(inputs, target=...)`` (this suite's, captum's), or functions
            ``explain(model, inputs, targets)`` that return a tensor or array (Quantus').
        target: outputs to explain, (B,) or one for all; the predicted classes for None.
        patch, steps, order, replacement, value: the protocol.
        seed: of the random order.

    Returns:
        By method, and ``random_order``: probabilities (``core.outputs``) of the target, (B, steps + 1).

    Raises:
        UserError: where a setting or a target is not possible; where the network is in training mode, or puts out what
            says not which its logits are; where images, outputs or explanations are not finite.
    """
    _check_methods(methods)
    value = _number("value", value, -1e30)
    seed = _whole("seed", seed, -(2**63))
    network, images = widened(model), _images(images, "images is")
    own, images = images_for(model, images), images_for(network, images)
    _check_choice("order", order, core_degradation.ORDERS)
    _check_choice("replacement", replacement, core_degradation.REPLACEMENTS)
    core_degradation.check_patches(images.shape[2:], patch, steps)
    network, logits = _answers(network, images)
    target = target_outputs(target, logits)
    grid, generator = core_degradation.grid_of(images.shape[2:], patch), torch.Generator().manual_seed(seed)
    ranks = {RANDOM_ORDER: core_degradation.random_patch_order(len(images), grid, generator).to(images.device)}
    for name, explanation in methods.items():
        heat = _explained(name, explanation, model, own, target)
        ranks[name] = core_degradation.patch_order(heat, patch, order)
    replaced_by = core_degradation.replacement(images, patch, replacement, value)
    with torch.no_grad():
        return {
            name: core_degradation.degradation_curve(network, images, rank, target, patch, steps, replaced_by)
            for name, rank in ranks.items()
        }


@float32_products()
@_in_own_precision
def draw_gallery(
    model: nn.Module, images: Tensor, methods: Mapping[str, Any], file: str | Path, target: Tensor | None = None
) -> None:
    """A picture with a row per image and a column per explanation (those of signals in colour), as PNG.

    The arguments are those of :func:`degradation`; ``file`` may be of another type that Matplotlib draws.

    Raises:
        UserError: as :func:`degradation`; where ``file`` cannot be written.
    """
    _check_methods(methods)
    path = _file_to_write(file)
    from pattern_bench.plotting.figures import draw_explanations, suffixes

    if path.suffix.lower() not in suffixes():
        raise UserError(f"file={file} has no suffix of a picture: give one of {', '.join(suffixes())}")

    network, images = widened(model), _images(images, "images is")
    own, images = images_for(model, images), images_for(network, images)
    network, logits = _answers(network, images)
    _, predicted, confidence = prediction_of(network, logits)
    target = target_outputs(target, logits)
    columns = {}
    for name, explanation in methods.items():
        title = f"signal, {name}" if getattr(explanation, "kind", "") == "signal" else name
        columns[title] = _explained(name, explanation, model, own, target).cpu()
    captions = [f"predicted {p} ({c:.0%})" for p, c in zip(predicted.tolist(), confidence.tolist(), strict=True)]
    with _writing(file):
        draw_explanations(images.cpu(), columns, captions, path)
