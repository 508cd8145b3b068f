"""Degradation from Python: whatever explains plugs in, images of any kind, settings that are impossible."""

import pytest
import torch
from captum.attr import Saliency
from helpers.batches import loader
from helpers.endings import images, plain
from torch import nn

import pattern_bench as pb
from pattern_bench.errors import UserError


def test_whatever_explains_plugs_into_degradation_and_gallery(network, tmp_path):
    """This suite's methods, captum's, and a function as Quantus calls it; the most relevant patch falls first."""
    x = loader()[0][0]
    patterns = pb.fit_patterns(network, pb.collect_moments(network, loader()))

    def quantus_style(model, inputs, targets):
        return Saliency(model).attribute(inputs, target=targets).sum(1).numpy()

    methods = {
        "attribution": pb.PatternAttribution(network, patterns), "signal": pb.PatternNet(network, patterns),
        "captum": Saliency(network), "function": quantus_style,
    }  # fmt: skip
    curves = pb.degradation(network, x, methods, patch=3, steps=16)
    assert set(curves) == {*methods, "random_order"}
    assert all(curve.shape == (8, 17) for curve in curves.values())
    torch.testing.assert_close(curves["captum"], curves["function"])
    # Whatever the order, first nothing and in the end everything is replaced.
    for curve in curves.values():
        torch.testing.assert_close(curve[:, [0, -1]], curves["random_order"][:, [0, -1]])
    least = pb.degradation(network, x, {"captum": Saliency(network)}, patch=3, steps=16, order="least")
    assert not torch.allclose(least["captum"], curves["captum"])
    pb.draw_gallery(network, x, methods, tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="steps=17 is not possible"):
        pb.degradation(network, x, methods, patch=3, steps=17)
    with pytest.raises(UserError, match="order=some is unknown"):
        pb.degradation(network, x, methods, patch=3, steps=3, order="some")
    with pytest.raises(UserError, match="one value per pixel"):
        pb.degradation(network, x, {"bad": lambda *_: torch.zeros(8, 3, 4, 4)}, patch=3, steps=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 0}, "patch=0 is not possible: give a whole number"), ({"patch": -2}, "patch=-2 is not possible"),
        ({"patch": 2.5}, "patch=2.5 is not possible"), ({"steps": 2.5}, "steps=2.5 is not possible"),
        ({"steps": 0}, "steps=0 is not possible"), ({"patch": 13}, "patch=13 is not possible: images of this size"),
        ({"target": 5}, "target=5 is out of range: the network has 5 outputs"), ({"target": True}, "target=True"),
        ({"target": torch.full((6,), -1)}, "target=-1 is out of range"),
        ({"target": torch.zeros(6)}, r"target=torch.float32 of shape \(6,\) is not possible"),
        ({"target": torch.zeros(4).long()}, r"target=torch.int64 of shape \(4,\) is not possible"),
    ],
)  # fmt: skip
def test_impossible_settings_of_degradation_are_one_error(settings, message):
    with pytest.raises(UserError, match=message):
        pb.degradation(plain(), images(), {}, **({"patch": 2, "steps": 4} | settings))


@pytest.mark.parametrize("shape", [(4, 20), (2, 6, 5, 7)])
@pytest.mark.parametrize("how", ["mean", "constant", "blur"])
def test_signals_and_volumes_are_degraded_patch_by_patch(shape, how):
    """Against loops over patches, along every spatial dimension."""
    x, spatial = images(3, *shape), shape[1:]
    weights = images(1, *shape)[0]

    class Sums(nn.Module):
        def forward(self, x):
            return torch.stack([(x * weights).flatten(1).sum(1), x.flatten(1).sum(1)], 1)

    heat = torch.randn(3, *shape)
    found = pb.degradation(Sums().eval(), x, {"h": lambda *_: heat}, 0, patch=2, steps=4, replacement=how, value=0.3)[
        "h"
    ]
    corners = torch.cartesian_prod(*[torch.arange(0, n // 2 * 2, 2) for n in spatial]).view(-1, len(spatial)).tolist()
    for image, its_heat, curve in zip(x, heat, found, strict=True):
        boxes = [(slice(None), *(slice(a, a + 2) for a in corner)) for corner in corners]
        boxes.sort(key=lambda box: -float(its_heat[box].sum()))
        blurred = smooth(image)
        for step in range(5):
            if step:
                box = boxes[step - 1]
                mean = image[box].mean(tuple(range(1, image.ndim)), keepdim=True)
                image = image.clone()
                image[box] = {"mean": mean, "constant": torch.tensor(0.3), "blur": blurred[box]}[how]
            expected = Sums()(image[None]).softmax(1)[0, 0]
            torch.testing.assert_close(curve[step], expected, rtol=1e-4, atol=1e-5)


def smooth(image):
    from scipy.ndimage import gaussian_filter

    channels = [gaussian_filter(channel.double().numpy(), 2, mode="nearest", truncate=3) for channel in image]
    return torch.stack([torch.from_numpy(channel) for channel in channels]).float()
