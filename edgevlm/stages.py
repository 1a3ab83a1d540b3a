"""The stages of the flow, in order.

Each function fits one step of the packages below to `stage(job) -> artifact`; what a step does is decided there.
"""

import copy
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from edgevlm import processes
from edgevlm.artifacts import (
    STRUCTURE,
    VOCABULARY,
    Bundle,
    CalibrationSet,
    Checkpoint,
    DeviceReport,
    Gate,
    GovernorCalibration,
    LatencyTable,
    ParityReport,
    RegionCache,
    Scorecard,
    Structure,
    Vocabulary,
)
from edgevlm.bench.latency import check_timed, measure_table, time_model
from edgevlm.bench.local import bench_bundle
from edgevlm.compress import prune as pruning
from edgevlm.compress.distil import check_distil, distil
from edgevlm.compress.trim import check_trim, trim
from edgevlm.data import open_reader
from edgevlm.data.frames import Frames, Questions, make_questions
from edgevlm.data.text import Tokenizer
from edgevlm.errors import GateFailed, RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest, write_manifest
from edgevlm.models import vlm
from edgevlm.models.backbone import create_trunk
from edgevlm.models.groups import groups_of
from edgevlm.models.registry import resolve_fusion, resolve_tee
from edgevlm.models.teachers import is_checkpoint, is_foreign
from edgevlm.models.text_weights import find_folder
from edgevlm.models.vlm import VLM
from edgevlm.pipeline import Stage
from edgevlm.recipe import Recipe
from edgevlm.report import write_scorecard
from edgevlm.report.scorecard import join
from edgevlm.report.structure import draw_structures
from edgevlm.report.terminal import print_scorecard
from edgevlm.train.answering import train_teacher
from edgevlm.train.captioning import train_captioner
from edgevlm.train.detector import load_frames, train_detector
from edgevlm.train.pairs import train_pairs
from edgevlm.train.prepare import prepare
from edgevlm.train.pretraining import check_pretraining, pretrain
from edgevlm.train.reasoning import check_synthetic, finetune_reasoning, pretrain_reasoning
from edgevlm.train.regions import cache_regions
from edgevlm.train.retrieval import train_retrieval
from edgevlm.train.teacher_outputs import are_wanted, teacher_outputs
from edgevlm.train.teachers import adopt_teacher
from edgevlm.train.transfer import adopt_extractor
from targets.base import check_target, load_exporter
from targets.source import CalibrationData

CALIBRATION_POOL = 500
"""Training images from which the calibration set is chosen."""
VERIFIED_IMAGES = 400
"""Validation images at most that exported files are verified on; their questions are spread evenly over them."""
TIMED_IMAGES = 4
"""Training images that models whose time is measured are quantised with."""
TRAINED = ("teacher", "distil", "prune", "trim")


def _questions(job: Job, checkpoint: Path, split: str, num_images: int) -> tuple[Frames, Questions, Checkpoint]:
    manifest = read_manifest(checkpoint, Checkpoint)
    frames = load_frames(job, split, num_images)
    tokenizer = Tokenizer(checkpoint / VOCABULARY, manifest.tokenizer)
    return frames, make_questions(frames, tokenizer, manifest.labels).known(), manifest


def detector(job: Job) -> Checkpoint:
    """Train the extractor, or take the one that the recipe names."""
    return train_detector(job) if job.recipe.extractor is None else adopt_extractor(job)


def teacher(job: Job) -> Checkpoint:
    """The large model: the one that the recipe names, or from real questions alone, or going on from drawn ones."""
    if is_checkpoint(job.recipe.distil.teacher):
        return adopt_teacher(job)
    return finetune_reasoning(job) if job.recipe.synthetic else train_teacher(job)


def latency(job: Job) -> LatencyTable:
    """Measure the student and its pieces at several sizes, where the budget of pruning is a time."""
    section = job.recipe.prune
    model, manifest = vlm.load(job.inputs["distil"])
    table = measure_table(
        model,
        manifest,
        groups_of(model, section.parts),
        _few_samples(job),
        target=section.target,
        precision=section.precision,
        threads=section.threads,
        round_to=section.round_to,
        provenance=job.provenance,
        reporter=job.reporter,
    )
    job.reporter.say(f"  student: {table.whole_ms:.3f} ms on {section.target} {section.precision}")
    return write_manifest(job.out_dir, table)  # pyright: ignore[reportReturnType]


def _few_samples(job: Job) -> CalibrationData:
    """A few training images and questions: quantisers need some, and which ones changes no time."""
    frames, questions, _ = _questions(job, job.inputs["distil"], "train", TIMED_IMAGES)
    return CalibrationData(frames.pixels[questions.image_index], questions.input_ids)


def _meter(job: Job) -> pruning.Meter:
    """Measures candidates where the table was measured."""
    section, samples = job.recipe.prune, _few_samples(job)
    manifest = read_manifest(job.inputs["distil"], Checkpoint)

    def meter(model: VLM) -> float:
        candidate = copy.deepcopy(model).cpu().eval()
        return time_model(candidate, manifest, samples, section.target, section.precision, section.threads)

    return meter


def prune(job: Job) -> Checkpoint:
    """Prune the student, and draw what was kept."""
    checkpoint = pruning.prune(job, _meter(job) if job.recipe.prune.measure == "ms" else None)
    if processes.is_main():
        structure = Structure.model_validate_json((job.out_dir / STRUCTURE).read_bytes())
        draw_structures({job.recipe.name: structure}, job.out_dir / "structure.png")
    return checkpoint


def pruned_regions(job: Job) -> RegionCache:
    """The regions once more, as the pruned extractor sees them."""
    return cache_regions(replace(job, inputs={"detector": job.inputs["prune"]}))


def trim_pruned(job: Job) -> Checkpoint:
    """`trim` on those regions."""
    return trim(replace(job, inputs={**job.inputs, "regions": job.inputs["pruned_regions"]}))


def calibrate(job: Job) -> CalibrationSet:
    """Choose and freeze training samples for the quantisers."""
    from calibration.choose import choose, freeze

    section, data = job.recipe.calibration, job.recipe.data
    pool = min(CALIBRATION_POOL, data.num_train or CALIBRATION_POOL)
    frames, questions, manifest = _questions(job, job.inputs["trim"], "train", pool)
    chosen = choose(frames, questions, manifest.labels, num=section.num_samples, seed=job.recipe.seed)
    return freeze(
        frames,
        questions,
        chosen,
        manifest.labels,
        section,
        manifest.preprocess,
        manifest.tokenizer,
        data.dataset,
        job.out_dir,
        job.provenance,
    )


def govern(job: Job) -> GovernorCalibration:
    """Find out how far small rungs may be trusted, on the validation split as the trimmed model sees it."""
    from targets.rungs import calibrate_governor, summary

    regions = job.inputs.get(PRUNED_REGIONS.name, job.inputs["regions"])
    governor = calibrate_governor(job.inputs["trim"], regions, job.recipe.govern)
    job.reporter.say(f"  governor: {summary(governor)}")
    calibration = GovernorCalibration(provenance=job.provenance, governor=governor)
    return write_manifest(job.out_dir, calibration)  # pyright: ignore[reportReturnType]


def export(job: Job) -> Bundle:
    """Export the trimmed model to every target of the recipe."""
    from targets.bundle import export_bundle

    section = job.recipe.export
    calibrated = job.inputs.get("govern")
    governor = calibrated and read_manifest(calibrated, GovernorCalibration).governor
    return export_bundle(
        job.inputs["trim"],
        job.inputs["calibrate"],
        job.out_dir,
        targets=section.targets,
        precisions=section.precisions,
        num_golden=section.num_golden,
        provenance=job.provenance,
        governor=governor,
        reporter=job.reporter,
    )


def verify(job: Job) -> ParityReport:
    """Let every exported file answer validation questions beside PyTorch."""
    from targets.parity import verify_bundle

    section, data = job.recipe.verify, job.recipe.data
    frames, questions, _ = _questions(
        job, job.inputs["trim"], "val", min(VERIFIED_IMAGES, data.num_val or VERIFIED_IMAGES)
    )
    questions = questions.spread(section.num_samples)
    report = verify_bundle(
        job.inputs["export"], job.inputs["trim"], questions, frames.pixels, section, job.provenance, job.reporter
    )
    return write_manifest(job.out_dir, report)  # pyright: ignore[reportReturnType]


def bench(job: Job) -> DeviceReport:
    """Measure every exported file on this machine."""
    section = job.recipe.bench
    report = bench_bundle(
        job.inputs["export"],
        section,
        job.provenance,
        job.reporter,
        checkpoint_dir=job.inputs["trim"],
        raw_dir=job.out_dir,
    )
    return write_manifest(job.out_dir, report)  # pyright: ignore[reportReturnType]


def score(job: Job) -> Scorecard:
    """Join accuracy, parity, latency and size, and check the promises of the run."""
    bundle = read_manifest(job.inputs["export"], Bundle, check_files=False)
    parity = read_manifest(job.inputs["verify"], ParityReport)
    latency = read_manifest(job.inputs["bench"], DeviceReport)
    checkpoints = {name: read_manifest(job.inputs[name], Checkpoint, check_files=False) for name in TRAINED}
    training = {name: checkpoint.metrics["accuracy_test"] for name, checkpoint in checkpoints.items()}
    for name, checkpoint in checkpoints.items():
        if "accuracy_dev" in checkpoint.metrics:  # datasets that publish both are reported on both
            training[f"{name} (dev)"] = checkpoint.metrics["accuracy_dev"]
    detector = read_manifest(job.inputs["detector"], Checkpoint, check_files=False)
    vocabulary = read_manifest(job.inputs["prepare"], Vocabulary, check_files=False)
    regions = read_manifest(job.inputs["regions"], RegionCache, check_files=False)
    calibration = read_manifest(job.inputs["calibrate"], CalibrationSet, check_files=False)
    stages = {"prepare": vocabulary, "detector": detector, "regions": regions, **checkpoints}
    if "govern" in job.inputs:
        stages["govern"] = read_manifest(job.inputs["govern"], GovernorCalibration, check_files=False)
    stages |= {"calibrate": calibration, "export": bundle, "verify": parity, "bench": latency}
    seconds = {name: artifact.provenance.seconds for name, artifact in stages.items()}
    gates = run_gates(job.recipe, checkpoints)
    scorecard = join(parity, latency, bundle, training, seconds, gates, job.provenance)
    write_scorecard(scorecard, job.out_dir)
    return write_manifest(job.out_dir, scorecard)  # pyright: ignore[reportReturnType]


def run_gates(recipe: Recipe, checkpoints: dict[str, Checkpoint]) -> tuple[Gate, ...]:
    """The recipe's promises about the trained models; those about exported files are parity verdicts."""
    limits, gates = recipe.gates, []
    teacher, student = (checkpoints[name].metrics for name in ("teacher", "distil"))
    if limits.min_points_above_majority is not None:
        points = 100 * (student["accuracy_test"] - student["majority_test"])
        limit = limits.min_points_above_majority
        gates.append(
            Gate(
                name="student above the majority answer",
                value=points,
                limit=limit,
                passed=points >= limit,
                unit="points",
            )
        )
    if limits.min_student_retention is not None:
        share = student["accuracy_test"] / teacher["accuracy_test"]
        limit = limits.min_student_retention
        gates.append(Gate(name="student / teacher accuracy", value=share, limit=limit, passed=share >= limit))
    return tuple(gates)


def check_training(recipe: Recipe, data_path: str | None) -> None:
    """Find the mistakes of what `edgevlm train` reads: networks and dataset.

    Raises:
        RecipeError, DataError, CheckpointError: the first mistake.
    """
    tee = resolve_tee(recipe.tee)
    create_trunk(tee.trunk, tee.first_level, tee.num_levels)
    open_reader(recipe.data, recipe.task, recipe.seed, data_path)
    if recipe.task == "detection":
        return
    if recipe.task == "pretraining" and recipe.pretrain is None:
        raise RecipeError(f"Recipe {recipe.name} has no section 'pretrain'", "Add one (docs/pretraining.md)")
    resolve_fusion(recipe.teacher.fusion)
    check_synthetic(recipe)
    if recipe.extractor is not None:
        read_manifest(Path(recipe.extractor), Checkpoint, check_files=False)
    if recipe.pretrain is not None:
        resolve_fusion(recipe.pretrain.fusion)
        check_pretraining(recipe.pretrain, recipe.text.max_tokens)
        if recipe.pretrain.tagger is not None:
            read_manifest(Path(recipe.pretrain.tagger), Checkpoint, check_files=False)


def check(recipe: Recipe, data_path: str | None) -> None:
    """Find a recipe's mistakes before anything runs: networks, dataset, ladder, targets and their libraries.

    Raises:
        RecipeError, TargetError, DataError, CheckpointError: the first mistake.
    """
    check_training(recipe, data_path)
    if recipe.task == "detection":
        return
    # A text model that cannot be had should not be missed after hours of training the detector.
    for where in (recipe.text.vocab, recipe.pretrain and recipe.pretrain.start, recipe.teacher.start):
        if where is not None:
            find_folder(where)
    if "export" not in [stage.name for stage in stages_of(recipe)]:
        return
    check_distil(recipe)
    student = resolve_fusion(recipe.distil.fusion)
    check_trim(recipe.trim, len(student.layer_heads), resolve_tee(recipe.tee).num_regions)
    if recipe.prune.measure == "ms":
        check_timed(recipe.prune.target, recipe.prune.precision)
    for target in recipe.export.targets:
        load_exporter(target)
        for precision in recipe.export.precisions:
            check_target(target, precision)


_DATA = ("data", "task", "preprocess")
_MODEL = ("prepare", "regions")
_TRAINED = ("task", "referred_weight", "synthetic")
STAGES: tuple[Stage, ...] = (
    Stage("prepare", prepare, (), ("data", "task", "preprocess", "text")),
    Stage("detector", detector, ("prepare",), (*_DATA, "tee", "extractor", "detector"), everywhere=True),
    Stage("regions", cache_regions, ("detector",), (*_DATA, "regions"), everywhere=True),
    Stage("teacher", teacher, ("detector", *_MODEL), ("teacher", *_TRAINED), everywhere=True),
    Stage("distil", distil, ("detector", "teacher", *_MODEL), ("distil", *_TRAINED), everywhere=True),
    Stage("prune", prune, ("teacher", "distil", *_MODEL), ("prune", *_TRAINED), everywhere=True),
    Stage("trim", trim, ("prune", *_MODEL), ("trim", "govern.unit", *_TRAINED), everywhere=True),
    Stage("govern", govern, ("trim", "regions"), ("govern",)),
    Stage("calibrate", calibrate, ("trim",), ("data", "calibration")),
    Stage("export", export, ("trim", "govern", "calibrate"), ("name", "export")),
    Stage("verify", verify, ("trim", "export"), ("data", "verify")),
    Stage("bench", bench, ("trim", "export"), ("bench",)),
    Stage(
        "scorecard",
        score,
        (*_MODEL, "detector", *TRAINED, "govern", "calibrate", "export", "verify", "bench"),
        ("gates",),
    ),
)
"""The flow: each stage reads only artifacts of stages above it."""

PRETRAIN = Stage("pretrain", pretrain, ("detector", "regions"), ("data", "task", "pretrain"), everywhere=True)
"""Before the teacher, in recipes that have this section."""
SYNTHETIC = Stage("synthetic", pretrain_reasoning, ("detector", *_MODEL), ("data", *_TRAINED), everywhere=True)
"""The same for drawn sentences."""
PRUNED_REGIONS = Stage("pruned_regions", pruned_regions, ("prune",), (*_DATA, "regions"), everywhere=True)
"""Behind `prune`, where that changes the extractor."""
LATENCY = Stage(
    "latency",
    latency,
    ("distil",),
    (*_DATA, "prune.target", "prune.precision", "prune.threads", "prune.parts", "prune.round_to"),
)
"""Before `prune`, where the budget is a time."""
TEACHER_OUTPUTS = Stage(
    "teacher_outputs",
    teacher_outputs,
    ("detector", "teacher", "regions"),
    ("data", "task", "teacher_outputs", "distil.teacher"),
    everywhere=True,
)
"""Before the student, where it reads a teacher's outputs instead of running it."""
FINE_TUNING: dict[str, Stage] = {
    "retrieval": Stage(
        "retrieval", train_retrieval, ("detector", *_MODEL), ("data", "task", "retrieval"), everywhere=True
    ),
    "pairs": Stage("pairs", train_pairs, ("detector", *_MODEL), ("task", "pairs"), everywhere=True),
    "captioning": Stage(
        "captioning", train_captioner, ("detector", *_MODEL), ("data", "task", "captioning"), everywhere=True
    ),
}
"""Section of the recipe -> the stage that ends the flow in its place: such models are not exported."""


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe, in order.

    Detection ends with the detector, and task `pretraining` with pre-training, for there is nothing to answer;
    fine-tuning on retrieval, pairs or captioning follows the cached regions. Otherwise pre-training, where there is
    such a section, stands before whatever is trained on the regions. A teacher's outputs, where they are read, stand
    before the student, and the regions of a pruned extractor before `trim`.
    """
    names = [stage.name for stage in STAGES]
    if recipe.task == "detection":
        return STAGES[: 1 + names.index("detector")]
    at = 1 + names.index("regions")
    before, behind = STAGES[:at], STAGES[at:]
    if recipe.task == "pretraining":
        return (*before, PRETRAIN)
    ends = tuple(stage for section, stage in FINE_TUNING.items() if getattr(recipe, section) is not None)
    if ends:
        behind = ends
    for section, stage in ((recipe.pretrain, PRETRAIN), (recipe.synthetic, SYNTHETIC)):
        if section is not None:
            first = replace(behind[0], inputs=(*behind[0].inputs, stage.name))
            behind = (stage, first, *behind[1:])
    return (*before, *(stage for one in behind for stage in _as_asked(one, recipe)))


def _as_asked(stage: Stage, recipe: Recipe) -> tuple[Stage, ...]:
    """A stage as the recipe's choices change it (a teacher of its own, an extractor that is pruned), behind what it needs."""
    if stage.name == "teacher" and is_checkpoint(recipe.distil.teacher):
        return (replace(stage, sections=(*stage.sections, "distil.teacher")),)
    if stage.name == "distil" and are_wanted(recipe):
        outputs = TEACHER_OUTPUTS
        if is_foreign(recipe.distil.teacher):
            outputs = replace(outputs, inputs=("detector", "regions"))
        return (outputs, replace(stage, inputs=(*stage.inputs, outputs.name)))
    if stage.name == "prune" and recipe.prune.measure == "ms":
        return (LATENCY, replace(stage, inputs=(*stage.inputs, LATENCY.name)))
    if stage.name == "trim" and "vision" in recipe.prune.parts:
        return (PRUNED_REGIONS, replace(stage, run=trim_pruned, inputs=(*stage.inputs, PRUNED_REGIONS.name)))
    if recipe.trim.num_rungs == 1:  # nothing to choose from
        if stage.name == "govern":
            return ()
        return (replace(stage, inputs=tuple(name for name in stage.inputs if name != "govern")),)
    if stage.name == "govern" and "vision" in recipe.prune.parts:
        return (replace(stage, inputs=(*stage.inputs, PRUNED_REGIONS.name)),)
    return (stage,)


def last_training(recipe: Recipe) -> str:
    """Where `edgevlm train` ends: behind the teacher, models are compressed and exported."""
    names = [stage.name for stage in stages_of(recipe)]
    return "teacher" if "teacher" in names else names[-1]


def show_scorecard(folder: Path, bundle: Path, console: Console) -> None:
    """Print the scorecard and what to type next.

    Raises:
        GateFailed: a row failed parity, or a promise of the recipe is broken.
    """
    scorecard = read_manifest(folder, Scorecard)
    print_scorecard(scorecard, console)
    console.print(f"Page: {folder / 'scorecard.html'}")
    console.print(f'Next: edgevlm ask {bundle} PICTURE "what colour is the large star?" --draw looked.png')
    failed = [
        f"{r.parity.target} {r.parity.precision} {r.parity.rung}"
        for r in scorecard.rows
        if r.parity.verdict == "failed"
    ]
    failed += [gate.name for gate in scorecard.gates if not gate.passed]
    if failed:
        raise GateFailed(
            f"{len(failed)} gates failed: {', '.join(failed)}", f"Read the reasons in {folder / 'SCORECARD.md'}"
        )
