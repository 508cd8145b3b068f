"""Files of tensors, and the checksums that they carry."""

import tracemalloc

import torch

from pattern_bench.storage.tensor_files import checksum, read_tensors, write_tensors


def equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, equal_nan=True)


def test_tensors_that_share_memory_are_each_written(tmp_path):
    """As a₊ and a₋ of an estimator with one regime do, for a network in float64."""
    one = torch.randn(4, 3)
    write_tensors(tmp_path / "f", {"a": one, "b": one, "c": one[1:3]}, {})
    equal(read_tensors(tmp_path / "f")[0], {"a": one, "b": one, "c": one[1:3]})


def test_the_checksum_tells_names_types_shapes_bytes_and_metadata_apart():
    x = torch.arange(6, dtype=torch.int32)
    variants = [
        ({"x": x}, {}), ({"y": x}, {}), ({"x": x.reshape(2, 3)}, {}), ({"x": x.reshape(3, 2)}, {}),
        ({"x": x.view(torch.float32)}, {}), ({"x": x.flip(0)}, {}), ({"x": x, "y": x[:0]}, {}), ({"x": x}, {"a": "b"}),
        ({"x": x[:3], "y": x[3:]}, {}), ({"x": x[:4], "y": x[4:]}, {}), ({"x": x}, {"a": "", "b": ""}),
        ({"x": x}, {"a": '"], ["b'}),
    ]  # fmt: skip
    sums = [checksum(*variant) for variant in variants]
    assert len(set(sums)) == len(sums)
    assert checksum({"a": x, "b": x + 1}, {"c": "", "d": ""}) == checksum({"b": x + 1, "a": x}, {"d": "", "c": ""})


def test_the_checksum_reads_tensors_where_they_lie():
    tensor = torch.zeros(2**24)
    tracemalloc.start()
    checksum({"x": tensor}, {})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**20
