"""Products are rounded to float32 and no further, whatever torch was told before, which it is told again afterwards."""

import contextlib
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pattern_bench as pb
from pattern_bench.core import canonical as module
from pattern_bench.core.canonical import canonical
from pattern_bench.core.memory import HalfDoneError, fits, is_out_of_memory
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
    monkeypatch.setattr("pattern_bench.pipeline.job.run_recorded", lambda *_: found.append(said()))
    before = said()
    run_job("data.limit=60", "quiet=true", "model.training.epochs=1", f"trainer.tf32={setting}")
    assert found == [expected]
    assert said() == before


def test_a_setting_that_is_neither_true_nor_false_is_refused(run_job):
    with pytest.raises(UserError, match=r"trainer\.tf32=maybe is not possible: give true or false"):
        run_job("trainer.tf32=maybe")


# --- the check of the canonical form ---


class Rounding(TorchDispatchMode):
    """Convolutions as GPUs compute them in TF32: operands of float32 keep ten bits of mantissa."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::convolution", "aten::_convolution", "aten::convolution_backward"):
            args = [rounded(a) if i < 2 + ("backward" in func._schema.name) else a for i, a in enumerate(args)]
        return func(*args, **(kwargs or {}))


def rounded(t):
    if not isinstance(t, torch.Tensor) or t.dtype != torch.float32:
        return t
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def deep(dtype=torch.float32, blocks=16):
    torch.manual_seed(0)
    layers, channels = [], 3
    for _ in range(blocks):
        layers += [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        channels = 8
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 5)).eval()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 3)
            norm.weight.data.uniform_(0.3, 1.7)
            norm.bias.data.normal_(0, 0.3)
    return net.to(dtype), torch.randn(1, 3, 8, 8, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_fold_is_not_refused_for_the_rounding_of_products(dtype):
    net, x = deep(dtype)
    with Rounding():
        folded = canonical(net, x)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("place", [0, 7, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fold_whose_weights_are_off_by_one_percent_is_refused(monkeypatch, place, one, dtype, tf32):
    fuse, count = module.fuse_conv_bn_eval, iter(range(100))

    def wrong(layer, norm):
        fused = fuse(layer, norm)
        if next(count) == place:
            fused.weight.data.view(-1)[5 if one else slice(None)] *= 1.01
        return fused

    monkeypatch.setattr(module, "fuse_conv_bn_eval", wrong)
    net, x = deep(dtype)
    with pytest.raises(UserError, match="computes other outputs"), Rounding() if tf32 else contextlib.nullcontext():
        canonical(net, x)


def test_randomness_is_no_rounding():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + 0.01 * torch.randn(5, dtype=x.dtype)

    net, x = deep()
    with pytest.raises(UserError, match="take randomness out"):
        canonical(Noisy(*net).eval(), x)


# --- memory ---


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`",
        "cuFFT error: CUFFT_ALLOC_FAILED",
        "MPS backend out of memory (MPS allocated: 5.05 GB, other allocations: 2.29 GB, max allowed: 6.77 GB).",
        "Invalid buffer size: 24.00 GiB",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to",
        "std::bad_alloc",
        "NCCL error: unhandled cuda error, Last error: Cuda failure 2 'out of memory'",
    ],
)
def test_memory_that_runs_out_is_known_in_every_form(message):
    def runs_out():
        raise RuntimeError(message)

    assert is_out_of_memory(RuntimeError(message))
    assert not fits(runs_out)


def test_memory_of_the_host_that_really_runs_out_is_known():
    assert not fits(lambda: torch.empty(2**56, dtype=torch.uint8))
    assert not fits(lambda: bytearray(2**60))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, opa, opb, m, n, k)`",
        "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx(handle, opa, opb, m, n, k)`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "CUDA error: an illegal memory access was encountered",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same",
    ],
)
def test_other_failures_are_no_lack_of_memory(message):
    def fails():
        raise RuntimeError(message)

    assert not is_out_of_memory(RuntimeError(message))
    with pytest.raises(RuntimeError):
        fits(fails)


def test_what_was_half_done_is_not_tried_again():
    def half_done():
        raise HalfDoneError("half of the sums")

    with pytest.raises(MemoryError):
        fits(half_done)
