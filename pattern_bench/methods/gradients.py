"""The gradient, and the baselines that are made of gradients.

DeConvNet and Guided BackProp are the suite's own: captum and zennit change the gradient of ReLU modules only, and
silently leave a ReLU that is a function as it is; where a ReLU's input has another reader, as in residual networks,
captum changes that one's gradient too. On plain networks of ReLU modules all three agree. Integrated Gradients and
SmoothGrad are captum's.

In the examples below the second hidden neuron is silent: the image (3, 1) makes (2, -1) of the first layer's weights,
and 2·2 - 0 of the second's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from captum.attr import NoiseTunnel, Saliency
from torch import Tensor, nn

from pattern_bench.core.backward import Rectifiers
from pattern_bench.methods.base import Method


class Gradient(Method):
    """The gradient of the target's output with respect to the input (Simonyan et al. 2014).

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    >>> _ = model[2].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> Gradient(model).attribute(torch.tensor([[3.0, 1.0]]), target=0)
    tensor([[ 2., -2.]])
    """

    name = "gradient"
    place = 5
    kind = "function"

    def _attribute(self, x: Tensor, target: Tensor | None) -> Tensor:
        x.requires_grad_()
        return self._gradient(self._output(x, target), x)


class _Rectified(Gradient):
    gated: bool

    def _attribute(self, x: Tensor, target: Tensor | None) -> Tensor:
        with Rectifiers(self.gated, self.name):
            return super()._attribute(x, target)


class DeConvNet(_Rectified):
    """The gradient with a ReLU on the way back in the place of each ReLU's gate (Zeiler and Fergus 2014).

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    >>> _ = model[2].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> DeConvNet(model).attribute(torch.tensor([[1.0, 3.0]]), target=0)  # whichever neurons are silent
    tensor([[ 2., -2.]])

    Raises:
        UserError: where the network rectifies with another function than ReLU or ReLU6.
    """

    name = "deconvnet"
    label = "DeConvNet"
    place = 6
    kind = "signal"
    gated = False


class GuidedBackProp(_Rectified):
    """The gradient, of which only positive values pass back through each ReLU's gate (Springenberg et al. 2015).

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    >>> _ = model[2].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> GuidedBackProp(model).attribute(torch.tensor([[3.0, 1.0], [3.0, 2.5]]), target=0)
    tensor([[ 2., -2.],
            [ 2., -2.]])
    >>> Gradient(model).attribute(torch.tensor([[3.0, 2.5]]), target=0)  # of both neurons
    tensor([[ 3., -4.]])

    Raises:
        UserError: where the network rectifies with another function than ReLU or ReLU6.
    """

    name = "guided_backprop"
    label = "Guided BackProp"
    place = 7
    kind = "signal"
    gated = True


class IntegratedGradients(Method):
    """(x - baseline) ⊙ the gradient's mean on the line between them (Sundararajan et al. 2017), by Gauss-Legendre.

    Its sum is the output's change from the baseline to x, up to the error of the quadrature.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    >>> _ = model[2].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> IntegratedGradients(model, steps=4).attribute(torch.tensor([[3.0, 1.0]]), target=0).round(decimals=4)
    tensor([[ 6., -2.]])

    Args:
        model: as for every method.
        steps: points on the line.
        baseline: the value of every pixel of the image without information, in the network's (normalised) input.
        batch_size: images in a forward pass; at least as many as there are inputs.

    Raises:
        UserError: where a setting is not possible.
    """

    name = "integrated_gradients"
    label = "Integrated Gradients"
    place = 8
    passes = "tens"
    kind = "attribution"

    def __init__(self, model: nn.Module, steps: int = 50, baseline: float = 0.0, batch_size: int = 16) -> None:
        super().__init__(model)
        self._check_whole("steps", steps)
        self._check_whole("batch_size", batch_size)
        self._check_setting("baseline", baseline, isinstance(baseline, int | float), "a number")
        self.steps, self.baseline, self.batch_size = steps, float(baseline), batch_size

    def _attribute(self, x: Tensor, target: Tensor | None) -> Tensor:
        return CaptumIntegratedGradients(self._logits).attribute(
            x,
            baselines=self.baseline,
            target=self._resolved(x, target),
            n_steps=self.steps,
            internal_batch_size=max(self.batch_size, len(x)),
        )


class SmoothGrad(Method):
    """The gradient's mean over noisy copies of the image (Smilkov et al. 2017).

    Every image gets the same noise, whatever the others in its batch.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    >>> _ = model[2].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> SmoothGrad(model, samples=4, noise=0.1).attribute(torch.tensor([[3.0, 1.0]]), target=0)  # no gate is turned
    tensor([[ 2., -2.]])

    Args:
        model: as for every method.
        samples: noisy copies of each image.
        noise: the noise's standard deviation, as a share of the image's range of values.
        seed: of the noise; the same seed gives the same result, for the same batch size on the same device.
        batch_size: noisy copies in a forward pass.

    Raises:
        UserError: where a setting is not possible.
    """

    name = "smoothgrad"
    label = "SmoothGrad"
    place = 9
    passes = "tens"
    kind = "attribution"

    def __init__(
        self, model: nn.Module, samples: int = 50, noise: float = 0.15, seed: int = 0, batch_size: int = 16
    ) -> None:
        super().__init__(model)
        for setting, value in (("samples", samples), ("batch_size", batch_size)):
            self._check_whole(setting, value)
        self._check_whole("seed", seed, 0)
        possible = isinstance(noise, int | float) and 0 <= noise < float("inf")
        self._check_setting("noise", noise, possible, "a number of at least 0")
        self.samples, self.noise, self.seed, self.batch_size = samples, float(noise), seed, batch_size

    def _attribute(self, x: Tensor, target: Tensor | None) -> Tensor:
        target = self._resolved(x, target)
        tunnel = NoiseTunnel(Saliency(self._logits))
        maps = []
        for image, output in zip(x.split(1), target.split(1), strict=True):
            with _seeded(self.seed, x.device):
                maps.append(
                    tunnel.attribute(
                        image,
                        nt_samples=self.samples,
                        nt_samples_batch_size=self.batch_size,
                        stdevs=self.noise * float(image.max() - image.min()),
                        target=output,
                        abs=False,
                    )
                )
        return torch.cat(maps)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within, the generators that captum draws from start at ``seed``; afterwards they go on where they were."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
