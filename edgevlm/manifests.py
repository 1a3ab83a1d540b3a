"""Artifacts on disk: a folder with a manifest that lists each file's SHA-256, written whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from edgevlm.artifacts import Artifact, Bundle
from edgevlm.errors import BundleError, CheckpointError, EdgeVLMError, OutputInUse

MANIFEST = "manifest.json"
A = TypeVar("A", bound=Artifact)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, artifact: Artifact) -> Artifact:
    """Hash every file of `folder`, write `manifest.json`, and return the artifact with its `files` filled in."""
    files = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    }
    artifact = artifact.model_copy(update={"files": files})
    temporary = folder / f".{MANIFEST}"
    temporary.write_text(artifact.model_dump_json(indent=1) + "\n")
    temporary.replace(folder / MANIFEST)
    return artifact


def read_manifest(folder: Path, kind: type[A], *, check_files: bool = True) -> A:
    """Read and check the artifact in `folder`.

    Raises:
        BundleError, CheckpointError: no manifest, another kind of artifact, or a file that is missing or altered.
    """
    error: type[EdgeVLMError] = BundleError if kind is Bundle else CheckpointError
    name = kind.__name__.lower()
    path = folder / MANIFEST
    if not path.is_file():
        raise error(f"No {name} in {folder} ({MANIFEST} is missing)", f"Give the folder that holds the {name}")
    try:
        artifact = kind.model_validate_json(path.read_bytes())
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise error(
            f"{path} is not a {name} of this version ({where}: {first['msg']})",
            "Export or train it again with this version of edgevlm",
        ) from problem
    if check_files:
        check_hashes(folder, artifact, error)
    return artifact


def check_hashes(folder: Path, artifact: Artifact, error: type[EdgeVLMError] = BundleError) -> None:
    """Raise `error` for the first file that is missing or differs from the manifest."""
    for name, expected in artifact.files.items():
        path = folder / name
        if not path.is_file():
            raise error(f"{path} is missing though the manifest lists it", "Copy the folder whole, or make it again")
        if file_sha256(path) != expected:
            raise error(f"{path} was altered after it was written (its SHA-256 differs)", "Make the folder again")


@contextmanager
def whole_folder(out_dir: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out_dir` that takes its place when the block ends well.

    A crash leaves `out_dir` as it was. The temporary folder survives a crash so that long work can go on from it.

    Raises:
        OutputInUse: `out_dir` exists, is not empty, and `overwrite` is False.
    """
    if out_dir.exists() and not overwrite and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise OutputInUse(f"{out_dir} exists already", "Pass --overwrite, or choose another --out")
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    yield partial
    old = out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    os.replace(partial, out_dir)
    shutil.rmtree(old, ignore_errors=True)
