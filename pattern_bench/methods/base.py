"""What all explanation methods have in common: one signature, and one place where what they are given is checked."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from pattern_bench.core.batch_independence import refuse_batch_dependence_once
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.half_precision import images_for, own_precision, wide, widened
from pattern_bench.core.memory import is_out_of_memory
from pattern_bench.core.network import in_training, refuse_without_weights
from pattern_bench.core.predictions import target_outputs, target_per_image
from pattern_bench.core.rounding import float32_products
from pattern_bench.core.tensor_checks import unusable
from pattern_bench.errors import UserError, told


class Method:
    """Base of the explanation methods.

    A method explains one output of a network, before the softmax: the target's. ``kind`` tells what its answer means
    (Kindermans et al. 2018, section 3): ``function`` (how the output reacts), ``signal`` (what in the input the
    network detected) or ``attribution`` (how much each input value contributed).

    A new method is a class with the attributes below and ``_attribute``, and a YAML file (``methods/README.md``).

    >>> class Sensitivity(Method):
    ...     name = "sensitivity"
    ...     place = 12
    ...     kind = "function"
    ...
    ...     def _attribute(self, x, target):
    ...         x.requires_grad_()
    ...         return self._gradient(self._output(x, target), x) ** 2
    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, -1.0]]))
    >>> Sensitivity(model).attribute(torch.ones(1, 2), target=0)
    tensor([[9., 1.]])

    Args:
        model: the network, in evaluation mode; what layer-wise methods need, it is to be in canonical form
            (``pattern_bench.core.canonical``). It is never changed.

    Raises:
        UserError: where the model is no module, or compiled by TorchScript.
    """

    name: ClassVar[str]
    """In settings and in the files of runs."""
    label: ClassVar[str]
    """In tables and legends; the ``name`` unless a class says otherwise."""
    panel: ClassVar[str]
    """Above its picture in ``explanations.png``. One that starts with ``signal`` is drawn in colour. The ``name``,
    after ``signal, `` where it shows one, unless a class says otherwise."""
    place: ClassVar[int] = 99
    """In tables and legends: lower stands first, equal ones by name."""
    line: ClassVar[str] = "solid"
    """How its curves are drawn where it uses patterns, in the colour of their estimator: a key of
    ``plotting.styles.LINES``."""
    kind: ClassVar[str]
    """``function``, ``signal`` or ``attribution``: what the explanation shows."""
    needs_patterns: ClassVar[bool] = False
    """Whether its ``__init__`` takes ``patterns``, by layer."""
    without_patterns: ClassVar[str] = ""
    """Name of the method that takes its place under an estimator without patterns, S_x; none: it is refused there."""
    takes_reference: ClassVar[bool] = False
    """Whether its ``__init__`` takes ``reference``, (R, ...) other images."""
    passes: ClassVar[Literal["one", "tens", "hundreds"]] = "one"
    """How often it runs the network for an image: ``one`` pass, or a few, forward and back; ``tens``, of copies of the
    image; ``hundreds``, of which a window each is changed. The sanity checks leave out all but ``one`` unless they are
    named, the gallery and the sweep of curves ``hundreds``."""
    many_passes: ClassVar[bool] = False
    """Whether an image takes so long that images are explained, and kept, one at a time; so it is where ``passes`` is
    not ``one``."""
    no_curve_reason: ClassVar[str] = ""
    """Why it is left out of the sweep of degradation curves (``sweep=fig4a``) though ``passes`` would let it in."""

    def __init_subclass__(cls, **options: Any) -> None:
        # Labels are not inherited: a class that extends another one is not that one.
        super().__init_subclass__(**options)
        if hasattr(cls, "name"):
            if "label" not in vars(cls):
                cls.label = cls.name
            if "panel" not in vars(cls):
                cls.panel = f"signal, {cls.name}" if getattr(cls, "kind", "") == "signal" else cls.name
        if "passes" in vars(cls) and "many_passes" not in vars(cls):
            cls.many_passes = cls.passes != "one"

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(f"{self.name}: model is a {type(model).__name__}: give a torch.nn.Module")
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise UserError(
                f"{self.name}: {type(model).__name__} is compiled by TorchScript, which hides its layers: give the "
                "Python module it was made from"
            )
        self.model = model

    def attribute(self, inputs: Tensor, target: Tensor | int | None = None) -> Tensor:
        """Explain one output for each image.

        Works the same inside ``torch.no_grad`` and ``torch.inference_mode``, and computes in the network's own
        precision inside ``torch.autocast``. A network in half precision is explained as a copy in float32, in which
        the explanation comes. The result is not differentiable: where ``inputs`` require a gradient, asking for it
        raises a UserError.

        Args:
            inputs: (B, ...), in the network's precision; half precision is as good as float32.
            target: the class to explain, (B,) integers or one for all; None for the predicted one.

        Returns:
            One value per input value, in the shape of ``inputs``; float64 where the network and ``inputs`` are,
            otherwise float32.

        Raises:
            UserError: where the network is in training mode, or cannot take the inputs; where its output for an image
                is random or depends on the other images; where the inputs hold a NaN or an infinite value; where the
                target is out of range; where the result is not finite.
        """
        self._check_model()
        self._check_inputs(inputs)
        with float32_products(), own_precision(inputs.device), torch.enable_grad():
            method = self._on(widened(self.model))
            x = images_for(method.model, inputs.detach().clone())
            refuse_batch_dependence_once(self.model, method.model, x, type(self.model).__name__)
            result = method._attribute(x, self._classes(inputs, target)).detach()
        if not result.isfinite().all():
            raise UserError(
                f"{self.name}: the explanation is not finite, beyond what {result.dtype} holds: give model.double() "
                "and inputs.double(), or other patterns where the method has them"
            )
        if inputs.requires_grad and torch.is_grad_enabled():
            return _NotDifferentiable.apply(inputs, result, self.name)
        return result

    def _on(self, model: nn.Module) -> Self:
        """The method on another copy of its network."""
        if model is self.model:
            return self
        method = copy.copy(self)
        method.model = model
        return method

    def _attribute(self, x: Tensor, target: Tensor | None) -> Tensor:
        """Do what :meth:`attribute` says, for checked inputs, which are a copy, and checked targets (B,) or None.

        Gradients are enabled, and nothing is in half precision.
        """
        raise NotImplementedError

    # --- what methods are made of ---

    def _logits(self, x: Tensor) -> Tensor:
        """The network's outputs, (B, K)."""
        try:
            logits = self.model(x.clone())  # whose first operation may be in place
        except UserError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.name}: {type(self.model).__name__} cannot take inputs of shape {tuple(x.shape)} ({why}): give "
                "images of the size and channels that it is made for"
            ) from error
        if not isinstance(logits, Tensor):
            raise UserError(
                f"{self.name}: {type(self.model).__name__} returns a {type(logits).__name__}: it must return one "
                "tensor of outputs"
            )
        if logits.ndim != 2 or len(logits) != len(x):
            raise UserError(
                f"{self.name}: {type(self.model).__name__} makes outputs of shape {tuple(logits.shape)} from inputs "
                f"of shape {tuple(x.shape)}: give a batch of images, to a network with one row of outputs for each"
            )
        return logits

    def _target(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """The classes to explain, (B,)."""
        return target_outputs(target, logits, f"{self.name}: ")

    def _output(self, x: Tensor, target: Tensor | None) -> Tensor:
        """The output to explain, (B,)."""
        logits = self._logits(x)
        return logits.gather(1, self._target(logits, target)[:, None]).squeeze(1)

    def _resolved(self, x: Tensor, target: Tensor | None) -> Tensor:
        """The classes to explain, (B,), from a forward pass of their own."""
        with torch.no_grad():
            return self._target(self._logits(x), target)

    def _gradient(self, output: Tensor, x: Tensor, start: Tensor | None = None) -> Tensor:
        """Back-propagates ``start`` (B,), one by default, from ``output`` (B,) to ``x``."""
        if not output.requires_grad:
            raise UserError(
                f"{self.name}: the output of {type(self.model).__name__} has no gradient with respect to its input: "
                "make its forward differentiable, without no_grad or detach"
            )
        return torch.autograd.grad(output, x, torch.ones_like(output) if start is None else start)[0]

    # --- checks ---

    def _check_model(self) -> None:
        refuse_without_weights(self.model)
        if where := in_training(self.model):
            raise UserError(
                f"{self.name}: {type(self.model).__name__} is in training mode (module {where}): call "
                "model.eval() first"
            )
        if any(parameter.is_inference() for parameter in self.model.parameters()):
            raise UserError(
                f"{self.name}: {type(self.model).__name__} was made inside torch.inference_mode, so it has no "
                "gradients: make it outside"
            )

    def _check_inputs(self, inputs: Tensor) -> None:
        if not isinstance(inputs, Tensor):
            raise UserError(f"{self.name}: inputs is a {type(inputs).__name__}: give a tensor")
        if (what := unusable(inputs)) and what != "meta":  # which is another device's
            raise UserError(f"{self.name}: inputs is a {what} tensor: give a dense one of real numbers, with values")
        shape = tuple(inputs.shape)
        if inputs.ndim < 2 or not inputs.numel():
            raise UserError(f"{self.name}: inputs has shape {shape}: give a batch of at least one image, (B, ...)")
        parameters = [parameter for parameter in self.model.parameters() if parameter.is_floating_point()]
        dtypes = {parameter.dtype for parameter in parameters} or {inputs.dtype}
        # Half precision is brought to float32, where nothing is lost.
        wider = {wide(parameter).dtype for parameter in parameters} or {wide(inputs).dtype}
        if not inputs.is_floating_point() or wide(inputs).dtype not in wider:
            wanted = sorted(map(str, dtypes))[0] if parameters else "torch.float32"
            raise UserError(
                f"{self.name}: inputs has dtype {inputs.dtype}, and {type(self.model).__name__} computes in {wanted}: "
                f"give inputs.to({wanted})"
            )
        devices = {parameter.device for parameter in parameters} or {inputs.device}
        if inputs.device not in devices:
            wanted = sorted(map(str, devices))[0]
            raise UserError(
                f"{self.name}: inputs is on {inputs.device} and the network on {wanted}: give inputs.to('{wanted}')"
            )
        finite = wide(inputs.detach()).flatten(1).isfinite().all(1)
        if not finite.all():
            image = int((~finite).nonzero()[0])
            what = "NaN" if inputs[image].isnan().any() else "an infinite value"
            raise UserError(f"{self.name}: image {image} of inputs holds {what}: leave it out, or mend it")

    def _classes(self, inputs: Tensor, target: Any) -> Tensor | None:
        return None if target is None else target_per_image(target, len(inputs), inputs.device, f"{self.name}: ")

    def _check_setting(self, setting: str, value: Any, possible: bool, remedy: str) -> None:
        if not possible:
            raise UserError(f"{self.name}: {setting}={told(value, quoted=False)} is not possible: give {remedy}")

    def _check_whole(self, setting: str, value: Any, least: int = 1) -> None:
        possible = isinstance(value, int) and not isinstance(value, bool) and value >= least
        self._check_setting(setting, value, possible, f"a whole number of at least {least}")


class _NotDifferentiable(torch.autograd.Function):
    """An explanation whose gradient would be silently missing, and is an error instead."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, result: Tensor, method: str) -> Tensor:
        ctx.method = method
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise UserError(
            f"{ctx.method}: an explanation cannot be differentiated with respect to its input: give inputs.detach()"
        )


def kind_of(method: Any) -> type[Method]:
    """Return the class behind a method that is still to be given its network.

    >>> from pattern_bench.methods.gradients import SmoothGrad
    >>> kind_of(partial(SmoothGrad, samples=3)).passes
    'tens'
    """
    kind: Any = method.func if isinstance(method, partial) else method
    return kind


def create(
    method: partial[Method] | type[Method],
    model: nn.Module,
    patterns: Mapping[str, Pattern] | None = None,
    reference: Tensor | None = None,
) -> Method:
    """Make a method from what its YAML file describes, and give it what it needs of ``patterns`` and ``reference``.

    >>> from pattern_bench.methods.gradients import SmoothGrad
    >>> create(partial(SmoothGrad, samples=3), nn.Linear(2, 1)).samples
    3

    Args:
        method: the class, or the ``functools.partial`` that Hydra makes of the YAML file.
        model: as for the class.
        patterns: by layer, of any estimator.
        reference: (R, ...), other images, for methods that replace parts of an image by parts of others.
    """
    kind = kind_of(method)
    given: dict[str, Any] = {}
    if kind.needs_patterns:
        given["patterns"] = patterns
    if kind.takes_reference:
        given["reference"] = reference
    return method(model, **given)
