"""Decoding against hostile and odd files; resizing against a second implementation; boxes as a property."""

import io
import struct
import zlib
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from edgevlm.artifacts import PreprocessSpec
from edgevlm.data.preprocess import load_image, preprocess, scale_boxes, unscale_boxes
from edgevlm.errors import ImageError

# --- a second implementation -------------------------------------------------------------------------------------


def kernel(name: str, x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    if name == "bilinear":
        return np.clip(1 - x, 0, None)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2  # Keys, a = -1/2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def weights(name: str, n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in) matrix of an antialiased resize: the kernel is widened by the factor of reduction."""
    if name == "nearest":
        return np.eye(n_in)[[int((i + Fraction(1, 2)) * n_in / n_out) for i in range(n_out)]]
    factor = n_in / n_out
    centres = (np.arange(n_out)[:, None] + 0.5) * factor
    matrix = kernel(name, (np.arange(n_in) + 0.5 - centres) / max(factor, 1.0))
    return matrix / matrix.sum(1, keepdims=True)


def reference(pixels_HWC: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    height, width = pixels_HWC.shape[:2]
    out_h, out_w = spec.height, spec.width
    if spec.resize == "letterbox":
        scale = min(Fraction(spec.width, width), Fraction(spec.height, height))
        out_h, out_w = (max(1, int(n * scale + Fraction(1, 2))) for n in (height, width))
    # Along x, rounded to 8 bits, then along y.
    rows = np.einsum("ow,hwc->hoc", weights(spec.interpolation, width, out_w), pixels_HWC.astype(float))
    rows = np.floor(rows + 0.5).clip(0, 255)
    small = np.einsum("oh,hwc->owc", weights(spec.interpolation, height, out_h), rows)
    small = np.floor(small + 0.5).clip(0, 255)
    canvas = np.full((spec.height, spec.width, 3), spec.pad_value, float)
    canvas[:out_h, :out_w] = small
    return canvas


specs = st.builds(
    PreprocessSpec,
    height=st.integers(8, 80),
    width=st.integers(8, 80),
    resize=st.sampled_from(["stretch", "letterbox"]),
    interpolation=st.sampled_from(["bilinear", "bicubic", "nearest"]),
    pad_value=st.integers(0, 255),
)
sizes = st.tuples(st.integers(1, 120), st.integers(1, 120))


@given(spec=specs, size=sizes, seed=st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_pixels_match_the_second_implementation(spec: PreprocessSpec, size: tuple[int, int], seed: int) -> None:
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    ours = preprocess(Image.fromarray(pixels_HWC), spec)
    assert ours.shape == (spec.height, spec.width, 3)
    assert ours.dtype == np.uint8
    # Two levels: Pillow's weights are fixed-point numbers, so a value next to .5 may round the other way in either pass.
    tolerance = 0 if spec.interpolation == "nearest" else 2
    assert np.abs(ours.astype(float) - reference(pixels_HWC, spec)).max() <= tolerance


def test_same_size_is_untouched() -> None:
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    ours = preprocess(Image.fromarray(pixels_HWC), PreprocessSpec(height=24, width=32))
    assert np.array_equal(ours, pixels_HWC)
    ours[0] = 0  # a copy, free to be changed


def test_other_modes_become_rgb() -> None:
    grey = Image.new("L", (8, 8), 77)
    assert (preprocess(grey, PreprocessSpec(height=4, width=4)) == 77).all()


# --- boxes -------------------------------------------------------------------------------------------------------


@given(spec=specs, size=st.tuples(st.integers(4, 4000), st.integers(4, 4000)), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_unscale_undoes_scale(spec: PreprocessSpec, size: tuple[int, int], seed: int) -> None:
    low, high = np.sort(np.random.default_rng(seed).random((2, 5, 2)), axis=0) * size
    boxes = np.concatenate([low, high], 1).astype(np.float32)
    scaled = scale_boxes(boxes, size, spec)
    assert scaled.dtype == np.float32
    assert (scaled[:, 2:] <= np.array([spec.width, spec.height]) + 1e-3).all()
    # float32 in between: 2^-24 relative, enlarged by the factor of reduction (at most 4000 / 8).
    np.testing.assert_allclose(unscale_boxes(scaled, size, spec), boxes, atol=5e-3)


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", [(300, 100), (100, 300), (64, 64)])
def test_boxes_follow_the_pixels(resize: str, size: tuple[int, int]) -> None:
    """A white rectangle drawn at a box is found at the scaled box, within 1 px."""
    spec = PreprocessSpec.model_validate({"height": 96, "width": 128, "resize": resize, "pad_value": 0})
    box = np.array([[0.25 * size[0], 0.5 * size[1], 0.75 * size[0], 0.9 * size[1]]]).round()
    x1, y1, x2, y2 = box[0].astype(int)
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    rows, columns = np.nonzero(preprocess(Image.fromarray(image), spec)[..., 0] > 127)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(found, scale_boxes(box, size, spec)[0], atol=1.0)


def test_no_boxes() -> None:
    spec = PreprocessSpec(height=8, width=8)
    assert scale_boxes(np.zeros((0, 4), np.float32), (5, 5), spec).shape == (0, 4)


# --- decoding ----------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG"])
def test_formats(tmp_path: Path, format: str) -> None:
    pixels = np.zeros((12, 20, 3), np.uint8)
    pixels[:, 10:] = (255, 0, 0)
    options = {"lossless": True} if format == "WEBP" else {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    data = encoded(Image.fromarray(pixels), format, **options)
    (tmp_path / "image.bin").write_bytes(data)  # the content decides, not the name
    for image in (load_image(data), load_image(tmp_path / "image.bin")):
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image, int) - pixels).max() <= (6 if format == "JPEG" else 0)


# EXIF 2.3, tag 0x0112: how the stored rows and columns lie in the upright image.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation: int) -> None:
    stored = np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), "PNG", exif=exif)
    assert np.array_equal(np.asarray(load_image(data)), UPRIGHT[orientation](stored))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_keeps_the_pixels() -> None:
    stored = np.full((3, 5, 3), 9, np.uint8)
    data = encoded(Image.fromarray(stored), "PNG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert np.array_equal(np.asarray(load_image(data)), stored)


def test_transparency_goes_on_white() -> None:
    half_red = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    half_red.putpixel((1, 0), (0, 0, 0, 0))
    first, second = np.asarray(load_image(encoded(half_red, "PNG")), int)[0]
    assert np.abs(first - [255, 127, 127]).max() <= 1
    assert (second == 255).all()
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert (np.asarray(load_image(encoded(palette, "PNG", transparency=0))) == 255).all()


def test_16_bit_grey_is_scaled() -> None:
    levels = np.array([[0, 257 * 100, 257 * 200, 65535]], np.uint16)
    loaded = np.asarray(load_image(encoded(Image.fromarray(levels), "PNG")))
    assert loaded[0, :, 0].tolist() == [0, 100, 200, 255]


def test_cmyk_jpeg() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(np.asarray(load_image(data), int) - [255, 0, 0]).max() <= 6


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with next to no data behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\x00" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (8_001, 8_000), (12_000, 9_000)])
def test_huge_claims_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch, width: int, height: int) -> None:
    def decoded(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with pytest.raises(ImageError, match=r"the limit is 64 million\. Save it at a smaller size"):
        load_image(png_header(width, height))


@pytest.mark.parametrize("content", [b"", b"hello, I am a text file\n" * 20, b"\x89PNG\r\n\x1a\n", png_header(0, 0)])
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"photo\.jpg .*\. (Save|Copy)"):
        load_image(path)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    with pytest.raises(ImageError, match=r"truncated or damaged|cannot|not an image"):
        load_image(data[: len(data) // 2])


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow comments on damaged TIFF tags
@given(st.binary(max_size=300), st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), st.integers(0, 200))
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_never_raise_anything_else(noise: bytes, format: str, position: int) -> None:
    data = bytearray(encoded(Image.new("RGB", (9, 7), (1, 2, 3)), format))
    data[position : position + len(noise)] = noise
    with suppress(ImageError):
        assert load_image(bytes(data)).mode == "RGB"
