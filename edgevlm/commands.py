"""Single steps of the flow: prune or trim a run again, and export, verify or bench what a user brings alone."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from edgevlm import __version__
from edgevlm.artifacts import (
    Artifact,
    Bundle,
    Checkpoint,
    DeviceReport,
    GovernorCalibration,
    ParityReport,
    Provenance,
    digest,
)
from edgevlm.bench.local import bench_bundle
from edgevlm.errors import BundleError, CheckpointError, RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest, whole_folder, write_manifest
from edgevlm.pipeline import is_done, stage_keys
from edgevlm.pipeline import run as run_stages
from edgevlm.progress import Reporter
from edgevlm.recipe import BenchSection, Recipe
from edgevlm.recipes import apply_override, parse_recipe
from edgevlm.stages import LATENCY, check, stages_of, verify

BEFORE = {"prune": "distil", "trim": "prune"}
"""Stage -> the one whose manifest says with which recipe the run was made."""


def _provenance(stage: str, parents: dict[str, Artifact], recipe: dict | None = None) -> Provenance:
    keys = {name: artifact.provenance.key for name, artifact in parents.items()}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    key = digest({"stage": stage, "parents": keys, "created": created})
    return Provenance(stage=stage, key=key, parents=keys, recipe=recipe or {}, edgevlm=__version__, created=created)


def recipe_of(run: Path, stage: str, section: str, overrides: Sequence[str], data_path: str | None) -> Recipe:
    """The recipe of a run with overrides of one section.

    Args:
        run: its folder; `stage` and all before it are done.
        stage: the one whose manifest says with which recipe the run was made.
        section: the only one that may be overridden.
        overrides: `section.key=value`.
        data_path: as in `edgevlm run`.

    Raises:
        RecipeError: an override of another section.
        CheckpointError: the stage is missing, or one of another recipe or version.
    """
    for override in overrides:
        if not override.startswith(f"{section}."):
            raise RecipeError(
                f"'{override}' changes more than {section}", f"Override keys of the section {section} only"
            )
    values = read_manifest(run / stage, Checkpoint).provenance.recipe
    recipe = parse_recipe(values, f"inside {run / stage}")
    keys = stage_keys(stages_of(recipe), recipe, data_path)
    for name in before(recipe, section):
        if not is_done(run / name, keys[name]):
            raise CheckpointError(
                f"{run / name} is not what its recipe makes now",
                f"Run it again: edgevlm run {recipe.name} --out {run} --until {stage} (and give --data if it has data)",
            )
    for override in overrides:
        apply_override(values, override)
    return parse_recipe(values, f"inside {run / stage}")


def before(recipe: Recipe, stage: str) -> list[str]:
    """Stages before one of a recipe; not its times, which every way to prune measures anew."""
    names = [found.name for found in stages_of(recipe)]
    if stage not in names:
        raise RecipeError(f"Recipe {recipe.name} has no stage '{stage}'", "Give a run that answers questions")
    return [name for name in names[: names.index(stage)] if name != LATENCY.name or stage != "prune"]


def redo(run: Path, stage: str, overrides: Sequence[str], data: str | None, reporter: Reporter) -> Path:
    """`edgevlm prune` and `edgevlm trim`: the stage of a run, with other settings if asked; returns its folder.

    Raises:
        RecipeError: an override of another section.
        CheckpointError: what stands before the stage is missing, or of another recipe or version.
    """
    recipe = recipe_of(run, BEFORE[stage], stage, overrides, data)
    check(recipe, data)
    return run_stages(stages_of(recipe), recipe, run, data_path=data, until=stage, reporter=reporter)[stage]


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    calibration: Path | None,
    targets: Sequence[str] | None,
    precisions: Sequence[str] | None,
    overwrite: bool,
    reporter: Reporter,
    governor: Path | None = None,
) -> Bundle:
    """`edgevlm export`: a bundle from any checkpoint, written whole or not at all."""
    from targets.bundle import export_bundle

    manifest = read_manifest(checkpoint, Checkpoint)
    recipe = parse_recipe(manifest.provenance.recipe, f"inside {checkpoint}")
    calibrated = governor and read_manifest(governor, GovernorCalibration)
    with whole_folder(out, overwrite=overwrite) as partial:
        return export_bundle(
            checkpoint,
            calibration,
            partial,
            targets=tuple(targets or recipe.export.targets),
            precisions=tuple(precisions or recipe.export.precisions),
            num_golden=recipe.export.num_golden,
            provenance=_provenance("export", {"checkpoint": manifest}, manifest.provenance.recipe),
            governor=calibrated and calibrated.governor,
            reporter=reporter,
        )


def verify_folder(
    bundle: Path, checkpoint: Path, out: Path, data: str | None, overwrite: bool, reporter: Reporter
) -> ParityReport:
    """`edgevlm verify`: parity of a bundle against the checkpoint it came from.

    Raises:
        BundleError: the bundle came from another checkpoint.
    """
    source = read_manifest(checkpoint, Checkpoint)
    manifest = read_manifest(bundle, Bundle)
    if source.provenance.key not in manifest.provenance.parents.values():
        raise BundleError(f"{bundle} was not exported from {checkpoint}", "Give the checkpoint named in its manifest")
    recipe = parse_recipe(source.provenance.recipe, f"inside {checkpoint}")
    provenance = _provenance("verify", {"export": manifest, "checkpoint": source})
    with whole_folder(out, overwrite=overwrite) as partial:
        inputs = {"export": bundle, "trim": checkpoint}
        return verify(Job(recipe, inputs, partial, provenance, data, reporter))


def bench_folder(
    bundle: Path, checkpoint: Path | None, out: Path, threads: int, runs: int, overwrite: bool, reporter: Reporter
) -> DeviceReport:
    """`edgevlm bench`: latency of a bundle on this machine."""
    manifest = read_manifest(bundle, Bundle)
    settings = BenchSection(threads=threads, runs=runs)  # pyright: ignore[reportCallIssue]
    with whole_folder(out, overwrite=overwrite) as partial:
        report = bench_bundle(
            bundle,
            settings,
            _provenance("bench", {"export": manifest}),
            reporter,
            checkpoint_dir=checkpoint,
            raw_dir=partial,
        )
        return write_manifest(partial, report)  # pyright: ignore[reportReturnType]
