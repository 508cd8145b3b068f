"""Products are rounded to float32 and no further, whatever torch was told before, which it is told again afterwards."""

import threading

import pytest
import torch
from torch import nn

import pattern_bench as pb
from pattern_bench.core.rounding import float32_products
from pattern_bench.errors import UserError
from pattern_bench.methods.gradients import Gradient

OPERATIONS = [
    *(torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn),
    *(torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn),
]
SETTINGS = {
    "torch's own": lambda: None,
    "products": lambda: torch.set_float32_matmul_precision("high"),
    "bfloat16": lambda: torch.set_float32_matmul_precision("medium"),
    "no convolutions": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "everything, newly said": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "convolutions, newly said": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32"),
    "products, newly said": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "a CPU's products": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


def said():
    """What torch's two interfaces say, the older one only where it does not refuse to."""
    found = [operation.fp32_precision for operation in OPERATIONS]
    for ask in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            found.append(ask())
        except RuntimeError:
            found.append("refused")
    return found


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for operation in (torch.backends.cuda.matmul, *OPERATIONS[3:]):
        operation.fp32_precision = "none"


EXACT = [*["ieee"] * 6, "highest", False]
TF32 = [*["tf32"] * 3, *["ieee"] * 3, "high", True]


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_products_are_as_asked_and_the_settings_as_before_afterwards(setting, tf32):
    SETTINGS[setting]()
    before = said()
    inside = []

    @float32_products(tf32)
    def fails():
        inside.append(said())
        with float32_products(not tf32):  # the outermost decides
            inside.append(said())
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert inside == [TF32 if tf32 else EXACT] * 2
    assert said() == before


def test_a_thread_that_ends_first_does_not_change_it_for_another():
    inside, done = threading.Event(), threading.Event()

    def other():
        with float32_products():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    before = said()
    with float32_products():
        thread.start()
        inside.wait(10)
    assert said() == EXACT  # the other is still inside
    done.set()
    thread.join()
    assert said() == before


class Asks(nn.Module):
    """A network that remembers how products are rounded when it runs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.said = nn.Linear(4, 3), []

    def forward(self, x):
        SAID.append(said())
        return self.layer(x.flatten(1)).relu()


SAID: list = []


def test_everything_from_python_computes_exactly(tmp_path):
    torch.set_float32_matmul_precision("high")
    net, images = Asks().eval(), torch.rand(8, 1, 2, 2)
    moments = pb.collect_moments(net, [images])
    patterns = pb.fit_patterns(net, moments)
    pb.evaluate(net, patterns, moments, moments)
    methods = {"a": pb.PatternAttribution(net, patterns), "b": Gradient(net)}
    methods["b"].attribute(images)
    pb.degradation(net, images, methods, patch=1, steps=2)
    pb.draw_gallery(net, images[:1], methods, tmp_path / "gallery.png")
    assert len(SAID) > 10
    assert all(one == EXACT for one in SAID)
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(("setting", "expected"), [("false", EXACT), ("true", TF32)])
def test_a_job_computes_as_its_setting_says(run_job, monkeypatch, setting, expected):
    found = []
    monkeypatch.setattr("pattern_bench.pipeline.job.run_prepared", lambda *_: found.append(said()))
    before = said()
    run_job("data.limit=60", "quiet=true", "model.training.epochs=1", f"trainer.tf32={setting}")
    assert found == [expected]
    assert said() == before


def test_a_setting_that_is_neither_true_nor_false_is_refused(run_job):
    with pytest.raises(UserError, match=r"trainer\.tf32=maybe is not possible: give true or false"):
        run_job("trainer.tf32=maybe")
