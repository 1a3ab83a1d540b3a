"""Stage `regions`: run the frozen extractor over all splits once; the fusion is then trained on the cached features.

As in MiniVLM, the extractor is not tuned with the fusion, so an image costs its encoding once and not once per
question and epoch. A split is cut into shards of some images each, which the processes share and a resume keeps:
`<split>/images-00000.parquet` and `<split>/questions-00000.parquet` (`edgevlm/train/shards.py`).
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgevlm import processes
from edgevlm.artifacts import VOCABULARY, WEIGHTS, Checkpoint, Labels, RegionCache, digest
from edgevlm.data import Reader, open_reader
from edgevlm.data.frames import Frames, make_questions, materialise_shards
from edgevlm.data.text import Tokenizer
from edgevlm.errors import CheckpointError
from edgevlm.job import Job
from edgevlm.manifests import MANIFEST, read_manifest
from edgevlm.models import vlm
from edgevlm.models.regions import box_iou
from edgevlm.models.tee import TEE, Regions
from edgevlm.models.vlm import VLM
from edgevlm.tasks import pairs, vqa
from edgevlm.train.captions import save_captions
from edgevlm.train.checkpoints import finish
from edgevlm.train.shards import MappedColumn, Table, TableFile, write_table

MATCH_IOU = 0.5
"""A region stands for the ground-truth object it overlaps this much."""

IN_MEMORY_MB = 4096
"""Features of a split that the processes of a machine hold in memory; those of a larger one are read from its files."""

IMAGES: dict[str, Any] = {"table": "images"}
"""Field metadata: one row per image. Every other field has one per question."""
IDS = "ids"
"""Column of the images' files with the sample ids; read for messages only."""
INDEX: dict[str, Any] = {"index": True}
"""Field metadata: row numbers of images; in a shard's file they count from the shard's first image."""


class AnswerBatch(NamedTuple):
    """Questions with the regions of their images, cut to the longest of the batch (B, L, N as in RegionSplit)."""

    regions: Regions
    input_ids: Tensor
    answers: Tensor
    referred: Tensor
    has_referred: Tensor
    targets: Tensor | None = None
    """(B, A) soft targets, where several annotators answered."""
    second: Regions | None = None
    """Regions of the right-hand images, where the texts are about pairs."""


@dataclass
class RegionSplit:
    """One split: regions per image, and the questions asked about them.

    Every field becomes a column of its table. A further one needs a default of None and nothing else; where rows of it
    are of different lengths in two shards, they are padded with the field's metadata `pad`, else 0.
    """

    features: Tensor | MappedColumn = field(metadata=IMAGES)
    """(I, N, D) float32; a MappedColumn is indexed like a tensor and stays on disk."""
    boxes: Tensor = field(metadata=IMAGES)
    """(I, N, 4) normalised corners."""
    scores: Tensor = field(metadata=IMAGES)
    """(I, N)."""
    image_index: Tensor = field(metadata=INDEX)
    """(Q,) image of each question."""
    input_ids: Tensor
    """(Q, L) int32."""
    answers: Tensor
    """(Q,) int64."""
    referred: Tensor
    """(Q, N) uint8: 1 where the region shows an object that the text refers to."""
    has_referred: Tensor
    """(Q,) uint8: 1 where the data say what the text refers to."""
    kinds: list[str]
    """(Q,) type of each question."""
    answer_ids: Tensor | None = field(default=None, metadata={"pad": -1})
    """(Q, K) int32: the answers that some annotator gave, where several answered; -1 = padding (`tasks/vqa.py`)."""
    soft: Tensor | None = None
    """(Q, K) training target of each of them, 0..1."""
    official: Tensor | None = None
    """(Q, K) official accuracy of each of them, 0..1."""
    second_index: Tensor | None = field(default=None, metadata=INDEX)
    """(Q,) right-hand image of each question, where texts are about pairs; `image_index` is then the left-hand one."""
    group_index: Tensor | None = None
    """(Q,) which sentence a question repeats, where texts are about pairs (for the consistency)."""

    def batch(self, rows: Tensor, score_threshold: float, pad_id: int, min_regions: int = 1) -> AnswerBatch:
        """Questions `rows`, without the columns that are padding in all of them.

        The fusion masks padding, so answers stay the same to rounding while a batch costs about half: regions that
        score below `score_threshold` come last, as does the padding of the words.
        """
        images, second = self.image_index[rows], None
        if self.second_index is not None:
            second = self.regions_of(self.second_index[rows], score_threshold, min_regions)
        regions = self.regions_of(images, score_threshold, min_regions)
        length = int((self.input_ids[rows] != pad_id).sum(1).amax())
        return AnswerBatch(
            regions,
            self.input_ids[rows, :length],
            self.answers[rows],
            self.referred[rows, : regions.scores_BN.shape[1]],
            self.has_referred[rows],
            second=second,
        )

    def regions_of(self, images: Tensor, score_threshold: float, min_regions: int = 1) -> Regions:
        """Regions of `images`, without those that score below the threshold in all of them."""
        num_regions = max(min_regions, int((self.scores[images] >= score_threshold).sum(1).amax()))
        return Regions(*(part[images, :num_regions] for part in (self.features, self.boxes, self.scores)))

    def answerable(self) -> Tensor:
        """Questions that can be trained on: one of the known answers is at least partly right."""
        right = self.answers >= 0
        if self.soft is not None:
            right = right | (self.soft > 0).any(1)
        return right.nonzero().squeeze(1)

    @classmethod
    def load(cls, folder: Path, split: str, in_memory_mb: float = IN_MEMORY_MB) -> "RegionSplit":
        """Read all shards of a split; more than `in_memory_mb` of features (float32) stay on disk and are mapped.

        Raises:
            CheckpointError: a shard is missing, damaged, or from another extractor.
        """
        files = open_shards(folder, split)
        images = [pair[0] for pair in files]
        num_images, (num_regions, width) = sum(file.num_rows for file in images), images[0].shape("features")[1:]
        mapped = num_images * num_regions * width * 4 / 1e6 > in_memory_mb / processes.world_size()
        tables, first = [], 0
        for image_file, question_file in files:
            table = image_file.read(["boxes", "scores"] if mapped else ["features", "boxes", "scores"])
            for name, column in question_file.read().items():
                table[name] = column + first if name in _names("index") else column  # pyright: ignore
            tables.append(table)
            first += image_file.num_rows
        if len({frozenset(table) for table in tables}) > 1:
            raise CheckpointError(f"The shards in {folder / split} have different columns", "Cache the regions again")
        columns: dict[str, Any] = {name: _joined(name, [table[name] for table in tables]) for name in tables[0]}
        columns["features"] = MappedColumn(images, "features") if mapped else columns["features"].float()
        return cls(**columns)

    def save(
        self,
        folder: Path,
        split: str,
        *,
        shard: int = 0,
        key: str = "",
        dtype: str = "float32",
        ids: list[str] | None = None,
    ) -> None:
        """Write one shard, with the sample ids of its images if given; it counts once its second file, theirs, is there."""
        tables: dict[str, Table] = {"questions": {}, "images": {}}
        for column in fields(self):
            value = getattr(self, column.name)
            if value is not None:
                tables[column.metadata.get("table", "questions")][column.name] = value
        if ids is not None:
            tables["images"][IDS] = ids
        tables["images"]["features"] = self.features[:].to(getattr(torch, dtype))  # pyright: ignore
        (folder / split).mkdir(parents=True, exist_ok=True)
        for table, columns in tables.items():
            write_table(shard_path(folder, split, table, shard), columns, key)


def _names(metadata: str) -> set[str]:
    return {column.name for column in fields(RegionSplit) if metadata in column.metadata}


def _joined(name: str, parts: list[Tensor | list[str]]) -> Tensor | list[str]:
    """One column of several shards."""
    words = [word for part in parts if isinstance(part, list) for word in part]
    if isinstance(parts[0], list):
        return words
    tensors: list[Tensor] = parts  # pyright: ignore[reportAssignmentType]
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        pad = next(column.metadata.get("pad", 0) for column in fields(RegionSplit) if column.name == name)
        width = max(tensor.shape[1] for tensor in tensors)
        tensors = [F.pad(tensor, (0, width - tensor.shape[1]), value=pad) for tensor in tensors]
    return torch.cat(tensors)


def shard_path(folder: Path, split: str, table: str, shard: int) -> Path:
    """File of one table (`images` or `questions`) of a shard."""
    return folder / split / f"{table}-{shard:05}.parquet"


def cached_splits(folder: Path) -> list[str]:
    """Names of the splits in a region cache."""
    return sorted({path.parent.name for path in folder.glob("*/images-*.parquet")})


def open_shards(folder: Path, split: str) -> list[tuple[TableFile, TableFile]]:
    """The (images, questions) files of a split, in order.

    Raises:
        CheckpointError: no shard, a gap, a damaged file, shards of different extractors, or fewer images than the
            cache's manifest counts.
    """
    count = len(list((folder / split).glob("images-*.parquet")))
    files = [
        (TableFile(shard_path(folder, split, "images", i)), TableFile(shard_path(folder, split, "questions", i)))
        for i in range(count)
    ]
    again = "Delete the folder and run again"
    if not files:
        raise CheckpointError(f"No cached regions of split '{split}' in {folder}", again)
    if len({file.key for pair in files for file in pair}) > 1:
        raise CheckpointError(f"The shards in {folder / split} come from different extractors or settings", again)
    if (folder / MANIFEST).is_file():
        expected = read_manifest(folder, RegionCache, check_files=False).num_images.get(split)
        found = sum(images.num_rows for images, _ in files)
        if expected is not None and found != expected:
            raise CheckpointError(f"{folder / split} holds {found} images, its manifest says {expected}", again)
    return files


def image_ids(folder: Path, split: str, images: Tensor) -> list[str]:
    """Sample ids of some images of a split, as the dataset's reader gives them."""
    files = [file for file, _ in open_shards(folder, split)]
    ends = np.cumsum([file.num_rows for file in files])
    shards = np.searchsorted(ends, images.numpy(), side="right").tolist()
    ids = {shard: files[shard].read([IDS]).get(IDS) for shard in set(shards)}
    found = []
    for image, shard in zip(images.tolist(), shards, strict=True):
        column = ids[shard]  # caches of earlier versions have none
        found.append(
            f"image {image}" if column is None else str(column[image - int(ends[shard]) + files[shard].num_rows])
        )
    return found


def shard_is_done(folder: Path, split: str, shard: int, key: str) -> bool:
    """Whether an earlier run finished this shard with the same extractor and settings."""
    try:
        return all(TableFile(shard_path(folder, split, table, shard)).key == key for table in ("images", "questions"))
    except CheckpointError:
        return False


@torch.no_grad()
def extract(tee: TEE, frames: Frames, tokenizer: Tokenizer, labels: Labels, batch_size: int = 64) -> RegionSplit:
    """Encode all frames and line up their questions."""
    regions = encode_images(tee, frames.pixels, batch_size)
    shows = _match(regions.boxes_norm_BN4 * tee.limits.cpu(), frames)
    questions = make_questions(frames, tokenizer, labels)
    referred = torch.zeros(len(questions.answers), regions.scores_BN.shape[1], dtype=torch.uint8)
    for row, (image, objects) in enumerate(zip(questions.image_index.tolist(), questions.referred, strict=True)):
        for index in objects:
            referred[row] |= (shows[image] == index).to(torch.uint8)
    images = torch.from_numpy(questions.image_index)
    second_index = group_index = None
    if frames.second is not None:
        right = encode_images(tee, frames.second, batch_size)
        regions = Regions(*(torch.cat(both) for both in zip(regions, right, strict=True)))
        second_index = images + len(frames.ids)
        group_index = torch.from_numpy(pairs.group_index([frames.ids[i] for i in images.tolist()], questions.texts))
    return RegionSplit(
        regions.features_BND.contiguous(),
        regions.boxes_norm_BN4.contiguous(),
        regions.scores_BN.contiguous(),
        images,
        torch.from_numpy(questions.input_ids),
        torch.from_numpy(questions.answers),
        referred,
        torch.tensor([len(objects) > 0 for objects in questions.referred], dtype=torch.uint8),
        questions.kinds,
        *annotators(frames, labels),
        second_index=second_index,
        group_index=group_index,
    )


@torch.no_grad()
def encode_images(tee: TEE, pixels_IHWC: np.ndarray, batch_size: int = 64) -> Regions:
    """Regions of all images, on the CPU."""
    parts: list[Regions] = []
    device = tee.anchors.device
    for start in range(0, len(pixels_IHWC), batch_size):
        pixels = torch.from_numpy(pixels_IHWC[start : start + batch_size]).to(device)
        parts.append(Regions(*(part.cpu() for part in tee(pixels.permute(0, 3, 1, 2).float()))))
    return Regions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def annotators(frames: Frames, labels: Labels) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Answer ids, soft targets and official scores per question (Q, K), where a question has several annotators."""
    texts = [text for texts in frames.texts for text in texts]
    if not any(len(text.answers) > 1 for text in texts):
        return None, None, None
    said = [text.answers or (text.answer,) * vqa.NUM_ANNOTATORS for text in texts]
    ids_QK, soft_QK, official_QK = map(torch.from_numpy, vqa.score_table(said, labels.answers))
    return ids_QK, soft_QK, official_QK


def _match(boxes_IN4: Tensor, frames: Frames) -> Tensor:
    """Index of the object each region shows, (I, N); -1 = none."""
    shows = torch.full(boxes_IN4.shape[:2], -1, dtype=torch.long)
    for image, truth in enumerate(frames.boxes):
        if len(truth):
            best, index = box_iou(boxes_IN4[image : image + 1], torch.from_numpy(truth)[None])[0].max(1)
            shows[image] = torch.where(best >= MATCH_IOU, index, -1)
    return shows


def cache_regions(job: Job) -> RegionCache:
    """Extract every split of the dataset."""
    source, dtype = job.inputs["detector"], job.recipe.regions.dtype
    model, manifest = vlm.load(source)
    tokenizer = Tokenizer(source / VOCABULARY, manifest.tokenizer)
    reader = open_reader(job.recipe.data, job.recipe.task, job.recipe.seed, job.data_path)
    for split in reader.splits:
        key = cache_key(manifest, split, dtype)
        cache_split(job, model.tee, tokenizer, manifest.labels, reader, split, job.out_dir, key)
    processes.barrier()  # all shards are there
    counts = {split: sum(file.num_rows for file, _ in open_shards(job.out_dir, split)) for split in reader.splits}
    cache = RegionCache(
        provenance=job.provenance,
        preprocess_hash=manifest.preprocess.hash,
        extractor_hash=manifest.files[WEIGHTS],
        num_images=counts,
    )
    return finish(job.out_dir, cache)


def cache_split(
    job: Job, tee: TEE, tokenizer: Tokenizer, labels: Labels, reader: Reader, split: str, folder: Path, key: str
) -> None:
    """Extract one split into `folder`; each process takes every so-manieth shard, without those that are there."""
    recipe, section = job.recipe, job.recipe.regions
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tee = tee.eval().to(device, memory_format=torch.channels_last)  # pyright: ignore  (a quarter faster on CPUs)
    limit = {"train": recipe.data.num_train, "val": recipe.data.num_val}.get(split, recipe.data.num_test)
    rank, world = processes.rank(), processes.world_size()

    def is_mine(shard: int) -> bool:
        return shard % world == rank and not shard_is_done(folder, split, shard, key)

    with job.reporter.bar(f"regions of {split} images", limit) as bar:
        shards = materialise_shards(reader, split, limit, recipe.preprocess, section.shard_images, is_mine)
        for shard, frames in shards:
            save_captions(folder, split, shard, frames.captions, tokenizer)
            extracted = extract(tee, frames, tokenizer, labels)
            ids = frames.ids if frames.second is None else 2 * frames.ids  # left-hand images, then right-hand ones
            extracted.save(folder, split, shard=shard, key=key, dtype=section.dtype, ids=ids)
            bar.update(shard * section.shard_images + len(frames))


@contextlib.contextmanager
def evaluation_splits(job: Job, model: VLM, manifest: Checkpoint) -> Iterator[Path]:
    """While this lasts: a cache of the evaluation splits, made with the extractor of a model that is not saved yet."""
    folder = job.out_dir / ".evaluation"
    shutil.rmtree(folder, ignore_errors=True)
    processes.barrier()
    tokenizer = Tokenizer(job.inputs["prepare"] / VOCABULARY, manifest.tokenizer)
    reader = open_reader(job.recipe.data, job.recipe.task, job.recipe.seed, job.data_path)
    for split in reader.splits:
        if split != "train":
            cache_split(job, model.tee, tokenizer, manifest.labels, reader, split, folder, job.provenance.key)
    processes.barrier()
    yield folder
    processes.barrier()
    shutil.rmtree(folder, ignore_errors=True)


def cache_key(detector: Checkpoint, split: str, dtype: str) -> str:
    """What decides the content of a split's shards, beside the data themselves."""
    specs = {name: getattr(detector, name).hash for name in ("preprocess", "tokenizer", "labels")}
    return digest({**specs, "extractor": detector.files[WEIGHTS], "split": split, "dtype": dtype})
