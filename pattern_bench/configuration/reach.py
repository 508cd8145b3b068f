"""What each setting of ``conf/`` reaches: which kept results depend on it, and why the others do not.

A result is kept in the cache, for other runs, or in a run's folder, for the run that is taken up again; its key must
name everything that it depends on. A setting without a line here, or a line that does not hold, fails
``tests/test_settings.py``. Imports no torch: the trainer's arguments are checked before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from pattern_bench.errors import UserError, did_you_mean

STAGES = ("models", "moments", "baselines", "accuracy", "readers", "read", "explain", "degrade")
"""What is kept: trained weights, moments and random orders' curves in the cache; and states of the other stages (the
first three have such states too, with the same keys) in the run's folder. ``readers`` are the v fitted by descent,
``read`` what they read."""
ALL = " ".join(STAGES)
AFTER_TRAINING = "moments baselines accuracy readers read explain degrade"


class Reach(NamedTuple):
    """What a setting reaches.

    Attributes:
        setting: its path in the configuration; ``*`` stands for anything.
        keys: stages whose key is another with another value: the value itself is in it, or what it made of images,
            weights or patterns. No other kept result depends on it.
        rounding: stages whose result differs by rounding, which is accepted: their keys do not name it, but may have a
            checksum of what was rounded.
        why: no other kept result depends on it, or rounding is all.
    """

    setting: str
    keys: str
    rounding: str
    why: str


_FRESH = "what it is used for is computed anew in every run, from what is kept"
_LABEL = "a name in the results, or where they go"
_WATCH = "how the job is started, shown or interrupted"
_IMAGES = "decides which images, as the network sees them, each split has: in the fingerprint of the images"
_NETWORK = "decides the network: in the fingerprint of its form, settings and weights"
_METHOD = "the method's own settings are in the keys of what it explains"
_DEVICE = (
    "sums are of the same numbers, in another order or by other routines: 1e-4 in patterns, 1e-3 in ρ. In training it "
    "adds up to another network, as good as the first; whichever was trained first is used by all, and all that is "
    "kept of it carries its fingerprint"
)

REACHES = (
    Reach("layer", "moments readers read", "", "moments are kept layer by layer; the readers' steps are of all layers"),
    Reach("seed", ALL, "", "draws the splits, and all else that is drawn"),
    Reach("criterion", "moments readers read", "", "positive takes moments of its own"),
    Reach("resume", "", "", _WATCH),
    Reach("quiet", "", "", _WATCH),
    Reach("allow_any_target", "", "", "what may be named, not what is"),
    Reach("hydra.*", "", "", _WATCH),
    Reach("cache.*", "", "", "where results are kept, and how many"),
    Reach("checkpoint.seconds", "", "", "how often states are kept; a state that is taken up leads to the same bits"),
    Reach("logger.*", "", "", _LABEL),
    Reach("moments.memory_gib", "", "moments", "batches are summed in parts of another size"),
    Reach("moments.positions", "moments", "", "a share of all positions is drawn"),
    Reach("bootstrap.*", "moments", "readers read explain degrade",
          "moments are of whole splits, or of chunks, whose images are in the key; patterns of their sums differ by "
          "rounding, and what follows has their checksum"),
    Reach("explanation.images", "explain", "", "the first so many"),
    Reach("degradation.images", "baselines degrade", "", "the first so many"),
    Reach("degradation.order", "degrade", "", "a random order has no other end"),
    Reach("degradation.*", "baselines degrade", "", "the protocol of the curves"),
    # the groups
    Reach("estimator.*", "readers read explain degrade", "", "patterns are fitted in every run, from kept moments"),
    Reach("probe.name", "readers", "", f"which probes run; {_FRESH}"),
    Reach("probe.neurons", "moments readers", "", "under positive, moments are of so many neurons"),
    Reach("probe.patience", "readers", "", "where descent stops; what is read has the readers' checksum in its key"),
    Reach("probe.*", "readers read", "", f"in closed form {_FRESH}"),
    Reach("method.batch_size", "explain degrade", "", _METHOD),
    Reach("method.*", "explain degrade", "", _METHOD),
    Reach("methods.*", "", "", "the gallery and the sanity checks keep no explanations"),
    Reach("estimators.*", "", "", "the gallery fits patterns in every run, from kept moments"),
    Reach("model.name", "", "", _LABEL),
    Reach("model.classifier", "", "", "decides which stages run"),
    Reach("model.training", "models", "", _NETWORK),
    Reach("model.training.*", ALL, "", _NETWORK),
    Reach("model.*", ALL, "", _NETWORK),
    Reach("data.name", "", "", _LABEL),
    Reach("data.workers", "", "", "who decodes the images"),
    Reach("data.strict", "", "", "whether the job goes on where an image cannot be read"),
    Reach("data.download", "", "", "where files come from that are the same, by their checksums"),
    Reach("data.shards_kept", "", "", "how many files lie on the disk"),
    Reach("data.batch_size", "baselines readers", "moments accuracy read explain degrade",
          "sums of other batches; descent takes other steps, random orders' curves are the same to the bit in all jobs "
          "of a sweep, and explanations follow the patterns"),
    Reach("data.classes", ALL, "", "the outputs of a network that is trained"),
    Reach("data.*", ALL, "", _IMAGES),
    # the gallery's and the sanity checks' own
    Reach("figure", "", "", _FRESH),
    Reach("image", "", "", _FRESH),
    Reach("images", "", "", _FRESH),
    Reach("show", "", "", _FRESH),
    Reach("percentile", "", "", _FRESH),
    Reach("refit", "", "", _FRESH),
    Reach("directions", "", "", _FRESH),
    Reach("start", "", "", _FRESH),
    # the trainer; see TRAINER and REFUSED for what Lightning takes besides
    Reach("trainer.tf32", ALL, "", "rounds products to ten bits, which shows: in every key"),
    Reach("trainer.accelerator", "", ALL, _DEVICE),
    Reach("trainer.devices", "baselines", ALL, f"{_DEVICE}; states of stages carry the number of processes"),
    Reach("trainer.num_nodes", "baselines", ALL, f"{_DEVICE}; states of stages carry the number of processes"),
    Reach("trainer.strategy", "", ALL, _DEVICE),
    Reach("trainer.lost_after", "", "", _WATCH),
    Reach("trainer.deterministic", "", ALL, _DEVICE),
    Reach("trainer.benchmark", "", ALL, _DEVICE),
    Reach("trainer.*", "", "", "TRAINER says so of each"),
)  # fmt: skip
"""The first line that fits a setting is the one that holds."""

HOW = (
    "resume", "quiet", "allow_any_target", "hydra.*", "cache.*", "checkpoint.*", "logger.*", "moments.memory_gib",
    "data.workers", "data.strict", "data.download", "data.shards_kept", "trainer.*",
)  # fmt: skip
"""Settings that say how a run is done and where things are kept, not what it shows, but for rounding and
``trainer.tf32``."""


def reach(setting: str) -> Reach:
    """What is declared of a setting, such as ``data.batch_size``.

    Raises:
        KeyError: where nothing is.
    """
    for line in REACHES:
        if fnmatchcase(setting, line.setting):
            return line
    raise KeyError(setting)


# --- Lightning's arguments ---

OWN = ("accelerator", "devices", "num_nodes", "strategy", "lost_after", "tf32")
"""The trainer's settings that the suite knows itself."""
STRATEGIES = ("auto", "ddp")

TRAINER = {
    "deterministic": "rounding: which routine a device takes",
    "benchmark": "rounding: which routine a device takes",
    "detect_anomaly": "only looks at gradients, and raises",
    "profiler": "only measures",
    "default_root_dir": "where a profiler writes",
    "log_every_n_steps": "the suite logs by itself",
    "enable_autolog_hparams": "the suite logs by itself",
    "limit_val_batches": "no loop of Lightning's validates here",
    "num_sanity_val_steps": "no loop of Lightning's validates here",
    "check_val_every_n_epoch": "no loop of Lightning's validates here",
    "limit_test_batches": "no loop of Lightning's tests here",
}
"""Arguments of Lightning's Trainer that change no result, and why."""

_IMAGES_INSTEAD = "give data.limit, or data.fit, data.probe and data.validation"
_LENGTH_INSTEAD = "give model.training.epochs, and probe.steps for probe=sgd"
_SUITE = "the suite sets it itself: leave it out"
REFUSED = {
    "limit_train_batches": _IMAGES_INSTEAD,
    "limit_predict_batches": _IMAGES_INSTEAD,
    "overfit_batches": _IMAGES_INSTEAD,
    "fast_dev_run": f"{_IMAGES_INSTEAD}; and model.training.epochs=1",
    "max_epochs": _LENGTH_INSTEAD,
    "min_epochs": _LENGTH_INSTEAD,
    "max_steps": _LENGTH_INSTEAD,
    "min_steps": _LENGTH_INSTEAD,
    "max_time": f"{_LENGTH_INSTEAD}; checkpoint.seconds and resume=DIR for a run that takes too long at once",
    "accumulate_grad_batches": "give model.training.batch_size, and data.batch_size for probe=sgd",
    "gradient_clip_val": "give model.training.learning_rate, and probe.learning_rate for probe=sgd",
    "gradient_clip_algorithm": "give model.training.learning_rate, and probe.learning_rate for probe=sgd",
    "precision": "the network computes in the precision of its weights: give other weights (model.weights)",
    "sync_batchnorm": "one process trains, and batch norm is folded: leave it out",
    "reload_dataloaders_every_n_epochs": "the order of batches is the seed's (seed): leave it out",
    "val_check_interval": "no loop of Lightning's validates here: leave it out",
    "barebones": "it would keep no state of an interrupted run: give quiet=true, or logger=none",
    "inference_mode": _SUITE,
    "use_distributed_sampler": _SUITE,
    "plugins": _SUITE,
    "callbacks": _SUITE,
    "logger": "give logger=wandb, tensorboard, csv or none",
    "model_registry": "give logger=wandb, which files weights by their fingerprint",
    "enable_checkpointing": "give checkpoint.seconds",
    "enable_progress_bar": "give quiet=true",
    "enable_model_summary": _SUITE,
}
"""Those that could, and what to do instead."""


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: naming the first argument that could change results without any key naming it, or that Lightning
            does not have; or a strategy that is none of STRATEGIES.
    """
    for name, value in trainer.items():
        if name in REFUSED:
            raise UserError(f"trainer.{name}={value} is not possible: {REFUSED[name]}")
        if name not in OWN and name not in TRAINER:
            raise UserError(f"trainer.{name}={value} is unknown: {did_you_mean(name, _known())}")
    strategy = trainer.get("strategy", "auto")
    if strategy not in STRATEGIES:
        raise UserError(f"trainer.strategy={strategy} is not possible: choose from {', '.join(STRATEGIES)}")


def _known() -> Iterable[str]:
    return (*OWN, *TRAINER)
