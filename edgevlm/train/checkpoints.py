"""Writing checkpoints: safetensors weights, the vocabulary and the manifest."""

import shutil
from pathlib import Path
from typing import TypeVar

from safetensors.torch import save_file

from edgevlm import processes
from edgevlm.artifacts import VOCABULARY, WEIGHTS, Artifact, Checkpoint
from edgevlm.manifests import write_manifest
from edgevlm.models.vlm import VLM
from edgevlm.train.loop import SNAPSHOTS

A = TypeVar("A", bound=Artifact)


def save_checkpoint(out_dir: Path, model: VLM, vocabulary: Path, manifest: Checkpoint) -> Checkpoint:
    """Write `model` into `out_dir` and return the manifest with its file hashes; only the main process writes."""
    if not processes.is_main():
        return manifest
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, out_dir / WEIGHTS
    )
    shutil.copyfile(vocabulary, out_dir / VOCABULARY)
    return finish(out_dir, manifest)


def finish(out_dir: Path, manifest: A) -> A:
    """Drop what only a resume needs and write the manifest; only the main process does."""
    if not processes.is_main():
        return manifest
    for left in out_dir.glob(SNAPSHOTS):
        left.unlink()
    return write_manifest(out_dir, manifest)  # pyright: ignore[reportReturnType]
