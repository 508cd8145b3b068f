"""What a configuration may name, what a file may do, and what never leaves the environment."""

import ast
import base64
import os
import pickle
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers.own_network import Residual
from omegaconf import OmegaConf
from torch import nn

import pattern_bench
from pattern_bench.configuration.build import build
from pattern_bench.configuration.checks import check_complete
from pattern_bench.configuration.targets import IMPORTED_MODEL
from pattern_bench.errors import UserError
from pattern_bench.models.base import read_weights
from pattern_bench.models.imported import ImportedModel

PACKAGE = Path(pattern_bench.__file__).parent

# --- what a configuration may name ---


@pytest.mark.parametrize(
    ("override", "setting", "name"),
    [
        ("model._target_=os.system", "model._target_", "os.system"),
        ("model._target_=hydra.utils.instantiate", "model._target_", "hydra.utils.instantiate"),
        ("model._target_=pytorch_lightning.Trainer", "model._target_", "pytorch_lightning.Trainer"),
        ("model._target_=torch_evil.Net", "model._target_", "torch_evil.Net"),
        ("estimator._target_=mypackage.Best", "estimator._target_", "mypackage.Best"),
        ("data._target_=mypackage.Photos", "data._target_", "mypackage.Photos"),
        ("method._target_=builtins.eval", "method._target_", "builtins.eval"),
        ("+trainer.plugins=[{a:1},{_target_:os.system,command:x}]", r"trainer.plugins\[1\]._target_", "os.system"),
        ("+trainer.callbacks.a.b._target_=os.system", "trainer.callbacks.a.b._target_", "os.system"),
        ("+data.extra={_target_:os.system,_partial_:true}", "data.extra._target_", "os.system"),
        ("+data.extra={_target_:[os.system]}", "data.extra._target_", r"\['os.system'\]"),
        ("+data.extra={_target_:{a:1}}", "data.extra._target_", "{'a': 1}"),
        ("+extra=[[{_target_:subprocess.run}]]", r"extra\[0\]\[0\]._target_", "subprocess.run"),
        ("+_target_=os.system", "_target_", "os.system"),
        ("model._target_=torch", "model._target_", "torch"),
        ("model._target_=torch..os", "model._target_", "torch..os"),
        ("model._target_=.torch.nn.ReLU", "model._target_", ".torch.nn.ReLU"),
        ("model._target_='torch.nn.ReLU()'", "model._target_", r"torch.nn.ReLU\(\)"),
        ("model._target_=3", "model._target_", "3"),
        ("model._target_=null", "model._target_", "None"),
        ("model._target_=${oc.env:EVIL}", "model._target_", "os.system"),
        ("model._target_=${data.name}.${oc.env:EVIL}", "model._target_", "digits.os.system"),
    ],
)
def test_a_target_outside_of_the_packages_is_refused_before_anything_is_imported(
    configure, monkeypatch, override, setting, name
):
    monkeypatch.setenv("EVIL", "os.system")
    cfg = configure(override)
    monkeypatch.setattr("importlib.import_module", None)
    with pytest.raises(UserError, match=f"^{setting}={name} "):
        check_complete(cfg)


@pytest.mark.parametrize("text", ["${oc.decode:${oc.env:EVIL}}", "${oc.create:${oc.decode:${oc.env:EVIL}}}"])
def test_a_target_in_what_the_environment_holds_is_refused(configure, monkeypatch, text):
    monkeypatch.setenv("EVIL", "{a: [{_target_: os.system, command: x}]}")
    cfg = configure()
    OmegaConf.update(cfg, "data.extra", text, force_add=True)
    with pytest.raises(UserError, match=r"^data.extra.a\[0\]._target_=os.system lies outside of"):
        check_complete(cfg)
    with pytest.raises(UserError, match=r"^data.extra.a\[0\]._target_=os.system lies outside of"):
        build(cfg.data)


def test_the_command_refuses_it_with_one_line(command, tmp_path):
    done = command("estimator._target_=os.mkdir", f"+estimator.path={tmp_path / 'ran'}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: estimator._target_=os.mkdir lies outside of pattern_bench, torch, torchvision, timm: name another, or "
        "if you trust it to run here, say allow_any_target=true"
    )
    assert not (tmp_path / "ran").exists()


REACHABLE = [
    # functions of the packages
    "torch.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.utils.cpp_extension.load",
    "torch.ops.load_library", "torch.classes.load_library", "torch.jit.load", "torch.compile", "torch.nn.init.zeros_",
    "torchvision.datasets.utils.download_url", "torchvision.models.resnet18", "timm.create_model",
    "timm.models.load_checkpoint",
    "pattern_bench.configuration.build.build",
    "pattern_bench.models.base.read_weights", "pattern_bench.commands.report.main",
    # classes of theirs that are none of those that a run is made of
    "torch.package.PackageImporter", "torch.utils.data.DataLoader", "torch.fx.Graph", "torch.Generator",
    "torchvision.datasets.CIFAR10", "torchvision.datasets.DatasetFolder", "pattern_bench.storage.cache.Cache",
    "pattern_bench.tracking.base.Tracker",
    # what their modules have imported
    "torch.os.system", "torch.utils.data.dataloader.os.system", "pattern_bench.storage.tensor_files.os.system",
    "pattern_bench.storage.tensor_files.os",
    "pattern_bench.storage.tensor_files.tempfile", "torch.serialization.pickle.loads",
    "torch.hub.Path",
    "torch.utils.cpp_extension.subprocess.Popen", "pattern_bench.configuration.build.importlib.import_module",
    "pattern_bench.engine.progress.LightningBar.__init__", "pattern_bench.data.imagenet.Image.open",
    "torch.multiprocessing.Process", "torch.multiprocessing.pool.Pool", "pattern_bench.data.imagenet.Path",
    # modules, attributes, and what is not there
    "torch.nn", "torch.nn.Module.apply", "torch.nn.Module.__class__", "torch.__builtins__", "torch.nn.ReLU.forward",
    "pattern_bench.storage.tensor_files.__builtins__", "torch.nn.Nothing",
    "torch.nothing.ReLU", "torch.nn.modules.linear.Linear.x.y",
]  # fmt: skip


@pytest.mark.parametrize("name", REACHABLE)
def test_within_the_packages_only_the_classes_that_runs_are_made_of_are_built(configure, name):
    # The name alone is enough for some to be refused; where it is not, building them is refused.
    for override, setting in (
        (f"model._target_={name}", "model._target_"),
        (f"+data.extra=[{{_target_:{name},_partial_:true}}]", r"data.extra\[0\]._target_"),
    ):
        cfg = configure(override)
        with pytest.raises(UserError, match=f"^{setting}={name} (is no|cannot be imported)"):
            build(cfg[setting.split(".")[0]])
    cfg = configure("model=imported", f"model.path={name}")
    with pytest.raises(UserError, match=f"^model.path={name} (is no|cannot be imported)"):
        build(cfg.model)


def test_a_network_that_a_module_has_imported_from_elsewhere_is_not_its_own(configure, monkeypatch):
    monkeypatch.setattr("pattern_bench.engine.streams.Residual", Residual, raising=False)
    with pytest.raises(UserError, match=r"^model._target_=pattern_bench.engine.streams.Residual is no .*define"):
        build(configure("model._target_=pattern_bench.engine.streams.Residual").model)


def test_targets_below_others_are_built_and_given_to_them(configure):
    cfg = configure(
        "model=imported", "model.path=torch.nn.Sequential",
    "+model.arguments.arg={_target_:torch.nn.ModuleList,modules:[{_target_:torch.nn.ReLU},{_target_:timm.layers.Mish}]}",
    )  # fmt: skip
    check_complete(cfg)
    relu, mish = build(cfg.model).arguments["arg"]
    assert isinstance(relu, nn.ReLU)
    assert type(mish).__module__.startswith("timm.")


@pytest.mark.parametrize(
    "text",
    [
        r"\${oc.create:{_target_: os.mkdir, path: RAN}}",
        r"\\\${oc.create:{_target_: os.mkdir, path: RAN}}",
        r"\${oc.create:\${oc.decode:'{_target_: os.mkdir, path: RAN}'}}",
    ],
)
def test_text_that_looks_like_an_interpolation_stays_text(configure, tmp_path, text):
    """Hydra's own ``instantiate`` resolves what it has resolved, and would run these."""
    cfg = configure("model=imported", "model.path=torch.nn.Identity")
    OmegaConf.update(cfg, "model.arguments", {"text": text.replace("RAN", str(tmp_path / "ran"))}, force_add=True)
    check_complete(cfg)
    assert "os.mkdir" in build(cfg.model).arguments["text"]
    assert not (tmp_path / "ran").exists()


def test_settings_that_do_not_fit_are_named(configure):
    for override, setting in (("+model.depth=3", "model"), ("+method.depth=3", "method"), ("+data.depth=3", "data")):
        with pytest.raises(UserError, match=f"^{setting} does not fit pattern_bench.*'depth'"):
            build(configure(override)[setting])


def test_a_network_of_ones_own_needs_the_setting(configure):
    own = ["model=imported", "model.path=helpers.own_network.Residual"]
    with pytest.raises(
        UserError, match=r"^model.path=helpers.own_network.Residual lies outside.*allow_any_target=true"
    ):
        check_complete(configure(*own))
    with pytest.raises(
        UserError, match=r"^model.path=helpers.own_network.Residual lies outside.*allow_any_target=true"
    ):
        build(configure(*own).model)
    cfg = configure(*own, "allow_any_target=true")
    check_complete(cfg)
    assert isinstance(build(cfg.model).build(torch.zeros(1, 8, 8), 10), Residual)


def test_with_the_setting_anything_importable_is_built(configure):
    cfg = configure("allow_any_target=true", "+extra={_target_:collections.OrderedDict,a:{_target_:builtins.dict,b:1}}")
    check_complete(cfg)
    assert build(cfg.extra) == {"a": {"b": 1}}
    with pytest.raises(UserError, match=r"^model._target_=no.such.Net cannot be imported.*PYTHONPATH"):
        build(configure("allow_any_target=true", "model._target_=no.such.Net").model)


@pytest.mark.parametrize("value", ["yes", "1", "null", "${oc.env:TRUST}", "[true]"])
def test_the_setting_is_true_or_false(configure, monkeypatch, value):
    monkeypatch.setenv("TRUST", "true")
    cfg = configure(f"allow_any_target={value}", "model._target_=os.system")
    for attempt in (lambda: check_complete(cfg), lambda: build(cfg.model)):
        with pytest.raises(UserError, match=r"^allow_any_target=.* is not possible: give true or false"):
            attempt()


def test_the_imported_model_has_one_name():
    """The check of its path goes by the name of the class."""
    names = []
    for module in pkgutil.walk_packages([str(PACKAGE)], "pattern_bench."):
        if module.name != "pattern_bench.__main__":
            for attribute, value in vars(import_module(module.name)).items():
                if isinstance(value, type) and issubclass(value, ImportedModel):
                    names.append(f"{module.name}.{attribute}")
    assert names == [IMPORTED_MODEL]


# --- what a file may do ---

FORBIDDEN_MODULES = {"joblib", "dill", "cloudpickle", "shelve", "marshal", "pickle", "cPickle", "_pickle", "jsonpickle"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {"read_pickle", "unsafe_load", "full_load", "load_from_checkpoint"}
WEIGHTS_ONLY = {"load", "load_state_dict_from_url"}


def unsafe(source, file="source"):
    """What in Python code could run what a file holds: unpickling of any kind, and code from text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            roots = {
                name.split(".")[0] for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else names)
            }
            if roots & FORBIDDEN_MODULES:
                yield f"{where} imports {', '.join(names)}"
            if isinstance(node, ast.ImportFrom) and roots & {"torch", "numpy", "yaml"} and {"load"} & set(names):
                yield f"{where} imports load by its bare name"
        if not isinstance(node, ast.Call):
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (name in FORBIDDEN_BUILTINS and owner in ("", "builtins")) or name in FORBIDDEN_METHODS:
            yield f"{where} calls {name}"
        if name in WEIGHTS_ONLY and owner in ("torch", "torch.hub", "") and given.get("weights_only") != "True":
            yield f"{where} loads without weights_only=True"
        if given.get("allow_pickle", "False") != "False":
            yield f"{where} loads arrays that may be pickled"
        if owner == "yaml" and name in ("load", "load_all") and not given.get("Loader", "").endswith("SafeLoader"):
            yield f"{where} loads YAML that may name objects"


def test_nothing_in_the_package_unpickles_or_runs_text():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 40
    assert [line for file in files for line in unsafe(file.read_text(), file.name)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "import os, dill", "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=some)", "torch.hub.load_state_dict_from_url(u)", "pd.read_pickle(f)",
        "np.load(f, allow_pickle=True)", "yaml.load(f)", "yaml.load(f, Loader=yaml.Loader)", "eval(x)",
        "from torch import load",
        "Net.load_from_checkpoint(f)", "__import__(x)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_should(source):
    assert len(list(unsafe(source))) == 1


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pkl"])
def test_pickles_with_code_are_refused_and_not_run(tmp_path, suffix):
    ran, file = tmp_path / "ran", tmp_path / f"w{suffix}"
    evil = {"weight": torch.zeros(2), "evil": Evil(ran)}

    def plain():
        file.write_bytes(pickle.dumps(evil))

    writers = [
        plain,
        lambda: torch.save(evil, file),
        lambda: torch.save({"state_dict": evil}, file),
        lambda: torch.save(evil, file, _use_new_zipfile_serialization=False),
        lambda: torch.save({Evil(ran): torch.zeros(2)}, file),
        lambda: torch.save(nn.Linear(2, 2), file),
    ]
    for write in writers:
        write()
        with pytest.raises(UserError, match=f"^model.weights={file} cannot be read as") as caught:
            read_weights(str(file))
        assert "\n" not in str(caught.value)
    assert not ran.exists()


# --- what never leaves the environment ---

KEY, PASSWORD = "0123456789abcdef0123456789abcdef01234567", "pass-word-in-a-url"
FEW = ["data.limit=100", "model.training.epochs=1", "degradation.images=2", "explanation.images=2"]


@pytest.mark.slow
def test_no_key_is_written_anywhere(tmp_path, cache_dir):
    """W&B's key in the environment and in netrc, and passwords in the URLs of its server and of a proxy. The server
    does not answer, so the run is offline."""
    home, work, out = tmp_path / "home", tmp_path / "work", tmp_path / "out"
    for folder in (home, work, out):
        folder.mkdir()
    other = KEY[::-1]
    (home / ".netrc").write_text(
        "".join(f"machine {host}\n  login user\n  password {other}\n" for host in ("api.wandb.ai", "127.0.0.1"))
    )
    (home / ".netrc").chmod(0o600)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))},
        "HOME": str(home), "WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"http://user:{PASSWORD}@127.0.0.1:9",
        "HTTPS_PROXY": f"http://user:{PASSWORD}@127.0.0.1:9", "PATTERN_BENCH_CACHE": str(cache_dir),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pattern_bench", *FEW, f"hydra.run.dir={out}"],
        cwd=work, env=environment, capture_output=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert (out / "summary.json").is_file()
    written = {"stdout": done.stdout, "stderr": done.stderr}
    for root in (tmp_path, cache_dir):
        for file in root.rglob("*"):
            if file.is_file() and file != home / ".netrc":
                written[str(file)] = file.read_bytes()
    # What belongs there is found, so that what does not would be.
    assert any(b"small_vgg" in content for name, content in written.items() if name.endswith(".wandb"))
    assert any(b"127.0.0.1 does not answer" in content for content in written.values())
    planted = [KEY, other, PASSWORD]
    hidden = [text.encode() for text in planted] + [base64.b64encode(text.encode())[:-4] for text in planted]
    assert [name for name, content in written.items() if any(text in content for text in hidden)] == []
