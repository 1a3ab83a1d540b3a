"""The region cache: what comes out is what went in, shard by shard, from memory or from disk, after any kill."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.artifacts import VOCABULARY, Checkpoint, ModelConfig, Provenance
from edgevlm.data.frames import materialise, materialise_shards
from edgevlm.data.scenes import Scenes
from edgevlm.data.text import Tokenizer
from edgevlm.errors import CheckpointError, DataError
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.recipes import load_recipe
from edgevlm.train import regions
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.prepare import prepare
from edgevlm.train.regions import RegionSplit, cached_splits, open_shards, shard_is_done, shard_path
from edgevlm.train.shards import MappedColumn, TableFile, write_table
from tests.edgevlm.tiny import SPEC, tiny_ids, tiny_regions


def a_split(num_images: int, per_image: int = 3, seed: int = 0) -> RegionSplit:
    found, count = tiny_regions(num_images, seed), num_images * per_image
    generator = torch.Generator().manual_seed(seed)
    return RegionSplit(
        found.features_BND,
        found.boxes_norm_BN4,
        found.scores_BN,
        torch.arange(num_images).repeat_interleave(per_image),
        tiny_ids(count, seed=seed),
        torch.randint(0, 4, (count,), generator=generator),
        torch.randint(0, 2, (count, 8), generator=generator).to(torch.uint8),
        torch.randint(0, 2, (count,), generator=generator).to(torch.uint8),
        [("colour", "count", "")[i % 3] for i in range(count)],
    )


def cut(split: RegionSplit, first: int, last: int) -> RegionSplit:
    """Images first..last of a split with their questions, counted from its own first image."""
    rows = (split.image_index >= first) & (split.image_index < last)
    values = {}
    for column in fields(split):
        value = getattr(split, column.name)
        if column.metadata.get("table") == "images":
            values[column.name] = value[first:last]
        elif column.name == "kinds":
            values["kinds"] = [kind for kind, kept in zip(value, rows.tolist(), strict=True) if kept]
        elif value is not None:
            values[column.name] = value[rows]
    values["image_index"] = values["image_index"] - first
    return RegionSplit(**values)


def save_in_shards(split: RegionSplit, folder: Path, size: int, **options: str) -> None:
    count = split.scores.shape[0]
    for shard, first in enumerate(range(0, count, size)):
        cut(split, first, min(first + size, count)).save(folder, "train", shard=shard, key="k", **options)


def assert_same(one: RegionSplit, other: RegionSplit, atol: float = 0.0) -> None:
    for column in fields(one):
        a, b = getattr(one, column.name), getattr(other, column.name)
        if column.name == "kinds" or a is None:
            assert a == b
        else:
            assert a[:].dtype == b[:].dtype
            torch.testing.assert_close(a[:], b[:], atol=atol, rtol=0)


@pytest.mark.parametrize("size", [4, 8, 13, 100])
def test_a_split_survives_the_disk_bitwise(tmp_path: Path, size: int) -> None:
    split = a_split(29)
    save_in_shards(split, tmp_path, size)
    assert cached_splits(tmp_path) == ["train"]
    assert_same(split, RegionSplit.load(tmp_path, "train"))


def test_half_precision_halves_the_file_and_rounds_to_three_digits(tmp_path: Path) -> None:
    split = a_split(64)
    split.save(tmp_path / "full", "train")
    split.save(tmp_path / "half", "train", dtype="float16")
    loaded = RegionSplit.load(tmp_path / "half", "train")
    assert loaded.features[:].dtype == torch.float32
    torch.testing.assert_close(loaded.features[:], split.features[:], atol=0, rtol=2**-10)  # half a unit of 11 bits
    sizes = [shard_path(tmp_path / name, "train", "images", 0).stat().st_size for name in ("full", "half")]
    saved = 64 * 8 * 32 * 2
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.02)


def test_a_mapped_split_gives_the_same_batches(tmp_path: Path) -> None:
    split = a_split(29)
    save_in_shards(split, tmp_path, 10)
    mapped = RegionSplit.load(tmp_path, "train", in_memory_mb=0)
    assert isinstance(mapped.features, MappedColumn)
    assert tuple(mapped.features.shape) == tuple(split.features.shape)
    for rows in torch.randperm(87, generator=torch.Generator().manual_seed(1)).split(16):
        one, other = split.batch(rows, 0.3, 0), mapped.batch(rows, 0.3, 0)
        for a, b in zip((*one.regions, *one[1:]), (*other.regions, *other[1:]), strict=True):
            assert a is b is None or torch.equal(a, b)


@given(st.lists(st.integers(0, 36), min_size=1, max_size=40), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_a_mapped_column_is_indexed_like_a_tensor(column_files: list[TableFile], rows: list[int], count: int) -> None:
    column, whole = MappedColumn(column_files, "features"), a_split(37).features
    index = torch.tensor(rows)
    assert torch.equal(column[index, :count], whole[index, :count])
    assert torch.equal(column[index], whole[index])


@pytest.fixture(scope="module")
def column_files(tmp_path_factory: pytest.TempPathFactory) -> list[TableFile]:
    folder = tmp_path_factory.mktemp("column")
    save_in_shards(a_split(37), folder, 15)
    return [images for images, _ in open_shards(folder, "train")]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mapped_rows_are_what_pyarrow_decodes(tmp_path: Path, dtype: str) -> None:
    """Over several row groups and pages of more than a megabyte, Parquet's usual limit for a page."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(700, 40, 96, generator=generator).to(getattr(torch, dtype))
    write_table(tmp_path / "t.parquet", {"first": torch.arange(700), "x": values}, "k")
    file = TableFile(tmp_path / "t.parquet")
    rows = np.array([0, 1, 255, 256, 511, 512, 699])
    decoded = pq.read_table(tmp_path / "t.parquet").column("x")
    expected = np.stack([np.frombuffer(decoded[int(r)].as_py(), dtype).reshape(40, 96) for r in rows])
    assert np.array_equal(file.rows("x", rows), expected)
    assert np.array_equal(expected, values[rows].numpy())
    assert np.array_equal(file.rows("first", rows), rows)


def test_a_file_of_another_layout_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, {"x": torch.rand(300, 512)}, "k")
    pq.write_table(pq.read_table(path), path, data_page_size=4096, use_dictionary=False, compression="none")
    with pytest.raises(CheckpointError, match="laid out"):
        TableFile(path).rows("x", np.array([3]))


def test_any_reader_of_parquet_opens_it(tmp_path: Path) -> None:
    """Plain pyarrow sees the columns, and the bytes of a row are the numbers."""
    split = a_split(5)
    split.save(tmp_path, "val")
    table = pq.read_table(shard_path(tmp_path, "val", "images", 0))
    assert set(table.column_names) == {"features", "boxes", "scores"}
    row = np.frombuffer(table.column("boxes")[3].as_py(), np.float32).reshape(8, 4)
    assert np.array_equal(row, split.boxes[3].numpy())


def test_shards_of_different_widths_are_padded(tmp_path: Path) -> None:
    split = a_split(8)
    save_in_shards(split, tmp_path, 8)
    longer = replace(split, input_ids=torch.cat([split.input_ids, split.input_ids], 1))
    longer.save(tmp_path, "train", shard=1, key="k")
    loaded = RegionSplit.load(tmp_path, "train")
    assert loaded.input_ids.shape == (48, 24)
    assert not loaded.input_ids[:24, 12:].any()
    assert torch.equal(loaded.input_ids[24:], longer.input_ids)


def test_damaged_foreign_and_missing_shards_are_noticed(tmp_path: Path) -> None:
    split = a_split(20)
    save_in_shards(split, tmp_path, 5)
    assert shard_is_done(tmp_path, "train", 2, "k")
    assert not shard_is_done(tmp_path, "train", 2, "another key")
    assert not shard_is_done(tmp_path, "train", 7, "k")
    path = shard_path(tmp_path, "train", "images", 2)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert not shard_is_done(tmp_path, "train", 2, "k")
    with pytest.raises(CheckpointError, match="images-00002"):
        RegionSplit.load(tmp_path, "train")
    path.write_bytes(whole)
    shard_path(tmp_path, "train", "questions", 1).unlink()
    with pytest.raises(CheckpointError, match="questions-00001"):
        RegionSplit.load(tmp_path, "train")
    cut(split, 5, 10).save(tmp_path, "train", shard=1, key="other extractor")
    with pytest.raises(CheckpointError, match="different extractors"):
        RegionSplit.load(tmp_path, "train")
    with pytest.raises(CheckpointError, match="No cached regions of split 'val'"):
        RegionSplit.load(tmp_path, "val")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job for stage `regions` behind a random detector: 130 training images, 64 to a shard."""
    settings = ["data.num_train=130", "data.num_val=3", "data.num_test=3", "regions.shard_images=64"]
    recipe = load_recipe("test-scenes", settings)
    folders = {name: tmp_path / name for name in ("prepare", "detector", "regions")}
    for folder in folders.values():
        folder.mkdir()
    provenance = Provenance(stage="test", key="k")
    vocabulary = prepare(Job(recipe, {}, folders["prepare"], provenance))
    torch.manual_seed(0)
    specs = {"preprocess": vocabulary.preprocess, "tokenizer": vocabulary.tokenizer, "labels": vocabulary.labels}
    config = ModelConfig(tee=TEES["test-tee"], fusion=FUSIONS["none"])
    manifest = Checkpoint(provenance=provenance, model=config, task="detection", **specs)
    save_checkpoint(folders["detector"], vlm.build(manifest), folders["prepare"] / VOCABULARY, manifest)
    return Job(recipe, folders, folders["regions"], provenance)


def test_a_killed_stage_keeps_its_shards_and_ends_with_the_direct_result(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are whole batches of 64 images here, so the features are those of one pass over all images, bitwise."""
    made: list[int] = []
    original = regions.extract

    def killed_at_the_third(*arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(len(arguments[1]))
        return original(*arguments)

    monkeypatch.setattr(regions, "extract", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        regions.cache_regions(job)
    assert made == [64, 64]
    monkeypatch.setattr(regions, "extract", lambda *a: made.append(len(a[1])) or original(*a))
    cache = regions.cache_regions(job)
    assert made == [64, 64, 2, 3, 3], "nothing twice"
    assert cache.num_images == {"train": 130, "val": 3, "test": 3}

    model, manifest = vlm.load(job.inputs["detector"])
    tokenizer = Tokenizer(job.inputs["detector"] / VOCABULARY, manifest.tokenizer)
    reader = Scenes("vqa", job.recipe.seed, job.recipe.data.texts_per_image)
    frames = materialise(reader, "train", 130, job.recipe.preprocess)
    assert_same(original(model.tee, frames, tokenizer, manifest.labels), RegionSplit.load(job.out_dir, "train"))


def test_another_detector_makes_another_key(job: Job) -> None:
    manifest = vlm.load(job.inputs["detector"])[1]
    changed = manifest.model_copy(update={"files": {**manifest.files, "model.safetensors": "0" * 64}})
    resized = manifest.model_copy(update={"preprocess": manifest.preprocess.model_copy(update={"height": 96})})
    keys = {regions.cache_key(m, "train", "float32") for m in (manifest, changed, resized)}
    keys |= {regions.cache_key(manifest, "val", "float32"), regions.cache_key(manifest, "train", "float16")}
    assert len(keys) == 5


def test_shards_with_different_columns_are_noticed(tmp_path: Path) -> None:
    a_split(4).save(tmp_path, "train", shard=0)
    split = a_split(4)
    columns = {"boxes": split.boxes, "scores": split.scores, "features": split.features, "extra": split.scores}
    write_table(shard_path(tmp_path, "train", "images", 1), columns, "")  # pyright: ignore
    write_table(shard_path(tmp_path, "train", "questions", 1), {"image_index": split.image_index}, "")
    with pytest.raises(CheckpointError, match="different columns"):
        RegionSplit.load(tmp_path, "train")


def test_a_crash_while_writing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(table, path, **options):
        Path(path).write_bytes(b"PAR1 half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", torn)
    with pytest.raises(KeyboardInterrupt):
        write_table(tmp_path / "images-00000.parquet", {"x": torch.zeros(3)}, "k")
    assert not list(tmp_path.glob("images-*"))


class Streamed:
    """A reader that can only be read from the start."""

    def __init__(self, inner: Scenes) -> None:
        self._inner, self.name, self.labels, self.splits = inner, inner.name, inner.labels, inner.splits

    def samples(self, split: str, limit: int | None = None):
        return self._inner.samples(split, limit)


@pytest.mark.parametrize("wrap", [lambda reader: reader, Streamed])
@pytest.mark.parametrize("limit", [12, 10, 3])
def test_shards_together_are_the_split(wrap, limit: int) -> None:
    reader = wrap(Scenes("vqa", 3, 2))
    whole = materialise(reader, "train", limit, SPEC)
    shards = dict(materialise_shards(reader, "train", limit, SPEC, 4, lambda _: True))
    assert sorted(shards) == list(range(-(-limit // 4)))
    assert [i for number in sorted(shards) for i in shards[number].ids] == whole.ids
    assert np.array_equal(np.concatenate([shards[number].pixels for number in sorted(shards)]), whole.pixels)
    odd = dict(materialise_shards(reader, "train", limit, SPEC, 4, lambda shard: shard % 2 == 1))
    assert sorted(odd) == [number for number in sorted(shards) if number % 2]
    assert all(odd[number].ids == shards[number].ids for number in odd)


def test_an_empty_split_is_an_error() -> None:
    class Empty(Streamed):
        def samples(self, split: str, limit: int | None = None):
            return iter(())

    with pytest.raises(DataError, match="no samples"):
        list(materialise_shards(Empty(Scenes("vqa", 3, 2)), "val", None, SPEC, 4, lambda _: True))
