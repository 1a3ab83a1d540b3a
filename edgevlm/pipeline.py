"""Stage order, resume and locking: `run` takes a recipe from nothing to a scorecard.

A stage is done if its folder holds a manifest with the right key, and the key is a hash of the recipe sections the
stage reads, of its inputs' keys and of the data. So a second run does only what is missing, and a changed recipe
reruns just what depends on the change. A stage writes into `.<name>.partial` and is renamed when it is whole.

Under `accelerate launch` every process comes here. The main one holds the lock, decides what is to do and renames; the
others take part in the stages that say `everywhere`, wait at the others, and leave after the last they take part in.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from edgevlm import __version__, processes
from edgevlm.artifacts import Artifact, Provenance, digest
from edgevlm.errors import DataError, OutputInUse, RecipeError, nearest
from edgevlm.job import Job
from edgevlm.manifests import MANIFEST, file_sha256
from edgevlm.progress import Reporter
from edgevlm.recipe import Recipe

RUN_FILE = "run.json"
FROM_OUTSIDE = ("extractor", "start", "tagger", "teacher", "trunk_weights", "vocab")
"""Recipe keys, in any section, that may name a file, folder or `module:function`: what it holds enters the key as well."""


@dataclass(frozen=True)
class Stage:
    """One step of the flow."""

    name: str
    run: Callable[[Job], Artifact]
    inputs: tuple[str, ...]
    """Stages whose artifacts it reads."""
    sections: tuple[str, ...]
    """Recipe keys it reads, top-level or dotted; a change in any other leaves it done."""
    everywhere: bool = False
    """Every process of a launch runs it (training does); else the main one alone."""


def stage_keys(stages: tuple[Stage, ...], recipe: Recipe, data_path: str | None) -> dict[str, str]:
    """Key of every stage, in order."""
    values = _with_contents(recipe.model_dump(mode="json"))
    data = data_fingerprint(data_path or recipe.data.path)
    keys: dict[str, str] = {}
    for stage in stages:
        keys[stage.name] = digest(
            {
                "stage": stage.name,
                "version": __version__,
                "sections": {name: reduce(getitem, name.split("."), values) for name in (*stage.sections, "seed")},
                "inputs": {name: keys[name] for name in stage.inputs},
                "data": data if "data" in stage.sections else "",
            }
        )
    return keys


def _with_contents(section: dict[str, Any]) -> dict[str, Any]:
    """The section, with fingerprints for the files and folders that it names."""
    found = dict(section)
    for name, value in section.items():
        if isinstance(value, dict):
            found[name] = _with_contents(value)
        elif name in FROM_OUTSIDE and isinstance(value, str):
            found[name] = _content(value)
    return found


def _content(where: str) -> str:
    """Fingerprint of the file or folder, or of the function's module; the name itself for anything else (a hub's)."""
    if Path(where).exists():
        return weights_fingerprint(Path(where))
    module, _, function = where.partition(":")
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(module) if function else None
        if spec is not None and spec.origin is not None:
            return f"{where} {weights_fingerprint(Path(spec.origin))}"
    return where


def weights_fingerprint(path: Path) -> str:
    """Hash of what a checkpoint's manifest says of it, or of a file's or folder's content."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        manifest = json.loads((path / MANIFEST).read_bytes())
        return digest({"key": manifest["provenance"]["key"], "files": manifest["files"]})
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    return digest([(f.relative_to(path).as_posix(), file_sha256(f)) for f in files])


def data_fingerprint(path: str | None) -> str:
    """Hash of the names and sizes of a dataset's files; empty for embedded data.

    Raises:
        DataError: the folder does not exist.
    """
    if path is None:
        return ""
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(
            f"No data folder {folder}", "Give the dataset's folder with --data (docs/data.md says where to get it)"
        )
    files = sorted((f.relative_to(folder).as_posix(), f.stat().st_size) for f in folder.rglob("*") if f.is_file())
    return digest(files)


def run(
    stages: tuple[Stage, ...],
    recipe: Recipe,
    out_dir: Path,
    *,
    data_path: str | None = None,
    until: str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Path]:
    """Run every stage that is not done yet; returns stage name -> folder.

    Raises:
        OutputInUse: another run holds the folder, or it holds something else.
        EdgeVLMError: whatever a stage raises; finished stages stay, the unfinished one goes on next time.
    """
    main = processes.is_main()
    reporter = (reporter if main else None) or Reporter()
    if until is not None and until not in (names := [stage.name for stage in stages]):
        raise RecipeError(f"No stage '{until}'", f"{nearest(until, names)} Stages: {', '.join(names)}")
    keys = stage_keys(stages, recipe, data_path)
    folders: dict[str, Path] = {}
    planned = stages[: 1 + next((i for i, stage in enumerate(stages) if stage.name == until), len(stages))]
    last_shared = max((i for i, stage in enumerate(planned, 1) if stage.everywhere), default=0)
    with locked(out_dir, recipe) if main else contextlib.nullcontext():
        for number, stage in enumerate(planned, 1):
            folder = folders[stage.name] = out_dir / stage.name
            label = f"[{number:2}/{len(stages)}] {stage.name}"
            shared = number <= last_shared
            if not main and not shared:
                continue
            agreed, meet = (processes.from_main, processes.barrier) if shared else (_alone, lambda: None)
            if agreed(is_done(folder, keys[stage.name])):
                reporter.say(f"{label}: done before")
                continue
            reporter.say(f"{label} ...")
            start = time.monotonic()
            job = _job(stage, recipe, folder, folders, keys, data_path, reporter)
            whole = agreed(_open_partial(job) if main else False)
            if not whole and (main or stage.everywhere):
                stage.run(job)
            meet()  # nobody still writes
            if main:
                if not whole:
                    _record_seconds(job.out_dir / MANIFEST, time.monotonic() - start)
                _put_in_place(job.out_dir, folder)
            meet()  # the artifact is there under its name
            reporter.say(f"  {stage.name} took {time.monotonic() - start:.0f} s")
    return folders


def is_done(folder: Path, key: str) -> bool:
    """Whether the folder holds the whole artifact with this key."""
    try:
        return json.loads((folder / MANIFEST).read_bytes())["provenance"]["key"] == key
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError):
        return False


def _job(
    stage: Stage,
    recipe: Recipe,
    folder: Path,
    folders: dict[str, Path],
    keys: dict[str, str],
    data_path: str | None,
    reporter: Reporter,
) -> Job:
    provenance = Provenance(
        stage=stage.name,
        key=keys[stage.name],
        parents={name: keys[name] for name in stage.inputs},
        recipe=recipe.model_dump(mode="json"),
        dataset=recipe.data.dataset,
        seed=recipe.seed,
        edgevlm=__version__,
        commit=_commit(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    inputs = {name: folders[name] for name in stage.inputs}
    return Job(recipe, inputs, folder.with_name(f".{folder.name}.partial"), provenance, data_path, reporter)


def _alone(value: bool) -> bool:
    return value


def _open_partial(job: Job) -> bool:
    """Keep the half-done folder of an earlier try with the same key, or start an empty one.

    Returns:
        Whether it is whole: a run was killed between the stage's last write and the renaming.
    """
    partial, key = job.out_dir, job.provenance.key
    key_file = partial / ".key"
    if is_done(partial, key):
        return True
    if not key_file.is_file() or key_file.read_text() != key:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        key_file.write_text(key)
    return False


def _put_in_place(partial: Path, folder: Path) -> None:
    (partial / ".key").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _record_seconds(path: Path, seconds: float) -> None:
    manifest = json.loads(path.read_bytes())
    manifest["provenance"]["seconds"] = round(seconds, 2)
    path.write_text(json.dumps(manifest, indent=1) + "\n")


def _commit() -> str:
    """Commit of the source tree edgevlm runs from; empty when it is installed."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    return ""


@contextlib.contextmanager
def locked(out_dir: Path, recipe: Recipe) -> Iterator[None]:
    """Hold `out_dir` for this process; the lock vanishes with the process, however it ends.

    Raises:
        OutputInUse: another process holds it, or the folder is not a run of edgevlm.
    """
    marker = out_dir / RUN_FILE
    if out_dir.exists() and not out_dir.is_dir():
        raise OutputInUse(f"{out_dir} is a file", "Choose a folder with --out")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not marker.is_file():
        raise OutputInUse(f"{out_dir} holds files that no run of edgevlm wrote", "Choose another --out")
    out_dir.mkdir(parents=True, exist_ok=True)
    with marker.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise OutputInUse(
                f"Another run is writing to {out_dir}", "Wait for it, or choose another --out"
            ) from problem
        file.truncate(0)
        file.write(json.dumps({"recipe": recipe.name, "edgevlm": __version__}) + "\n")
        file.flush()
        yield
