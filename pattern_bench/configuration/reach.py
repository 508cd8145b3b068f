"""The reach of each setting of ``conf/``: which kept results depend on it, and why the others do not.

A result is kept in the cache, for other runs, or in a run's folder, for the run that is taken up again; its key must
name everything that it depends on. A new setting needs a line in ``REACHES``: the tests fail for one without, and for a
line that does not hold. Imports no torch.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

STAGES = ("models", "moments", "baselines", "accuracy", "readers", "read", "explain", "degrade")
"""The kinds of results that are kept: trained weights, moments and random orders' curves in the cache; and states of
the other stages (the first three have such states too, with the same keys) in the run's folder. ``readers`` are the v
of the probe as descent fits them, ``read`` the correlations that they measure."""
ALL = " ".join(STAGES)


class Reach(NamedTuple):
    """The kept results that depend on a setting.

    Attributes:
        setting: its path in the configuration; ``*`` stands for anything.
        keys: stages whose key is another with another value: the value itself is in it, or what it made of images,
            weights or patterns. No other kept result depends on it.
        rounding: stages whose result differs by rounding, which is accepted: their keys do not name it, but may have a
            checksum of what was rounded.
        why: no other kept result depends on it, or rounding is all.
        how: whether it says how a run is done and where things are kept, not what the run shows (but for rounding).
    """

    setting: str
    keys: str
    rounding: str
    why: str
    how: bool = False


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
_PROCESSES = f"{_DEVICE}; states of stages carry the number of processes"

REACHES = (
    Reach("layer", "moments readers read", "", "moments are kept layer by layer; the readers' steps are of all layers"),
    Reach("seed", ALL, "", "draws the splits, and all else that is drawn"),
    Reach("criterion", "moments readers read", "", "positive takes moments of its own"),
    Reach("resume", "", "", _WATCH, how=True),
    Reach("quiet", "", "", _WATCH, how=True),
    Reach("allow_any_target", "", "", "what may be named, not what is", how=True),
    Reach("hydra.*", "", "", _WATCH, how=True),
    Reach("cache.*", "", "", "where results are kept, and how many", how=True),
    Reach("checkpoint.*", "", "", "how often states are kept; taking one up leads to the same bits", how=True),
    Reach("logger.*", "", "", _LABEL, how=True),
    Reach("moments.memory_gib", "", "moments", "batches are summed in parts of another size", how=True),
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
    Reach("data.workers", "", "", "who decodes the images", how=True),
    Reach("data.strict", "", "", "whether the job goes on where an image cannot be read", how=True),
    Reach("data.download", "", "", "where files come from that are the same, by their checksums", how=True),
    Reach("data.shards_kept", "", "", "how many files lie on the disk", how=True),
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
    # the trainer; see HARMLESS and REFUSED of trainer_arguments.py for what Lightning takes besides
    Reach("trainer.tf32", ALL, "", "rounds products to ten bits, which shows: in every key"),
    Reach("trainer.accelerator", "", ALL, _DEVICE, how=True),
    Reach("trainer.devices", "baselines", ALL, _PROCESSES, how=True),
    Reach("trainer.num_nodes", "baselines", ALL, _PROCESSES, how=True),
    Reach("trainer.strategy", "", ALL, _DEVICE, how=True),
    Reach("trainer.lost_after", "", "", _WATCH, how=True),
    Reach("trainer.deterministic", "", ALL, _DEVICE, how=True),
    Reach("trainer.benchmark", "", ALL, _DEVICE, how=True),
    Reach("trainer.*", "", "", "HARMLESS says so of each", how=True),
)  # fmt: skip
"""The first line that fits a setting is the one that holds."""

HOW = tuple(line.setting for line in REACHES if line.how)
"""Settings that say how a run is done and where things are kept, not what it shows, but for rounding and
``trainer.tf32``."""


def reach(setting: str) -> Reach:
    """Return the line of ``REACHES`` for a setting.

    >>> reach("data.workers").why
    'who decodes the images'

    Raises:
        KeyError: where there is none.
    """
    for line in REACHES:
        if fnmatchcase(setting, line.setting):
            return line
    raise KeyError(setting)
