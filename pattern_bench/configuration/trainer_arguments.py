"""The ``trainer`` settings: the suite's own, and which of Lightning's arguments may be given besides.

``tests/unit/configuration/test_trainer_arguments.py`` fails where an argument of Lightning has no place here.
Imports no torch.
"""

from __future__ import annotations

OWN = ("accelerator", "devices", "num_nodes", "strategy", "lost_after", "tf32")
"""The ``trainer`` settings that the suite itself reads or sets."""
STRATEGIES = ("auto", "ddp")
"""What ``trainer.strategy`` may be."""

HARMLESS = {
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
"""Arguments that could, and what to do instead."""
