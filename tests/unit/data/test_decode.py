"""Every fault and oddity of an image file: there comes back the whole picture in RGB, or one OSError with a reason."""

import io
import struct
import tarfile
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin
from torchvision.datasets.folder import pil_loader
from torchvision.io import ImageReadMode, decode_image

from pattern_bench.data.base import Pool, photograph_transform
from pattern_bench.data.decode import decode
from pattern_bench.data.splits import Split, Unreadable
from pattern_bench.errors import UserError

rng = np.random.default_rng(0)
rows, columns = np.mgrid[:20, :28]
PIXELS = np.stack([columns * 9, rows * 12, (rows + columns) * 5], -1).astype(np.uint8)
PIXELS += rng.integers(0, 8, PIXELS.shape, dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
FRAMES = [PICTURE, PICTURE.rotate(180), PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(content):
    return np.asarray(decode(io.BytesIO(content)))


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, bits, colour, data):
    """A PNG by hand: PIL writes no 16-bit colour, and no header that lies."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values, bits, white=1):
    """A grey TIFF by hand, of one strip: ``white`` is 0 where 0 means white."""
    height, width = values.shape
    packed = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(height, width, 2), axis=-1)[..., 16 - bits :]
    data = np.packbits(packed.reshape(height, -1), axis=-1).tobytes() if bits < 16 else values.astype("<u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: white, 273: 122, 277: 1, 278: height, 279: len(data)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4) + data


FILES = {
    "jpeg": encoded(PICTURE, "JPEG"),
    "jpeg_progressive": encoded(PICTURE, "JPEG", progressive=True),
    "png": encoded(PICTURE, "PNG"),
    "png_palette": encoded(PICTURE.quantize(), "PNG"),
    "png_animated": encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "gif": encoded(PICTURE, "GIF"),
    "gif_animated": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "webp": encoded(PICTURE, "WEBP"),
    "webp_animated": encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
    "tiff": encoded(PICTURE, "TIFF"),
    "tiff_lzw": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "tiff_jpeg": encoded(PICTURE, "TIFF", compression="jpeg"),
    "tiff_16_bits": tiff(PIXELS[..., 0].astype(np.uint16) * 257, 16),
    "bmp": encoded(PICTURE, "BMP"),
    "ppm": encoded(PICTURE, "PPM"),
}


# Broken files.


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_image_is_an_error_never_half_an_image(name):
    content = FILES[name]
    whole, errors = read(content), 0
    for end in range(0, len(content), 1 if len(content) < 400 else 7):
        try:
            assert np.array_equal(read(content[:end]), whole)  # nothing but later frames or a trailer was missing
        except OSError:
            errors += 1
    assert errors > 30


@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "bmp"])
def test_half_images_stay_errors_where_other_code_has_allowed_them(name, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    half = FILES[name][:-100]
    assert not np.array_equal(Image.open(io.BytesIO(half)).convert("RGB"), read(FILES[name]))
    with pytest.raises(OSError, match=r"(?i)truncated|broken"):
        read(half)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("name", ["png", "jpeg", "tiff_lzw"])
def test_an_image_whose_tail_is_zeros_is_an_error(name):
    """What an interrupted download or a mended disk leaves: the right length, and nothing in its second half."""
    half = len(FILES[name]) // 2
    with pytest.raises(OSError, match=r"\w"):
        read(FILES[name][:half] + bytes(len(FILES[name]) - half))


def test_a_png_with_a_wrong_checksum_is_an_error():
    content = bytearray(FILES["png"])
    content[len(content) // 2] ^= 1
    with pytest.raises(OSError, match="broken PNG"):
        read(bytes(content))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"\0", "no image"),
        (bytes(5000), "no image"),
        (b"<html><body>404 Not Found</body></html>", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "PostScript"),
    ],
)
def test_empty_files_and_other_types_are_errors_that_say_so(content, reason, tmp_path):
    with pytest.raises(OSError, match=reason):
        read(content)
    (tmp_path / "image.jpg").write_bytes(content)
    with pytest.raises(OSError, match=reason):
        decode(tmp_path / "image.jpg")


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "gone.jpg")
    with pytest.raises(IsADirectoryError):
        decode(tmp_path)


@pytest.mark.parametrize(("size", "read"), [((1, 100), True), ((101, 1), False), ((1, 4000), False)])
def test_an_image_that_would_grow_too_long_is_an_error(size, read):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    file.seek(0)
    if read:
        assert decode(file).size == size
    else:
        with pytest.raises(OSError, match="a side more than 100 times the other"):
            decode(file)


def test_a_decompression_bomb_is_an_error():
    with pytest.raises(OSError, match=r"DecompressionBombError: .*10000000000 pixels"):
        read(png(100_000, 100_000, 8, 2, b""))


def test_a_large_image_is_read_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # PIL warns from here, and refuses from twice as many
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert read(FILES["png"]).shape == PIXELS.shape
    assert not seen


@pytest.mark.parametrize(
    "error",
    [
        SyntaxError("x"), struct.error("x"), KeyError("x"), zlib.error("x"), OverflowError("x"), TypeError("x"),
        ValueError("x"), EOFError("x"), RuntimeError("x"), RecursionError("x"), MemoryError("x"),
    ],
)  # fmt: skip
def test_whatever_pil_raises_becomes_one_oserror_with_the_reason(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(OSError, match=f"^{type(error).__name__}: '?x'?$") as caught:
        read(FILES["jpeg"])
    assert caught.value.__cause__ is error


def test_an_interrupt_is_not_taken_for_a_broken_image(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(FILES["jpeg"])


def mutated(content, draw):
    """Cut, shortened, lengthened, a field of zeros or ones, or some bytes changed anywhere or in the header."""
    content = bytearray(content)
    place, kind = int(draw.integers(len(content))), draw.integers(6)
    if kind == 0:
        del content[place:]
    elif kind == 1:
        del content[place : place + int(draw.integers(1, 64))]
    elif kind == 2:
        content[place:place] = draw.bytes(int(draw.integers(1, 40)))
    elif kind == 3:
        length = int(draw.integers(1, 9))
        content[place : place + length] = draw.choice([b"\0", b"\xff"]) * length
    else:
        top = len(content) if kind == 4 else min(len(content), 120)
        for _ in range(int(draw.integers(1, 12))):
            content[int(draw.integers(top))] = int(draw.integers(256))
    return bytes(content)


def test_of_3000_mutated_files_each_is_an_rgb_image_or_an_oserror(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # headers that lie may ask for gigabytes
    draw = np.random.default_rng(0)
    images = errors = 0
    names = list(FILES)
    for i in range(3000):
        content = mutated(FILES[names[i % len(names)]], draw)
        try:
            image = decode(io.BytesIO(content))
        except OSError:
            errors += 1
        else:
            assert image.mode == "RGB"
            assert min(image.size) > 0
            images += 1
    assert images > 300
    assert errors > 1000


# Unusual files.


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_common_modes_are_as_torchvision_reads_them(mode, tmp_path):
    image = PICTURE.quantize(64).convert("PA") if mode == "PA" else PICTURE.convert(mode)
    if mode in ("LA", "RGBA", "PA"):
        image.putalpha(Image.fromarray(PIXELS[..., 0]))
    path = tmp_path / "image"
    image.save(path, "TIFF")
    found = decode(path)
    assert found.mode == "RGB"
    assert np.array_equal(found, pil_loader(path))


def test_transparency_is_dropped_and_what_lies_under_it_shows():
    clear = PICTURE.copy()
    clear.putalpha(0)
    assert np.array_equal(read(encoded(clear, "PNG")), PIXELS)
    palette = PICTURE.quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    for transparency in (3, bytes(range(16))):
        assert np.array_equal(read(encoded(palette, "PNG", transparency=transparency)), expected)


def test_cmyk_jpeg_has_the_colours_that_another_decoder_finds():
    """(255 - c) (255 - k) / 255, stored inverted after Adobe's custom; torchvision's decoder is not PIL's."""
    for cmyk, rgb in {(0, 255, 255, 0): (255, 0, 0), (30, 100, 200, 40): (190, 131, 46)}.items():
        content = encoded(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100)
        found = read(content)
        assert b"Adobe" in content
        assert np.abs(found.astype(int) - rgb).max() <= 1
        other = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
        assert np.abs(found.astype(int) - other.permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_is_scaled_not_clipped(kind, tmp_path):
    values = np.linspace(0, 65535, 20 * 28).round().astype(np.uint16).reshape(20, 28)
    path = tmp_path / "image"
    Image.fromarray(values).save(path, kind)
    found = np.asarray(decode(path))
    assert np.array_equal(found, np.repeat((values / 257).round().astype(np.uint8)[..., None], 3, -1))
    assert (np.asarray(pil_loader(path)) == 255).mean() > 0.99


@pytest.mark.parametrize(("bits", "white"), [(12, 1), (16, 1), (16, 0)])
def test_grey_tiff_of_12_bits_and_with_white_at_zero(bits, white):
    values = np.linspace(0, 2**bits - 1, 20 * 28).astype(np.uint16).reshape(20, 28)
    expected = values * (255 / (2**bits - 1))
    expected = expected if white else 255 - expected
    assert np.abs(read(tiff(values, bits, white))[..., 0] - expected).max() <= 0.5


def test_16_bit_colour_keeps_its_upper_8_bits():
    values = rng.integers(0, 65536, (20, 28, 3))
    data = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    assert np.array_equal(read(png(28, 20, 16, 2, data)), values >> 8)


@pytest.mark.parametrize(
    ("values", "black", "white"),
    [
        (np.linspace(0, 1, 560, dtype=np.float32), 0, 1),
        (np.linspace(0.25, 0.5, 560, dtype=np.float32), 0, 1),
        (np.linspace(-3, 900, 560, dtype=np.float32), -3, 900),
        (np.linspace(-1000, 3000, 560).astype(np.int32), -1000, 3000),
        (np.linspace(0, 2e9, 560).astype(np.int32), 0, 2e9),
        (np.full(560, 7.5, dtype=np.float32), 7.5, 8.5),
    ],
)
def test_floats_and_long_integers_are_stretched_between_their_extremes(values, black, white):
    for kind in ("TIFF", "PPM") if values.dtype == np.float32 else ("TIFF",):  # of floats, PPM makes PFM
        found = read(encoded(Image.fromarray(values.reshape(20, 28)), kind))
        assert np.abs(found[..., 0].ravel() - 255 * (values.astype(float) - black) / (white - black)).max() <= 0.51


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_an_error(value):
    values = np.zeros((20, 28), dtype=np.float32)
    values[3, 4] = value
    with pytest.raises(OSError, match="not finite"):
        read(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("name", ["png_animated", "gif_animated", "webp_animated"])
def test_an_animation_is_its_first_frame(name):
    assert Image.open(io.BytesIO(FILES[name])).n_frames == 3
    distances = [np.abs(read(FILES[name]).astype(int) - np.asarray(frame)).mean() for frame in FRAMES]
    assert distances[0] < 6 < 30 < min(distances[1:])


def test_a_tiff_of_several_pages_is_its_first():
    content = encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:])
    assert np.array_equal(read(content), PIXELS)


# What EXIF's orientations mean: the picture's row 0 and column 0 are where the stored image has them.
STORED = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_rotation_is_undone(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](PIXELS)))
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    found = read(encoded(stored, kind, exif=exif, **options))
    assert found.shape == PIXELS.shape
    assert np.abs(found.astype(int) - PIXELS).max() <= (6 if kind == "JPEG" else 0)


def exif_block(header=b"MM\0*", maker=(2, 4)):
    """The maker's name, of some type and count (4 letters), and orientation 6, a quarter turn."""
    maker, orientation = struct.pack(">HHI4s", 271, *maker, b"Eos\0"), struct.pack(">HHIHH", 274, 3, 1, 6, 0)
    return b"Exif\0\0" + header + struct.pack(">IH", 8, 2) + maker + orientation + bytes(4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("exif", [exif_block(header=b"MX\0*"), exif_block()[:25], b"Exif\0\0", bytes(range(256))])
def test_broken_exif_leaves_the_picture_as_it_is_stored(exif, kind):
    plain = read(encoded(PICTURE, kind))
    assert np.array_equal(read(encoded(PICTURE, kind, exif=exif)), plain)


def test_exif_that_cannot_be_written_again_still_turns_the_picture():
    """ImageOps.exif_transpose rewrites EXIF without the orientation, and fails where a tag is not of its type."""
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](PIXELS)))
    content = encoded(stored, "JPEG", quality=100, subsampling=0, exif=exif_block(maker=(11, 1)))
    with pytest.raises(AttributeError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    found = read(content)
    assert found.shape == PIXELS.shape
    assert np.abs(found.astype(int) - PIXELS).max() <= 6


def test_compressed_tiff_is_read_from_within_an_archive():
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("tiff_lzw", "png"):
            member = tarfile.TarInfo(name)
            member.size = len(FILES[name])
            tar.addfile(member, io.BytesIO(FILES[name]))
    archive.seek(0)
    with tarfile.open(fileobj=archive) as tar:
        for member in tar:
            assert np.array_equal(decode(tar.extractfile(member)), PIXELS)


def test_a_tiff_whose_directory_lies_before_the_cut_is_still_an_error():
    """Other writers than PIL put the directory first: the header is whole, and the last strips are not."""
    source = Image.open(io.BytesIO(encoded(PICTURE, "TIFF", compression="tiff_deflate", strip_size=28 * 3 * 4)))
    strips = [
        source.fp.read(count)
        for offset, count in zip(source.tag_v2[273], source.tag_v2[279], strict=True)
        if source.fp.seek(offset)
    ]
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    for tag in source.tag_v2:
        directory[tag], directory.tagtype[tag] = source.tag_v2[tag], source.tag_v2.tagtype[tag]
    directory[273] = tuple(np.cumsum([0, *map(len, strips[:-1])]).tolist())
    content = b"II*\0\x08\0\0\0" + directory.tobytes(8) + b"".join(strips)
    assert len(strips) == 5
    assert np.array_equal(read(content), PIXELS)
    for missing in (1, 10, len(strips[-1]), len(strips[-1]) + 1):
        with pytest.raises(OSError, match=r"\w"):
            read(content[:-missing])


# Within a split.


class Files(Pool):
    def __init__(self, root):
        self.root = root
        self.ids = sorted(path.name for path in root.iterdir())
        self.labels, self.classes, self.fingerprint = None, None, ""

    def image(self, index):
        return decode(self.root / self.ids[index])


@pytest.fixture
def mixed(tmp_path):
    """Nine image files: six that can be read, one truncated, one empty, and one that vanishes after the listing."""
    for name in ("jpeg", "png", "gif_animated", "webp", "tiff_16_bits", "png_palette"):
        (tmp_path / f"good_{name}").write_bytes(FILES[name])
    (tmp_path / "truncated.jpg").write_bytes(FILES["jpeg"][:-200])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "vanishes.jpg").write_bytes(FILES["jpeg"])
    pool = Files(tmp_path)
    (tmp_path / "vanishes.jpg").unlink()
    return Split(pool, torch.arange(9), regression=False, strict=False, transform=photograph_transform(24))


def test_truncated_empty_and_vanished_images_are_left_out_and_named(mixed):
    reasons = {mixed.name(item.position): item.reason for item in mixed if isinstance(item, Unreadable)}
    assert sorted(reasons) == ["empty.png", "truncated.jpg", "vanishes.jpg"]
    assert reasons["empty.png"] == "empty file"
    assert "truncated" in reasons["truncated.jpg"].lower()
    assert "No such file" in reasons["vanishes.jpg"]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_the_readable_images_and_the_names_of_the_others(mixed, workers):
    batches = list(mixed.loader(range(9), batch_size=4, workers=workers))
    names = [mixed.pool.ids[position] for batch in batches for position in batch.positions]
    assert sorted(mixed.name(position) for batch in batches for position in batch.unreadable) == [
        "empty.png",
        "truncated.jpg",
        "vanishes.jpg",
    ]
    assert all(name.startswith("good_") for name in names)
    assert sum(len(batch.images) for batch in batches if batch.images is not None) == len(names) == 6
    assert {tuple(batch.images.shape[1:]) for batch in batches if batch.images is not None} == {(3, 24, 24)}


def test_strict_stops_at_the_first_with_its_name_and_the_reason(mixed):
    mixed.strict = True
    with pytest.raises(UserError, match=r"data.strict=true, and empty.png cannot be read \(empty file\)"):
        list(mixed.loader(range(9), batch_size=4, workers=0))
