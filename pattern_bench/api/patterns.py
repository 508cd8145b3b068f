"""Patterns of a network's layers: fitted, saved and loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.api.arguments import file_to_write, seed_of, writing
from pattern_bench.api.moments import LayerMoments, check_moments, check_moments_given
from pattern_bench.api.networks import canonical_form, device_of, in_own_precision
from pattern_bench.core import estimators, responses, weight_digests
from pattern_bench.core.estimators import Estimator, Pattern
from pattern_bench.core.network import refuse_without_weights
from pattern_bench.core.rounding import float32_products
from pattern_bench.errors import UserError, did_you_mean, told
from pattern_bench.storage.tensor_files import Damaged, read_tensors, write_tensors

ESTIMATORS: dict[str, type[Estimator]] = estimators.by_name()
log = logging.getLogger(__name__)


class Patterns(Mapping[str, Pattern]):
    """Patterns by layer name; each has ``positive`` and ``negative`` in the weight's shape and float64, and ``dead``
    (N,).

    Args:
        patterns: by layer name.
        estimator: the name of the one that fitted them.
        belongs_to: digests of the weights that they were fitted on (``core.weight_digests``).
        responses: what the layers took in and put out for one image of noise (``core.responses``).

    >>> pattern = Pattern(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([False]))
    >>> patterns = Patterns({"0": pattern}, "mine", {})
    >>> list(patterns), patterns.estimator
    (['0'], 'mine')
    """

    responses: Mapping[str, str] = {}

    def __init__(
        self,
        patterns: Mapping[str, Pattern],
        estimator: str,
        belongs_to: Mapping[str, str],
        responses: Mapping[str, str] | None = None,
    ) -> None:
        self._patterns, self.estimator = dict(patterns), estimator
        self.belongs_to, self.responses = dict(belongs_to), dict(responses or {})

    def __getitem__(self, layer: str) -> Pattern:
        return self._patterns[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    def save(self, file: str | Path) -> None:
        """Write a safetensors file that :func:`load_patterns` reads.

        Raises:
            UserError: where ``file`` cannot be written.
        """
        path = file_to_write(file)
        tensors = {
            f"{layer}/{part}": getattr(pattern, part).detach().cpu().contiguous()
            for layer, pattern in self.items()
            for part in ("positive", "negative", "dead")
        }
        about = weight_digests.metadata(self.belongs_to) | responses.metadata(self.responses)
        with writing(file):
            write_tensors(path, tensors, {"estimator": self.estimator, **about})


def changed(patterns: Patterns, model: nn.Module) -> str | None:
    """Return in words how a network differs from the one that patterns were fitted on, as far as they tell; or None.

    >>> changed(Patterns({}, "mine", {}), nn.ReLU()) is None
    True
    """
    weights = None
    if patterns.belongs_to:
        weights = weight_digests.difference(patterns.belongs_to, weight_digests.digests(model))
    return weights or responses.changed_response(patterns.responses, model)


@float32_products()
@in_own_precision
def fit_patterns(
    model: nn.Module, moments: LayerMoments, estimator: str | Estimator = "a_plus_minus", *, seed: int = 0
) -> Patterns:
    """Fit patterns of every layer in ``moments`` (``core.estimators``).

    The filter (1, -1) below answers y, and cancels the distractor e of x = (y + e, e): the signal lies along (1, 0).

    >>> import pattern_bench as pb
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    >>> images = torch.tensor([[2.0, 1.0], [0.0, -1.0], [0.0, 1.0], [-2.0, -1.0]])
    >>> moments = pb.collect_moments(model, [images], gram=False)
    >>> pb.fit_patterns(model, moments, "a")["0"].positive
    tensor([[1., 0.]], dtype=torch.float64)
    >>> pb.fit_patterns(model, moments, "w")["0"].positive
    tensor([[ 0.5000, -0.5000]], dtype=torch.float64)

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
    seed = seed_of(seed)
    check_moments_given("moments", moments)
    network, patterns = canonical_form(model, moments.example), {}
    check_moments(model, network, {"moments": moments})
    for place, (name, sums) in enumerate(moments.items()):
        weight: Any = network.get_submodule(name).weight
        flat = weight.detach().flatten(1).double()
        pattern = estimator.fit(flat, sums, torch.Generator().manual_seed(seed + place))
        # In float64: what is left of x - a u, where u is large, is as small as a is exact.
        patterns[name] = Pattern(pattern.positive.view_as(weight), pattern.negative.view_as(weight), pattern.dead)
    belongs_to = moments.belongs_to or weight_digests.belongs_to(model, moments.example, moments)
    answers = moments.responses or responses.responses(model, moments.example.shape[1:], moments)
    return Patterns(patterns, estimator.name, belongs_to, answers)


def load_patterns(file: str | Path, model: nn.Module) -> Patterns:
    """Read patterns from a file of :meth:`Patterns.save`, or a run's ``patterns.safetensors``.

    >>> import tempfile
    >>> import pattern_bench as pb
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1)).eval()
    >>> patterns = pb.fit_patterns(model, pb.collect_moments(model, [torch.eye(2)]), "w")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     patterns.save(f"{folder}/w.safetensors")
    ...     loaded = pb.load_patterns(f"{folder}/w.safetensors", model)
    >>> loaded.estimator, torch.equal(loaded["0"].positive, patterns["0"].positive)
    ('w', True)

    Args:
        file: safetensors.
        model: the network that they were fitted on; the patterns come to the device of its weights.

    Raises:
        UserError: where the file cannot be read, was damaged since it was written, or was not fitted on this network:
            naming the first layer that the network lacks, or that has another shape or other weights. Files of earlier
            versions tell less, and a warning says so.
    """
    device_of(model)  # refuses what is no network
    refuse_without_weights(model)
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
    patterns: dict[str, Pattern] = {}
    for name in dict.fromkeys(key.rpartition("/")[0] for key in tensors):
        patterns[name] = _pattern(file, name, tensors, metadata, model)
    if not patterns:
        raise UserError(f"file={file} holds no patterns: S_x, for one, has none")
    belongs_to, answers = weight_digests.from_metadata(metadata), responses.from_metadata(metadata)
    if not belongs_to:
        log.warning("%s does not tell all weights that its patterns were fitted on, so others may go unnoticed", file)
    loaded = Patterns(patterns, metadata.get("estimator", "unknown"), belongs_to, answers)
    if what := changed(loaded, model):
        raise _other(file, what)
    return loaded


def _pattern(
    file: str | Path, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: nn.Module
) -> Pattern:
    """
    Raises:
        UserError: where the file's pattern of the layer ``name`` is not one of ``model``'s.
    """
    positive, negative, dead = (tensors.get(f"{name}/{part}") for part in ("positive", "negative", "dead"))
    if positive is None or negative is None or dead is None:
        raise UserError(f"file={file} holds no whole pattern of layer {name}: save the patterns again")
    modules = dict(model.named_modules())
    weight = getattr(modules.get(name), "weight", None)
    if not isinstance(weight, Tensor):
        layers = [n for n, m in modules.items() if hasattr(m, "weight")]
        raise UserError(
            f"file={file} has patterns of layer {name}, which {type(model).__name__} lacks: "
            f"{did_you_mean(name, layers) if layers else 'give the network that they were fitted on'}"
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
        raise UserError(f"file={file} does not tell which neurons of layer {name} are dead: save the patterns again")
    mark = metadata.get(f"weight/{name}")  # the raw bytes' digest, which earlier versions wrote
    if mark is not None and mark != sha256(_raw_bytes(weight)).hexdigest():
        raise _other(file, f"layer {name} has other weights")
    return Pattern(*(part.to(weight.device) for part in (positive, negative, dead)))


def _raw_bytes(weight: Tensor) -> bytes:
    return weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _other(file: str | Path, what: str) -> UserError:
    return UserError(
        f"file={file}: {what} than when its patterns were fitted: load the weights of then, or fit the patterns again"
    )
