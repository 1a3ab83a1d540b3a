"""Single steps of the flow for a checkpoint or bundle that a user brings alone: export, verify, bench."""

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
from edgevlm.errors import BundleError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest, whole_folder, write_manifest
from edgevlm.progress import Reporter
from edgevlm.recipe import BenchSection
from edgevlm.recipes import parse_recipe
from edgevlm.stages import verify


def _provenance(stage: str, parents: dict[str, Artifact], recipe: dict | None = None) -> Provenance:
    keys = {name: artifact.provenance.key for name, artifact in parents.items()}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    key = digest({"stage": stage, "parents": keys, "created": created})
    return Provenance(stage=stage, key=key, parents=keys, recipe=recipe or {}, edgevlm=__version__, created=created)


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
