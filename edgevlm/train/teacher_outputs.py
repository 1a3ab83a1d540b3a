"""Stage `teacher_outputs`: what a teacher says of every training question, written once and read by `distil`.

The shards are those of the region cache, so processes share them and a resume keeps what is done; row i of all shards
together is question i of the cache. A teacher of ours reads the cached regions, one from elsewhere the images.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor

from edgevlm import processes
from edgevlm.artifacts import VOCABULARY, WEIGHTS, Checkpoint, TeacherOutputs, digest
from edgevlm.data import open_reader
from edgevlm.data.answers import normalise_answer
from edgevlm.data.frames import sample_shards
from edgevlm.data.text import Tokenizer
from edgevlm.errors import CheckpointError, DataError, RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.teachers import Teacher, is_foreign, open_foreign
from edgevlm.recipe import Recipe
from edgevlm.train.answering import batch_of
from edgevlm.train.checkpoints import finish
from edgevlm.train.regions import RegionSplit, open_shards
from edgevlm.train.shards import MappedColumn, TableFile, write_table

SPLIT = "train"
AGAIN = "Delete the folder and run again"


class OutputBatch(NamedTuple):
    """What the teacher said of a batch of questions."""

    logits_BK: Tensor
    """Over the answers that it knows."""
    pooled_BD: Tensor | None
    """Its pooled states, where they were kept."""


def are_wanted(recipe: Recipe) -> bool:
    """Whether the stage `distil` reads outputs instead of running a teacher."""
    return recipe.distil.precompute or is_foreign(recipe.distil.teacher)


def teacher_outputs(job: Job) -> TeacherOutputs:
    """Ask the teacher every training question; each process takes every so-manieth shard.

    Raises:
        CheckpointError: no such teacher, or it does not fit the run.
        RecipeError: a teacher that judges sentences, for a task of questions.
        DataError: an answer that is not a number, or samples other than those in the region cache.
    """
    section, where = job.recipe.teacher_outputs, job.recipe.distil.teacher
    manifest = read_manifest(job.inputs["detector"], Checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if is_foreign(where):
        options = {"normalise": normalise_answer, "candidates": section.candidates, "device": device}
        teacher = open_foreign(where, manifest.labels.answers, **options)
        _check_use(teacher, where, job)
        known, content = teacher.known, teacher.hash
        shards = _from_images(teacher, job, manifest)
    else:
        where = "teacher"
        known = tuple(range(len(manifest.labels.answers)))
        content = read_manifest(job.inputs["teacher"], Checkpoint, check_files=False).files[WEIGHTS]
        shards = _from_regions(job, device)
    kept = {"dtype": section.dtype, "pooled": section.pooled, "candidates": section.candidates}
    specs = {name: getattr(manifest, name).hash for name in ("preprocess", "tokenizer", "labels")}
    key = digest({"teacher": content, "split": SPLIT, "extractor": manifest.files[WEIGHTS], **kept, **specs})
    (job.out_dir / SPLIT).mkdir(exist_ok=True, parents=True)
    rank, world = processes.rank(), processes.world_size()

    def is_mine(shard: int) -> bool:
        return shard % world == rank and not _is_done(job.out_dir, shard, key)

    with job.reporter.bar("teacher's answers", len(open_shards(job.inputs["regions"], SPLIT))) as bar:
        for shard, table in shards(is_mine):
            table = {name: values.to(getattr(torch, section.dtype)) for name, values in table.items()}
            write_table(_path(job.out_dir, shard), table, key)  # pyright: ignore[reportArgumentType]
            bar.update(shard + 1)
    processes.barrier()  # all shards are there
    split = RegionSplit.load(job.inputs["regions"], SPLIT)
    logits = Outputs(job.out_dir, len(split.answers)).logits
    accuracy = _accuracy(logits, known, split)
    job.reporter.say(
        f"  teacher: gives {len(known)} of the run's {len(manifest.labels.answers)} answers (the others are left out of "
        f"the imitation); right on {accuracy:.1%} of {len(split.answers)} training questions"
    )
    artifact = TeacherOutputs(
        provenance=job.provenance,
        teacher=where,
        teacher_hash=content,
        known=known,
        num_questions=len(split.answers),
        accuracy=accuracy,
    )
    return finish(job.out_dir, artifact)


class Outputs:
    """The outputs in a folder, mapped into memory and read where they are indexed.

    Raises:
        CheckpointError: shards are missing or of different teachers, or there are other questions than `num_questions`.
    """

    def __init__(self, folder: Path, num_questions: int) -> None:
        files = [TableFile(_path(folder, i)) for i in range(len(list((folder / SPLIT).glob("outputs-*.parquet"))))]
        found = sum(file.num_rows for file in files)
        if not files or len({file.key for file in files}) > 1:
            raise CheckpointError(f"{folder} holds no whole set of a teacher's outputs", AGAIN)
        if found != num_questions:
            raise CheckpointError(f"{folder} answers {found} questions, the region cache has {num_questions}", AGAIN)
        self.logits = MappedColumn(files, "logits")
        self.pooled = MappedColumn(files, "pooled") if files[0].has("pooled") else None

    def batch(self, rows: Tensor) -> OutputBatch:
        """What the teacher said of questions `rows`."""
        return OutputBatch(self.logits[rows], None if self.pooled is None else self.pooled[rows])


Shards = Callable[[Callable[[int], bool]], Iterator[tuple[int, dict[str, Tensor]]]]
"""Wanted numbers -> number and outputs of each shard."""


def _from_regions(job: Job, device: torch.device) -> Shards:
    """A teacher of ours, as `distil` would run it."""
    section = job.recipe.teacher_outputs

    @torch.no_grad()
    def ask(split: RegionSplit, model: vlm.VLM, questions: Tensor) -> dict[str, Tensor]:
        found = {"logits": torch.empty(len(questions), model.head.outer.out_features)}
        if section.pooled:
            found["pooled"] = torch.empty(len(questions), model.config.fusion.hidden)
        for start in range(0, len(questions), section.batch_size):
            rows = questions[start : start + section.batch_size]
            batch = send_to_device(batch_of(model, split, rows), device)
            answer = model.answer(batch.regions, batch.input_ids)  # pyright: ignore[reportAttributeAccessIssue]
            found["logits"][start : start + len(rows)] = answer.logits_BA.cpu()
            if section.pooled:
                found["pooled"][start : start + len(rows)] = answer.fusion.pooled_BD.cpu()
        return found

    def shards(wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        model = vlm.load(job.inputs["teacher"])[0].to(device)
        split = RegionSplit.load(job.inputs["regions"], SPLIT)
        counts = [questions.num_rows for _, questions in open_shards(job.inputs["regions"], SPLIT)]
        parts = torch.arange(len(split.answers)).split(counts)
        for shard in filter(wanted, range(len(parts))):
            yield shard, ask(split, model, parts[shard])

    return shards


def _from_images(teacher: Teacher, job: Job, manifest: Checkpoint) -> Shards:
    """A teacher from elsewhere: it sees the images as the dataset has them, and the texts as they are written."""
    recipe, size = job.recipe, job.recipe.teacher_outputs.batch_size
    tokenizer = Tokenizer(job.inputs["detector"] / VOCABULARY, manifest.tokenizer)

    def ask(pairs: list[tuple[str, Image.Image, str]]) -> Tensor:
        logits = teacher.logits([image for _, image, _ in pairs], [text for _, _, text in pairs])
        bad = (~torch.isfinite(logits)).any(1).nonzero().flatten().tolist()
        if bad:
            sample, _, text = pairs[bad[0]]
            raise DataError(f"The teacher's logits of sample {sample}, {text!r}, are not numbers", "Check the teacher")
        return logits

    def shards(wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        reader = open_reader(recipe.data, recipe.task, recipe.seed, job.data_path)
        cached = [questions for _, questions in open_shards(job.inputs["regions"], SPLIT)]
        limit, shard_images = recipe.data.num_train, recipe.regions.shard_images
        for shard, samples in sample_shards(reader, SPLIT, limit, shard_images, wanted):
            parts, pending, texts = [torch.empty(0, len(teacher.known))], [], []
            for sample in samples:
                if sample.second is not None:
                    raise DataError(f"Sample {sample.id} has two images", "Teachers from elsewhere look at one")
                for text in sample.texts:
                    pending.append((sample.id, sample.image, text.text))
                    texts.append(text.text)
                while len(pending) >= size:
                    parts.append(ask(pending[:size]))
                    del pending[:size]
            if pending:
                parts.append(ask(pending))
            ids_QL = tokenizer.encode_batch(texts)
            if shard >= len(cached) or not np.array_equal(ids_QL, cached[shard].read(["input_ids"])["input_ids"]):
                raise DataError(
                    "The dataset gives other texts than those in the region cache", "Cache the regions again"
                )
            yield shard, {"logits": torch.cat(parts)}

    return shards


def _check_use(teacher: Teacher, where: str, job: Job) -> None:
    if teacher.sentences and job.recipe.task != "reasoning":
        raise RecipeError(
            f"{where} says whether a sentence fits an image; task {job.recipe.task} asks something else",
            "Take it for task reasoning, or choose a BLIP or ViLT",
        )
    if job.recipe.teacher_outputs.pooled:
        raise RecipeError(
            f"{where} gives logits and no pooled states", "Drop teacher_outputs.pooled and distil.nce_weight"
        )


def _path(folder: Path, shard: int) -> Path:
    return folder / SPLIT / f"outputs-{shard:05}.parquet"


def _is_done(folder: Path, shard: int, key: str) -> bool:
    try:
        return TableFile(_path(folder, shard)).key == key
    except CheckpointError:
        return False


def _accuracy(logits: MappedColumn, known: tuple[int, ...], split: RegionSplit) -> float:
    """Mean score of the likeliest answer over all questions."""
    right, answers = 0.0, torch.tensor(known)
    for rows in torch.arange(len(split.answers)).split(4096):
        said = answers[logits[rows].argmax(1)]
        if split.answer_ids is None or split.soft is None:
            right += float((said == split.answers[rows]).sum())
        else:
            right += float((split.soft[rows] * (split.answer_ids[rows] == said[:, None])).sum())
    return right / len(split.answers)
