"""A dataset's folder, on a disk or behind any fsspec URL (s3://, gs://, hf://, https://, memory://, zip chains)."""

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from PIL import Image

from edgevlm.data.preprocess import load_image
from edgevlm.errors import DataError, ImageError


class Folder:
    """Files by their names inside one folder; a name may also be a URL or an absolute path of its own.

    Args:
        root: a local folder, or the URL of one.

    Raises:
        DataError: the URL's protocol is unknown, or the package that speaks it is not installed.
    """

    def __init__(self, root: str | Path) -> None:
        self.name = str(root).rstrip("/") or "/"
        self._fs, self._root = _open(self.name)

    def place(self, name: str) -> str:
        """How people find the file: its path or URL."""
        return name if _stands_alone(name) else f"{self.name}/{name}"

    def has(self, name: str) -> bool:
        """Whether the file or folder exists."""
        fs, path = self._locate(name)
        return bool(fs.exists(path))

    def find(self, pattern: str) -> list[str]:
        """Names that fit a glob pattern, sorted."""
        prefix = f"{self._root.rstrip('/')}/"
        return sorted(str(path).removeprefix(prefix) for path in self._fs.glob(glob.escape(prefix) + pattern))

    def require(self, *names: str, where: str) -> None:
        """Make sure that files exist, before hours of training.

        Raises:
            DataError: one is missing; it is named with `where` to get it.
        """
        for name in names or ("",):
            if not self.has(name):
                # Asked last: object stores and web servers have files, but often no folders.
                raise DataError(
                    f"{self.place(name)} is missing" if self.has("") else f"The folder {self.name} does not exist",
                    where,
                )

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            OSError: it is missing (FileNotFoundError) or cannot be read.
        """
        fs, path = self._locate(name)
        try:
            return bytes(fs.cat_file(path))
        except OSError:
            raise
        except Exception as problem:  # each remote file system has errors of its own
            raise OSError(f"{type(problem).__name__}: {problem}") from problem

    def lines(self, name: str) -> Iterator[tuple[int, str]]:
        """The lines of a UTF-8 file with their numbers from 1, without empty ones; `.gz` and the like are unpacked.

        Raises:
            DataError: it cannot be read.
        """
        fs, path = self._locate(name)
        number = 0
        try:
            with fs.open(path, "rt", encoding="utf-8", compression="infer") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, line.rstrip("\r\n")
        except FileNotFoundError as problem:
            raise DataError(f"{self.place(name)} is missing", "Check the folder") from problem
        except (OSError, UnicodeError) as problem:
            raise DataError(
                f"{self.place(name)}:{number + 1}: {problem}", "Save it as UTF-8, or copy it again"
            ) from problem

    def text(self, name: str) -> str:
        """A small text file.

        Raises:
            DataError: it is missing or not UTF-8.
        """
        try:
            return self.read(name).decode()
        except FileNotFoundError as problem:
            raise DataError(f"{self.place(name)} is missing", "Check the path") from problem
        except (OSError, UnicodeError) as problem:
            raise DataError(f"{self.place(name)} cannot be read ({problem})", "Save it as UTF-8") from problem

    def json(self, name: str) -> Any:
        """A JSON file, whole in memory.

        Raises:
            DataError: it is missing or not JSON.
        """
        try:
            return json.loads(self.read(name))
        except FileNotFoundError as problem:
            raise DataError(f"{self.place(name)} is missing", "Check the folder") from problem
        except json.JSONDecodeError as problem:
            raise DataError(
                f"{self.place(name)}:{problem.lineno}: {problem.msg}", "Copy or download it again"
            ) from problem
        except (OSError, UnicodeError) as problem:
            raise DataError(f"{self.place(name)} cannot be read ({problem})", "Copy or download it again") from problem

    def image(self, names: Sequence[str]) -> Image.Image:
        """Decode the first of several names that exists.

        Raises:
            FileNotFoundError: none does.
            ImageError: it cannot be read or decoded.
        """
        for name in names:
            try:
                data = self.read(name)
            except FileNotFoundError:
                continue
            except OSError as problem:
                raise ImageError(f"{self.place(name)} cannot be read ({problem})", "Check the file") from problem
            try:
                return load_image(data)
            except ImageError as problem:
                raise ImageError(f"{self.place(name)}: {problem.what}", problem.fix) from problem
        raise FileNotFoundError(" or ".join(map(self.place, names)))

    def _locate(self, name: str) -> tuple[Any, str]:
        if _stands_alone(name):
            return _open(name)
        return self._fs, f"{self._root.rstrip('/')}/{name}".rstrip("/") or "/"


def _stands_alone(name: str) -> bool:
    return "://" in name or "::" in name or name.startswith("/")


def _open(url: str) -> tuple[Any, str]:
    try:
        return url_to_fs(url)
    except ImportError as problem:
        raise DataError(
            f"{url} needs another package ({problem})", "Install it with pip, or copy the data here"
        ) from problem
    except ValueError as problem:
        raise DataError(f"{url} cannot be opened ({problem})", "Give a local folder or an fsspec URL") from problem
