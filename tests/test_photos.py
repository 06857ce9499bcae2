"""Image files of every kind: what comes out as RGB, and what is said of a file that cannot be read."""

import struct
import sys
import zlib

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="needs the extra 'maps'")

from tokenmix_kernels.photos import ImageError, open_image, to_rgb  # noqa: E402

WIDE = np.array([[0, 128, 129, 257], [257 * 100, 40000, 65534, 65535]], np.uint16)
WIDE_AS_BYTES = [[0, 0, 1, 1], [100, 156, 255, 255]]  # v / 257, rounded


def grey(image):
    """The one channel of an RGB image whose three are equal."""
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


def png_of_16_bits(values):
    """PNG written by hand: the format stores 16 bits in big-endian order."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_png_is_scaled_by_its_range(tmp_path):
    (tmp_path / "a.png").write_bytes(png_of_16_bits(WIDE))
    assert grey(open_image(tmp_path / "a.png")) == WIDE_AS_BYTES


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_tiff_is_scaled_by_its_range(tmp_path, mode):
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (4, 2), WIDE.astype(dtype).tobytes())
    assert grey(to_rgb(image)) == WIDE_AS_BYTES
    image.save(tmp_path / "a.tif")
    assert grey(open_image(tmp_path / "a.tif")) == WIDE_AS_BYTES


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_float_tiff_is_scaled_by_its_values(tmp_path, scale):
    values = np.array([[0.0, 0.25, 0.5, 1.0]], np.float32) * scale
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert grey(open_image(tmp_path / "a.tif")) == [[0, 64, 128, 255]]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.array([[0, 65536]], np.int32), r"mode I must be in \[0, 65535\], got 0 to 65536"),
        (np.array([[-1, 7]], np.int32), r"mode I must be in \[0, 65535\], got -1 to 7"),
        (np.array([[0, 255.5]], np.float32), r"mode F must be in \[0, 1\] or \[0, 255\], got 0 to 255.5"),
        (np.array([[-0.5, 1]], np.float32), r"mode F must be in .*, got -0.5 to 1"),
        (np.array([[np.nan, 1]], np.float32), r"mode F must be in .*, got nan to nan"),
    ],
)
def test_values_without_a_known_range_are_refused(tmp_path, values, says):
    with pytest.raises(ValueError, match=says):
        to_rgb(Image.fromarray(values))
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=rf"^the image {tmp_path / 'a.tif'} cannot be read: .*{says}"):
        open_image(tmp_path / "a.tif")


def test_other_modes_are_converted_as_pillow_does():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert to_rgb(image) is image
    for mode in ("L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV"):
        other = image.convert(mode)
        assert np.array_equal(np.asarray(to_rgb(other)), np.asarray(other.convert("RGB"))), mode
    clear = image.copy()
    clear.putalpha(0)
    assert np.array_equal(np.asarray(to_rgb(clear)), pixels)  # transparency is dropped, not blended


def test_exif_orientation_is_ignored(tmp_path):
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0, 0] = 255
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to look at
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), pixels)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.webp", "a.gif"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_truncated_files_are_named(tmp_path, name, share):
    path = tmp_path / name
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    assert open_image(path).size == (64, 64)
    path.write_bytes(content[: int(share * len(content))])
    why = "it is empty" if not share else "."
    with pytest.raises(ImageError, match=rf"^the image {path} cannot be read: {why}"):
        open_image(path)


def test_files_that_are_no_images_are_named(tmp_path):
    path = tmp_path / "page.jpg"
    path.write_text("<html>404</html>")
    with pytest.raises(ImageError, match=rf"^the image {path} cannot be read: it is not an image in a format"):
        open_image(path)


def test_decompression_bombs_are_named(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("L", (300, 300)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40000)
    with pytest.raises(ImageError, match=rf"^the image {path} cannot be read: Image size \(90000 pixels\) exceeds"):
        open_image(path)


def test_errors_of_the_system_are_not_errors_of_the_image(tmp_path):
    """What skips broken images must not skip a data set on a failing disk."""
    for path, kind in ((tmp_path / "absent.png", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(kind, match=rf"the image {path} cannot be read: "):
            open_image(path)


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"Pillow is needed .* pip install 'tokenmix_kernels\[maps\]'"):
        open_image(tmp_path / "a.png")
