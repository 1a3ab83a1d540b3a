"""What a stage is given: `stage(job) -> artifact`."""

from dataclasses import dataclass, field
from pathlib import Path

from edgevlm.artifacts import Provenance
from edgevlm.progress import Reporter
from edgevlm.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """One stage's work order: inputs, recipe, and an empty (or half-done) folder to fill."""

    recipe: Recipe
    inputs: dict[str, Path]
    """Stage name -> folder of its artifact."""
    out_dir: Path
    """A temporary folder; whoever gave the job renames it when the stage returns."""
    provenance: Provenance
    data_path: str | None = None
    """`--data`; wins over the recipe's path."""
    reporter: Reporter = field(default_factory=Reporter)
