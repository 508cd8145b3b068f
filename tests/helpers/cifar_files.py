"""CIFAR-10 in both of its forms, with four images in a file instead of 10,000."""

import pickle

import numpy as np

from pattern_bench.data import cifar

RECORDS = 4
FILE_NAMES = [*cifar.TRAIN, *cifar.TEST]


def batches():
    """Labels (4,) and pixels (4, 3072) of every file, in the order of FILE_NAMES."""
    draw = np.random.default_rng(0)
    return [(draw.integers(0, 10, RECORDS), draw.integers(0, 256, (RECORDS, 3072), dtype=np.uint8)) for _ in FILE_NAMES]


def binary():
    """The files of the binary version, by name."""
    files = {
        name: np.concatenate([labels[:, None].astype(np.uint8), pixels], 1).tobytes()
        for name, (labels, pixels) in zip(FILE_NAMES, batches(), strict=True)
    }
    return {**files, "batches.meta.txt": b"airplane\n"}


def write_binary(root):
    (root / cifar.FOLDER).mkdir(parents=True)
    for name, content in binary().items():
        (root / cifar.FOLDER / name).write_bytes(content)
    return root


def write_pickles(root):
    (root / cifar.PICKLES).mkdir(parents=True)
    for name, (labels, pixels) in zip(FILE_NAMES, batches(), strict=True):
        content = {"data": pixels, "labels": labels.tolist()}
        (root / cifar.PICKLES / name.removesuffix(".bin")).write_bytes(pickle.dumps(content))
    (root / cifar.PICKLES / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return root
