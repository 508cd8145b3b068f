"""Methods that go back layer by layer with another weight: PatternNet, PatternAttribution and two DTD rules.

Biases carry no relevance: what a layer's output owes to its bias goes nowhere. ReLU gates, pooling switches and
every other operation (sums, concatenation, average pools, batch norms that could not be folded) keep their own
gradient.

In the examples below the second hidden neuron is silent: the image (3, 1) makes (2, -1) of the first layer's weights,
and the output 2·2 - 0 of the second's.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin

from pattern_bench.core.backward import own_weight_in_output_layers, replaced_weights
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.half_precision import wide
from pattern_bench.core.layers import LAYER_TYPES
from pattern_bench.errors import UserError, did_you_mean
from pattern_bench.methods.base import Method

_UNSUPPORTED = (
    _ConvTransposeNd, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase,
    LazyModuleMixin,
)  # fmt: skip
"""Modules whose learned weights sum inputs, so that there is something to replace, and which have no patterns."""


HEADROOM = 90
"""Where what is propagated outgrows float32 (it grows with every layer, by 10^22 in SqueezeNet and more in ResNets),
the way back starts again so many powers of two below 1, which is undone without rounding. Not at once: what does not
grow would sink to numbers that processors are twenty times slower with."""


class _Layerwise(Method):
    """Back-propagates with another weight in every Conv and Linear layer.

    Raises:
        UserError: where the model has a module with weights that are not replaced, or that computes its weight.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.layers: dict[str, Any] = {}
        for name, module in model.named_modules():
            where = f"{self.name}: module {name or 'at the root'} ({type(module).__name__}) of {type(model).__name__}"
            if isinstance(module, _UNSUPPORTED):
                raise UserError(
                    f"{where} multiplies by learned weights and is none of Conv1d, Conv2d, Conv3d and Linear: rewrite "
                    "it with these, or choose another network or method"
                )
            if isinstance(module, LAYER_TYPES):
                if "weight" not in module._parameters:
                    raise UserError(
                        f"{where} computes its weight: bring the network into canonical form first "
                        "(pattern_bench.core.canonical)"
                    )
                self.layers[name] = module
        self.weights: dict[str, Tensor | None] = {}
        self.conserving = False

    def _own_weights(self) -> dict[str, Tensor]:
        """The layers' weights as they are now."""
        layers: dict[str, Any] = {name: self.model.get_submodule(name) for name in self.layers}
        return {name: layer.weight.detach() for name, layer in layers.items()}

    def _back(self, x: Tensor, target: Tensor | None, *, from_output: bool, last_layer: str = "positive") -> Tensor:
        """Goes back from the target's output, or from 1, to the input."""
        weights = {name: None if weight is None else weight.to(x.device) for name, weight in self.weights.items()}
        x.requires_grad_()

        def along(image: Tensor) -> Tensor:
            return image.view(-1, *[1] * (x.ndim - 1))

        def back(headroom: int) -> tuple[Tensor, Tensor]:
            """What is propagated, and the power of two that it is too small by for each image."""
            with replaced_weights(self.model, weights, self.conserving):
                output = self._output(x, target)
                if last_layer == "weight":
                    own_weight_in_output_layers(output)
                if not from_output:
                    return self._gradient(output, x), torch.zeros(len(x), dtype=torch.int32, device=x.device)
                mantissa, exponent = torch.frexp(output.detach())
                start = torch.ldexp(mantissa, torch.tensor(-headroom))
                return self._gradient(output, x, start), exponent + headroom

        result, smaller = back(0)
        outgrown = ~result.flatten(1).isfinite().all(1)
        if from_output and outgrown.any():
            lower, lower_by = back(HEADROOM)
            result, smaller = torch.where(along(outgrown), lower, result), torch.where(outgrown, lower_by, smaller)
        whole = torch.ldexp(result, along(smaller))
        fits = whole.flatten(1).isfinite().all(1)
        return torch.where(along(fits), whole, result)


class _PatternMethod(_Layerwise):
    needs_patterns = True

    def __init__(
        self, model: nn.Module, patterns: Mapping[str, Pattern] | None = None, last_layer: str = "positive"
    ) -> None:
        super().__init__(model)
        possible = isinstance(last_layer, str) and last_layer in ("positive", "weight")
        self._check_setting("last_layer", last_layer, possible, "positive or weight")
        self.last_layer = last_layer
        if not patterns:
            raise UserError(f"{self.name} needs patterns, and there are none: fit an estimator that has them first")
        for name in patterns:
            if name not in self.layers:
                raise UserError(
                    f"{self.name}: the patterns' layer {name} is no layer of the network: "
                    f"{did_you_mean(name, self.layers)}"
                )
        for name, layer in self.layers.items():
            # A layer that never runs, such as an auxiliary head, needs no pattern: None is an error once it does.
            pattern = patterns.get(name)
            weight = wide(layer.weight.detach())
            self.weights[name] = None if pattern is None else self._replacement(name, weight, pattern)

    def _replacement(self, name: str, weight: Tensor, pattern: Pattern) -> Tensor:
        positive = pattern.positive
        if tuple(positive.shape) not in (tuple(weight.shape), tuple(weight.flatten(1).shape)):
            raise UserError(
                f"{self.name}: the pattern of layer {name} has shape {tuple(positive.shape)} and its weight "
                f"{tuple(weight.shape)}: give patterns fitted on this network"
            )
        if not positive.isfinite().all():
            raise UserError(f"{self.name}: the pattern of layer {name} is not finite: fit it again on finite images")
        return self.backward_weight(weight, positive.to(weight).view_as(weight))

    @staticmethod
    def backward_weight(weight: Tensor, pattern: Tensor) -> Tensor:
        """Return what is propagated in the place of ``weight``; all three have its shape."""
        raise NotImplementedError

    def _attribute(self, x: Tensor, target: Tensor | None) -> Tensor:
        result = self._back(x, target, from_output=True, last_layer=self.last_layer)
        silent = result.flatten(1).abs().amax(1) == 0
        if self.last_layer == "positive" and silent.any():
            own = self._back(x.detach().clone(), target, from_output=True, last_layer="weight")
            if bool(own[silent].any()):
                warnings.warn(
                    f"{self.name}: the output that is explained never fired where patterns were fitted, so it has no "
                    "pattern: its own weight is propagated instead (last_layer=weight)",
                    stacklevel=2,
                )
                result = torch.where(silent.view(-1, *[1] * (x.ndim - 1)), own, result)
        return result if result.isfinite().all() or x.dtype == torch.float64 else self._in_float64(x.detach(), target)

    def _in_float64(self, x: Tensor, target: Tensor | None) -> Tensor:
        """The explanation where the network's own precision does not hold what is propagated on the way; smaller by a
        power of two where it does not hold the result either."""
        exact = copy.copy(self)
        exact.model = copy.deepcopy(self.model).double()
        exact.weights = {name: None if weight is None else weight.double() for name, weight in self.weights.items()}
        result = exact._back(x.double(), target, from_output=True, last_layer=self.last_layer)
        beyond = (result.flatten(1).abs().amax(1).log2() - math.log2(torch.finfo(x.dtype).max)).ceil().clamp(min=0)
        return (result * torch.exp2(-beyond).view(-1, *[1] * (x.ndim - 1))).to(x)


class PatternNet(_PatternMethod):
    """The signal: what the network saw in the input that made it answer so (Kindermans et al. 2018, section 4).

    Goes back from the target's output y as the gradient does, with the pattern a₊ in the place of each weight. Where
    that outgrows the data type for an image, its explanation is some power of two smaller: the direction is left, and
    that is all that pictures, ranks and correlations ask for. An output that never fired where patterns were fitted
    has no pattern: its own weight is propagated instead, and a warning says so.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    >>> _ = model[2].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> a = torch.tensor([[1.0, 0.0], [0.0, 0.5]]), torch.tensor([[0.5, 0.0]])
    >>> patterns = {name: Pattern(p, p, torch.zeros(len(p), dtype=torch.bool)) for name, p in zip("02", a)}
    >>> PatternNet(model, patterns).attribute(torch.tensor([[3.0, 1.0]]), target=0)  # 4 times 0.5 times (1, 0)
    tensor([[2., 0.]])

    Args:
        model: as for every method.
        patterns: of any estimator, by layer, each in its weight's shape or (N, D); of every layer that runs. They
            belong to the weights that the model has now.
        last_layer: what the output layer propagates: ``positive``, a₊ as every other layer, or its ``weight``.

    Raises:
        UserError: where patterns are missing, not finite, or of another network.
    """

    name = "pattern_net"
    label = "PatternNet"
    panel = "signal"
    place = 1
    line = "dash-dotted"
    kind = "signal"

    @staticmethod
    def backward_weight(weight: Tensor, pattern: Tensor) -> Tensor:
        return pattern


class PatternAttribution(_PatternMethod):
    """The attribution: how much each input value's signal contributed to the answer (Kindermans et al. 2018,
    section 4).

    As :class:`PatternNet`, with w ⊙ a₊ in the place of each weight: deep Taylor decomposition whose root point is the
    distractor. The arguments and errors are those of PatternNet; ``last_layer=weight`` propagates w there.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    >>> _ = model[2].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> a = torch.tensor([[1.0, 0.0], [0.0, 0.5]]), torch.tensor([[0.5, 0.0]])
    >>> patterns = {name: Pattern(p, p, torch.zeros(len(p), dtype=torch.bool)) for name, p in zip("02", a)}
    >>> PatternAttribution(model, patterns).attribute(torch.tensor([[3.0, 1.0]]), target=0)  # 4 times 1 times (1, 0)
    tensor([[4., 0.]])
    """

    name = "pattern_attribution"
    label = "PatternAttribution"
    panel = "attribution"
    place = 2
    without_patterns = "lrp_z"
    kind = "attribution"

    @staticmethod
    def backward_weight(weight: Tensor, pattern: Tensor) -> Tensor:
        return weight * pattern


class DtdW2(_Layerwise):
    """The w²-rule of deep Taylor decomposition in every layer (Montavon et al. 2017, section 4.1).

    Goes back from the target's output y: each neuron's relevance is shared among its inputs in proportion to w².
    Padding zeros are no inputs: at the border the shares are of the sum of w² over the taps that lie inside the image,
    so that Conv and Linear layers pass on exactly what they get. A neuron without weights there passes nothing on.

    Where nothing is padded with zeros, this is PatternAttribution with S_w's patterns w / wᵀw, whose shares are of all
    of ‖w‖²; where something is, that loses what falls on the padding. Open ReLUs, max pools and average pools over the
    image alone pass on all relevance too; closed ReLUs pass none, and a sum of two branches hands all of it to both.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    >>> _ = model[2].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> DtdW2(model).attribute(torch.tensor([[3.0, 1.0]]), target=0)  # 4 times 4/5, halved between (1, -1)
    tensor([[1.6000, 1.6000]])
    """

    name = "dtd_w2"
    label = "w²-rule"
    place = 4
    kind = "attribution"
    no_curve_reason = "it is the curve of the estimator w, but for what falls on padding"

    def _attribute(self, x: Tensor, target: Tensor | None) -> Tensor:
        self.conserving = True
        self.weights = {name: _w2(weight) for name, weight in self._own_weights().items()}
        return self._back(x, target, from_output=True)


def _w2(weight: Tensor) -> Tensor:
    """w² of each neuron in units of its largest, lest the squares of small weights vanish."""
    largest = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1))
    return (weight / largest.where(largest > 0, 1.0)).square()


class LrpZ(_Layerwise):
    """The z-rule of layer-wise relevance propagation in every layer (Bach et al. 2015, Eq. 56).

    A neuron with output y and relevance R gives its input i the share x_i w_i R / y. With the relevance per unit of
    activation, c = R / x, that is c_i = Σ w_i c over the neurons whose ReLU is open: one pass back with each layer's
    own weight, and one product with the input at the end, without a division by a small y (Shrikumar et al. 2016).
    So the rule equals input × gradient in networks of ReLUs, max pools and linear operations. The share of a bias b,
    b R / y, goes nowhere: without biases the relevance sums to the output, otherwise to the output less what the
    biases contributed. Other operations keep their own gradient, so the sum is not conserved through a smooth
    activation.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    >>> _ = model[2].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> LrpZ(model).attribute(torch.tensor([[3.0, 1.0]]), target=0)  # of the output 4
    tensor([[ 6., -2.]])
    """

    name = "lrp_z"
    label = "LRP z-rule"
    panel = "input × gradient"
    place = 3
    kind = "attribution"
    no_curve_reason = "it is the curve of the estimator x"

    def _attribute(self, x: Tensor, target: Tensor | None) -> Tensor:
        self.weights = {**self._own_weights()}
        return self._back(x, target, from_output=False) * x.detach()
