"""The only image code of the project: file or bytes -> RGB image -> the model's uint8 pixels, and boxes with them.

Training, calibration, verification and benchmarks all come through here, and the apps follow the same words
(`PreprocessSpec`), proven by golden pixels. Normalisation is not here: it is in the graph.
"""

import io
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from edgevlm.artifacts import PreprocessSpec
from edgevlm.errors import ImageError

MAX_PIXELS = 64_000_000
"""Larger images are refused from their header, before any pixel is decoded."""

# Only what phones, cameras and browsers write: every further decoder is a further way in for a hostile file.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def load_image(source: Path | bytes) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    EXIF orientation is applied. Transparent pixels are composited onto white (what a browser page shows), 16-bit grey is
    scaled to 8 bits, an animation gives its first frame, and colour profiles are ignored, as Android's and the
    web's plain decoders ignore them.

    Args:
        source: a path, or the bytes of a file.

    Raises:
        ImageError: missing, not an image, truncated, empty, larger than `MAX_PIXELS`, or of an unsupported pixel type.
    """
    if isinstance(source, bytes):
        name, data = "The image", source
    else:
        name = str(source)
        if not source.exists():
            raise ImageError(f"{name} does not exist", "Check the path")
        if source.is_dir():
            raise ImageError(f"{name} is a folder, not an image file", "Give one image file")
        try:
            data = source.read_bytes()
        except OSError as problem:
            raise ImageError(f"{name} cannot be read ({problem.strerror})", "Check its permissions") from problem
    if not data:
        raise ImageError(f"{name} is empty (0 bytes)", "Copy or download it again")
    image = _open(name, data)
    try:
        image.load()
    except Exception as problem:  # on damaged bytes Pillow's decoders raise nearly anything
        raise ImageError(f"{name} is truncated or damaged ({problem})", "Copy or download it again") from problem
    # Damaged EXIF says nothing about the pixels: they stay as stored.
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    return _to_rgb(name, image)


def preprocess(image: Image.Image, spec: PreprocessSpec) -> np.ndarray:
    """The model's input for an image of any size: (height, width, 3) uint8, RGB.

    `stretch` resizes to the whole input. `letterbox` resizes by the smaller of the two factors (the other side rounded
    half up, at least 1 pixel), puts the image at the top left and fills the rest with `pad_value`. The filter is
    widened by the factor of reduction (antialiased), and applied along x before y.
    """
    image = image if image.mode == "RGB" else _to_rgb("The image", image)
    size = _resized(image.size, spec)
    image = _resize(image, size, spec.interpolation)
    if size == (spec.width, spec.height):
        return np.array(image, np.uint8)
    pixels_HWC = np.full((spec.height, spec.width, 3), spec.pad_value, np.uint8)
    pixels_HWC[: size[1], : size[0]] = np.asarray(image)
    return pixels_HWC


def scale_boxes(boxes_xyxy: np.ndarray, image_size_wh: tuple[int, int], spec: PreprocessSpec) -> np.ndarray:
    """Boxes in pixels of the image -> pixels of the model's input; (n, 4) float32."""
    return (_boxes(boxes_xyxy) * _factors(image_size_wh, spec)).astype(np.float32)


def unscale_boxes(boxes_xyxy: np.ndarray, image_size_wh: tuple[int, int], spec: PreprocessSpec) -> np.ndarray:
    """Boxes in pixels of the model's input -> pixels of the image; (n, 4) float32. Inverse of `scale_boxes`."""
    return (_boxes(boxes_xyxy) / _factors(image_size_wh, spec)).astype(np.float32)


def _open(name: str, data: bytes) -> Image.Image:
    """Read the header only, and refuse what must not be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as problem:
        raise _too_large(name, "more than 178 million pixels") from problem
    except Exception as problem:
        raise ImageError(
            f"{name} is not an image that can be read", "Save it as JPEG, PNG or WebP (HEIC and SVG are not supported)"
        ) from problem
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height})", "Save it again")
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width} x {height} pixels")
    return image


def _too_large(name: str, size: str) -> ImageError:
    return ImageError(
        f"{name} claims {size}; the limit is {MAX_PIXELS // 1_000_000} million", "Save it at a smaller size"
    )


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        grey_HW = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise ImageError(f"{name} has 32-bit pixels (mode {image.mode})", "Save it with 8 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _resize(image: Image.Image, size_wh: tuple[int, int], interpolation: str) -> Image.Image:
    if interpolation == "nearest":
        # The pixel under each centre, in whole numbers: Pillow adds up fractions, and errs where a centre is on an edge.
        columns, rows = (
            (2 * np.arange(n_out) + 1) * n_in // (2 * n_out) for n_in, n_out in zip(image.size, size_wh, strict=True)
        )
        return Image.fromarray(np.asarray(image)[rows][:, columns])
    # First along x, then along y, each rounded to 8 bits: left to itself, Pillow 13 picks the cheaper order and earlier
    # releases always this one, which differs by up to 14 levels for bicubic.
    for step in ((size_wh[0], image.height), size_wh):
        if image.size != step:
            image = image.resize(step, FILTERS[interpolation])
    return image


def _resized(image_size_wh: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """Width and height after the resize, before padding; in whole numbers so that every language rounds alike."""
    width, height = image_size_wh
    if spec.resize == "stretch":
        return spec.width, spec.height
    if spec.width * height <= spec.height * width:
        return spec.width, max(1, (2 * height * spec.width + width) // (2 * width))
    return max(1, (2 * width * spec.height + height) // (2 * height)), spec.height


def _factors(image_size_wh: tuple[int, int], spec: PreprocessSpec) -> np.ndarray:
    width, height = _resized(image_size_wh, spec)
    return np.array([width / image_size_wh[0], height / image_size_wh[1]] * 2, np.float64)


def _boxes(boxes_xyxy: np.ndarray) -> np.ndarray:
    return np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
