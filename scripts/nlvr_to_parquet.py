"""Convert a checkout of NLVR (github.com/lil-lab/nlvr) to the folder that edgevlm reads; see docs/data.md.

    python scripts/nlvr_to_parquet.py CHECKOUT OUT

Reads `<split>/<split>.json` and `<split>/images/<directory>/<split>-<identifier>-<permutation>.png` (in CHECKOUT or
its subfolder `nlvr`), writes `<split>.jsonl` and `images-<split>-p0.parquet`, `images-<split>-p1-5.parquet`.
The PNG images become lossless WebP: the same pixels in about a tenth of the space.
"""

import argparse
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from edgevlm.data.preprocess import load_image
from edgevlm.errors import DataError, EdgeVLMError, OutputInUse

SPLITS = ("train", "dev", "test")
SCHEMA = pa.schema(
    [("image_name", pa.string()), ("identifier", pa.string()), ("perm", pa.int8()), ("image", pa.binary())]
)
ROWS_PER_GROUP = 1000


def convert(checkout: Path, out: Path) -> dict[str, int]:
    """Convert every split of a checkout; returns file name -> number of images.

    Raises:
        DataError: a split has no records or no images.
        OutputInUse: `out` holds one of the files already.
    """
    root = checkout / "nlvr" if (checkout / "nlvr" / "dev").is_dir() else checkout
    out.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for split in SPLITS:
        records = root / split / f"{split}.json"
        if not records.is_file():
            raise DataError(f"{records} is missing", "Give the folder of a complete checkout of lil-lab/nlvr")
        images = _find_images(root / split / "images", split)
        _refuse_existing(out / f"{split}.jsonl")
        (out / f"{split}.jsonl").write_bytes(records.read_bytes())
        for name, first, last in (("p0", 0, 0), ("p1-5", 1, 5)):
            file = out / f"images-{split}-{name}.parquet"
            _refuse_existing(file)
            chosen = [image for image in images if first <= image[2] <= last]
            _write(file, chosen)
            counts[file.name] = len(chosen)
    return counts


def _find_images(folder: Path, split: str) -> list[tuple[Path, str, int]]:
    """(file, identifier, permutation) of a split, in the order of directory, identifier and permutation."""
    pattern = re.compile(rf"{split}-(\d+)-(\d+)-([0-5])\.png")
    found = []
    for file in folder.glob(f"*/{split}-*.png"):
        if match := pattern.fullmatch(file.name):
            major, minor, permutation = (int(group) for group in match.groups())
            found.append(((file.parent.name, major, minor, permutation), file))
    if not found:
        raise DataError(
            f"{folder} holds no images named {split}-<identifier>-<permutation>.png",
            "Download the images as the README of lil-lab/nlvr says, and unpack them there",
        )
    return [(file, f"{major}-{minor}", permutation) for (_, major, minor, permutation), file in sorted(found)]


def _write(path: Path, images: list[tuple[Path, str, int]]) -> None:
    with pq.ParquetWriter(path, SCHEMA, compression="none") as writer:  # WebP does not compress further
        for rows in _groups(images):
            writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))


def _groups(images: list[tuple[Path, str, int]]) -> Iterator[list[dict[str, object]]]:
    for start in range(0, len(images), ROWS_PER_GROUP):
        yield [
            {"image_name": file.name, "identifier": identifier, "perm": permutation, "image": _webp(file)}
            for file, identifier, permutation in images[start : start + ROWS_PER_GROUP]
        ]


def _webp(path: Path) -> bytes:
    buffer = io.BytesIO()
    load_image(path).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise OutputInUse(f"{path} exists already", "Choose another output folder")


def main() -> int:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description="Convert a checkout of lil-lab/nlvr to the folder that edgevlm reads.")
    parser.add_argument("checkout", type=Path, help="folder of the checkout, with the PNG images")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    try:
        counts = convert(arguments.checkout, arguments.out)
    except EdgeVLMError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for name, count in counts.items():
        print(f"{name}: {count} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
