"""Addresses of data: right, or one error without what is secret in them."""

import io
import tarfile

import pytest
from PIL import Image

from pattern_bench.commands.hydra_entry import arguments
from pattern_bench.data.folder import FolderPool
from pattern_bench.data.remote import describe, find
from pattern_bench.errors import UserError
from pattern_bench.models.base import read_weights


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "a b%20c, ü{x}"
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    with tarfile.open(folder / "s.tar", "w") as tar:
        entry = tarfile.TarInfo("0.png")
        entry.size = len(picture.getvalue())
        tar.addfile(entry, io.BytesIO(picture.getvalue()))
    (folder / "._s.tar").write_bytes(b"x")
    return folder


@pytest.mark.parametrize("form", ["{}", "file://{}", "file:{}", "FILE://{}", "file://localhost{}", "local://{}"])
def test_a_folder_is_found_by_path_and_by_url(shards, form):
    assert find(form.format(shards), ".tar", "data.root") == [str(shards / "s.tar")]


def test_a_url_with_percent_signs_is_the_path_that_it_means(shards):
    escaped = str(shards).replace("%", "%25").replace(" ", "%20").replace("ü", "%C3%BC")
    assert find(f"file://{escaped}", ".tar", "data.root") == [str(shards / "s.tar")]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("simplecache::s3://bucket/a.tar", "is a file system upon another"),
        ("zip://a.tar::https://host/b.zip", "is a file system upon another"),
        ("reference://a.tar", "is a file system upon another"),
        ("dask://a.tar", "is a file system upon another"),
        ("nonsense://a/b.tar", "cannot be opened"),
        ("pipe:cat a.tar", "would run a command"),
        ("a-{0..99999999999}.tar", "files: give"),
        ("https://me:hunter2@host/a.tar", "has credentials in it"),
        ("s3://me:hunter2@bucket/a.tar", "has credentials in it"),
        ("simplecache::https://me:hunter2@host/a.tar", "upon another"),
    ],
)
def test_what_is_no_address_is_one_error_without_secrets(place, said):
    with pytest.raises(UserError, match=said) as caught:
        describe(find(place, ".tar", "data.root"), "data.root")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("place", ["a\0b.tar", "~nobody-of-this-name/a.tar", "/no/such.tar", "file:///no/such.tar", ""])
def test_a_path_that_leads_nowhere_is_one_error(place):
    with pytest.raises(UserError):
        describe(find(place, ".tar", "data.root"), "data.root")
    with pytest.raises(UserError):
        FolderPool(place or "/no", "data.root")
    with pytest.raises(UserError):
        read_weights(place)


def test_a_folder_is_no_url(tmp_path):
    with pytest.raises(UserError, match=r"data.root=s3://bucket is not a folder: .* data=shards") as caught:
        FolderPool("s3://me:hunter2@bucket", "data.root")
    assert "hunter2" not in str(caught.value)


SECRET = [
    "data.root=https://me:hunter2@host/a.tar", "data.root='s3://key:hunter2@bucket'", "+data.x={a: 'ftp://a:hunter2@b'}",
    "data.root=https://host/a.tar?X-Amz-Signature=hunter2", "data.root=[a,'https://host/a?b=1&access_token=hunter2']",
]  # fmt: skip


@pytest.mark.parametrize("argument", SECRET)
def test_credentials_are_refused_before_anything_is_written_down(argument):
    with pytest.raises(UserError, match=f"^{argument.partition('=')[0]}".replace("+", r"\+")) as caught:
        arguments([argument])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "argument", ["data.root=https://host:80/a@b/c.tar", "a=b:c@d", "data.root=https://h/a.tar?v=1"]
)
def test_other_addresses_pass(argument):
    assert arguments([argument]) == [argument]
