"""What all readers of public datasets share: parts, limits, laziness, URLs and refusals; and those of captions and boxes."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevlm.data import READERS, open_reader
from edgevlm.data.conceptual import ConceptualCaptions
from edgevlm.data.flickr30k import Flickr30k
from edgevlm.data.frames import RandomAccess
from edgevlm.data.nlvr2 import NLVR2
from edgevlm.data.problems import Problems, Reporting
from edgevlm.data.sample import Sample
from edgevlm.data.shards import Shard, shard
from edgevlm.data.visual_genome import VisualGenome
from edgevlm.data.vqa import VisualQuestions
from edgevlm.data.vqa_files import VQAV2
from edgevlm.errors import DataError, RecipeError
from tests.edgevlm import dataset_folders as make
from tests.edgevlm.dataset_folders import pictures, write_lines


@pytest.fixture
def published() -> Path:
    return make.published()


@pytest.fixture
def vqav2(tmp_path: Path) -> Path:
    return make.vqav2_example(tmp_path)


@pytest.fixture
def nlvr2(tmp_path: Path) -> Path:
    return make.nlvr2_example(tmp_path)


def ids(samples: Iterator[Sample]) -> list[str]:
    return [sample.id for sample in samples]


def test_flickr30k_from_karpathys_file_or_the_token_file(tmp_path: Path) -> None:
    make.flickr30k(tmp_path)
    reader = Flickr30k(str(tmp_path), "retrieval")
    before = {split: list(reader.samples(split)) for split in reader.splits}
    assert {split: ids(iter(samples)) for split, samples in before.items()} == {
        "train": ["1", "2"],
        "val": ["3"],
        "test": ["4"],
    }
    assert before["val"][0].captions == tuple(f"Caption {i} of picture 3 ." for i in range(5))

    (tmp_path / "dataset_flickr30k.json").unlink()
    captions = [f"{key}.jpg#{i}\tCaption {i} of picture {key} ." for key in (1, 2, 3, 4) for i in range(5)]
    write_lines(tmp_path / "results_20130124.token", captions)
    for split, names in (("train", "1\n2\n"), ("val", "3\n"), ("test", "4.jpg\n")):
        (tmp_path / f"{split}.txt").write_text(names)
    reader = Flickr30k(str(tmp_path), "captioning")
    for split, samples in before.items():
        assert [(s.id, s.captions) for s in reader.samples(split)] == [(s.id, s.captions) for s in samples]


def test_visual_genome_names_what_is_in_its_lists(tmp_path: Path) -> None:
    make.genome(tmp_path)
    reader = VisualGenome(str(tmp_path), "pretraining")
    assert (reader.labels.classes, reader.labels.attributes) == (("cat", "dog"), ("red", "gray"))
    splits = {split: ids(reader.samples(split)) for split in reader.splits}
    assert [len(splits[split]) for split in ("train", "val", "test")] == [36, 2, 2]
    assert sorted(chain(*splits.values()), key=int) == [str(i) for i in range(1, 41)]
    sample = next(reader.samples("train"))
    # The box reaches 65 px beyond the border of the picture of 40 px, and is cut off there.
    np.testing.assert_array_equal(sample.boxes, [[5, 5, 40, 25]])
    assert (sample.classes.tolist(), sample.attributes) == ([1], ((1,),))
    assert sample.captions == ("a small dog", "it sleeps")
    assert reader.problems.left_out["object of a class outside the list"] >= 36
    assert reader.problems.left_out["attribute outside the list"] >= 36


@pytest.mark.data
def test_published_lists_of_visual_genome(published: Path, tmp_path: Path) -> None:
    make.genome(tmp_path)
    shutil.copy(published / "vocab/vg_1600_400_objects_vocab.txt", tmp_path / "objects_vocab.txt")
    shutil.copy(published / "vocab/vg_1600_400_attributes_vocab.txt", tmp_path / "attributes_vocab.txt")
    labels = VisualGenome(str(tmp_path), "detection").labels
    assert (len(labels.classes), len(labels.attributes)) == (1600, 400)
    assert labels.classes[:3] == ("yolk", "goal", "bathroom")
    assert labels.attributes[0] == "gray", "the line says gray,grey"


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (value, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def conceptual_as_table(folder: Path) -> None:
    lines = [f"caption {i}\thttp://example.org/{i}.jpg" for i in range(6)]
    write_lines(folder / "Train_GCC-training.tsv", lines)
    write_lines(folder / "Validation_GCC-1.1.0-Validation.tsv", ["caption\turl", *lines[:2]])
    pictures(folder, [f"train/00000/{i:09}.jpg" for i in range(6) if i != 3])
    pictures(folder, [f"val/{i:09}.jpg" for i in range(2)])


def conceptual_as_archives(folder: Path) -> None:
    for split, count in (("train", 6), ("val", 2)):
        (folder / split).mkdir(parents=True)
        for number in range(2):
            with tarfile.open(folder / split / f"{number:05}.tar", "w") as archive:
                for i in range(number * count // 2, (number + 1) * count // 2):
                    facts = json.dumps({"caption": f"caption {i}", "url": "http://example.org"}).encode()
                    for ending, data in (("jpg", jpeg(i)), ("json", facts), ("txt", f"caption {i}".encode())):
                        entry = tarfile.TarInfo(f"{number:05}{i:04}.{ending}")
                        entry.size = len(data)
                        archive.addfile(entry, io.BytesIO(data))


def conceptual_as_tables_with_images(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, count in (("train", 6), ("val", 2)):
        (folder / split).mkdir(parents=True)
        rows = [{"key": f"{i:09}", "caption": f"caption {i}", "jpg": None if i == 3 else jpeg(i)} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), folder / split / "00000.parquet")


@pytest.mark.parametrize(
    ("write", "missing"),
    [(conceptual_as_table, True), (conceptual_as_archives, False), (conceptual_as_tables_with_images, True)],
)
def test_conceptual_captions_in_three_layouts(tmp_path: Path, write: Callable[[Path], None], missing: bool) -> None:
    write(tmp_path)
    reader = ConceptualCaptions(str(tmp_path), "pretraining")
    captions = [sample.captions[0] for sample in reader.samples("train")]
    assert captions == [f"caption {i}" for i in range(6) if not (missing and i == 3)]
    assert sum(reader.problems.left_out.values()) == (1 if missing else 0)
    assert len(list(reader.samples("val"))) == 2
    assert [sample.captions[0] for sample in reader.samples("train", 2)] == captions[:2]
    for limit in (None, 4):
        parts = [ids(reader.samples("train", limit, Shard(rank, 2))) for rank in range(2)]
        assert all(parts), "no part is empty"
        assert sorted(chain(*parts)) == sorted(ids(reader.samples("train", limit)))


# --- all of them --------------------------------------------------------------------------------------------------


TASKS = ("vqa", "reasoning", "entailment", "captioning", "detection", "pretraining")


def offers(name: str, task: str, folder: Path) -> bool:
    """Whether a dataset takes a task; the folder is empty, so it refuses either the task or the folder."""
    with pytest.raises((RecipeError, DataError)) as problem:
        open_reader(make.section(name, folder), task, 0)
    return isinstance(problem.value, DataError)


def test_missing_files_are_named_with_where_to_get_them(tmp_path: Path) -> None:
    needing_a_folder = [name for name in READERS if name not in ("scenes", "coco")]
    for name in needing_a_folder:
        section = make.section(name, tmp_path)
        task = next(task for task in TASKS if offers(name, task, tmp_path))
        with pytest.raises(DataError) as problem:
            open_reader(section, task, 0)
        assert str(tmp_path) in problem.value.what
        assert problem.value.fix
        with pytest.raises(DataError, match="does not exist"):
            open_reader(section.model_copy(update={"path": str(tmp_path / "nowhere")}), task, 0)
        with pytest.raises(DataError, match=f"Dataset {name} needs a folder"):
            open_reader(make.section(name), task, 0)


def test_unknown_splits_and_tasks_are_refused(nlvr2: Path) -> None:
    with pytest.raises(DataError, match="no split 'tets'"):
        list(NLVR2(str(nlvr2), "reasoning").samples("tets"))
    with pytest.raises(RecipeError, match="no task 'vqa'"):
        NLVR2(str(nlvr2), "vqa")


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_parts_are_disjoint_and_make_the_whole(vqav2: Path, world: int) -> None:
    reader = VisualQuestions(str(vqav2), "vqa", VQAV2)
    for limit in (None, 5, 0):
        whole = ids(reader.samples("train", limit))
        parts = [ids(reader.samples("train", limit, Shard(rank, world))) for rank in range(world)]
        assert sum(map(len, parts)) == len(whole)
        assert sorted(chain(*parts)) == sorted(whole)
        assert parts == [ids(shard(reader.samples("train", limit), rank, world)) for rank in range(world)]
        assert all(part == [name for name in whole if name in part] for part in parts), "in order"


def test_parts_make_the_whole_without_bad_records_too(vqav2: Path) -> None:
    for name in sorted((vqav2 / "train2014").iterdir())[::3]:
        name.unlink()
    problems = Problems("skip")
    reader = VisualQuestions(str(vqav2), "vqa", VQAV2, problems=problems)
    whole = ids(reader.samples("train"))
    assert 0 < len(whole) < 22
    parts = [ids(reader.samples("train", None, Shard(rank, 3))) for rank in range(3)]
    assert sorted(chain(*parts)) == sorted(whole)
    assert problems.counts["missing image"] == 22 - len(whole), "once each, however often they are met"


def test_reading_is_lazy_and_repeats(vqav2: Path) -> None:
    reader = VisualQuestions(str(vqav2), "vqa", VQAV2)
    images = sorted((vqav2 / "train2014").iterdir())
    first = ids(reader.samples("train"))
    assert first == ids(reader.samples("train"))
    last = next(path for path in images if path.name.endswith(f"{int(first[-1]):012}.jpg"))
    last.write_bytes(b"no image")
    assert ids(reader.samples("train", len(first) - 1)) == first[:-1], "the last image is not opened"
    with pytest.raises(DataError, match=r"questions\[\d+\]: .*is not an image"):
        list(reader.samples("train"))


def test_no_such_part() -> None:
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="there is no part"):
            Shard(rank, world)


def test_the_same_from_a_url(nlvr2: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(nlvr2), "/nlvr2", recursive=True)
    try:
        remote = open_reader(make.section("nlvr2", "memory://nlvr2"), "reasoning", 0)
        local = NLVR2(str(nlvr2), "reasoning")
        for split in local.splits:
            for there, here in zip(remote.samples(split), local.samples(split), strict=True):
                assert (there.id, there.texts) == (here.id, here.texts)
                assert there.image.tobytes() == here.image.tobytes()
    finally:
        memory.rm("/nlvr2", recursive=True)


def test_urls_that_cannot_be_opened_are_explained() -> None:
    with pytest.raises(DataError, match=r"zzz://bucket/nlvr2 cannot be opened \(Protocol not known: zzz\)"):
        NLVR2("zzz://bucket/nlvr2", "reasoning")


def test_folders_with_odd_names(tmp_path: Path) -> None:
    folder = tmp_path / "my [old] photos*"
    conceptual_as_archives(folder)
    assert len(list(ConceptualCaptions(str(folder), "captioning").samples("train"))) == 6


def test_single_samples_of_visual_genome(tmp_path: Path) -> None:
    make.genome(tmp_path)
    reader = VisualGenome(str(tmp_path), "detection")
    assert isinstance(reader, RandomAccess)
    listed = list(reader.samples("train"))
    assert reader.num_samples("train", None) == len(listed) == 36
    assert reader.num_samples("train", 7) == 7
    for index in (35, 0, 17):
        alone = reader.sample("train", index)
        assert (alone.id, alone.boxes.tolist()) == (listed[index].id, listed[index].boxes.tolist())


def test_the_next_sample_stands_in_for_a_bad_one(tmp_path: Path) -> None:
    make.genome(tmp_path)
    reader = VisualGenome(str(tmp_path), "detection", Problems("skip"))
    names = ids(reader.samples("val"))
    assert len(names) == 2
    for folder in ("VG_100K", "VG_100K_2"):
        (tmp_path / folder / f"{names[1]}.jpg").unlink(missing_ok=True)
    assert [reader.sample("val", index).id for index in (0, 1)] == [names[0], names[0]]
    with pytest.raises(DataError, match=rf"objects\.json:\[\d+\]: the image .*{names[1]}\.jpg .* is missing"):
        VisualGenome(str(tmp_path), "detection").sample("val", 1)


def coco_folder(folder: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg", "width": make.WIDTH, "height": make.HEIGHT} for i in range(3)]
    good = {"image_id": 0, "category_id": 1, "bbox": [1, 2, 10, 10], "iscrowd": 0, "area": 100}
    for name in ("train", "val"):
        rows = [good | {"id": 1}, good | {"id": 2, "image_id": 1}]
        if name == "val":
            rows += [good | {"id": 3, "bbox": [1, 2, 100, 10]}, good | {"id": 4, "category_id": 9}, good | {"id": 4}]
        value = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "fish"}]}
        make.write_json(folder / f"{name}.json", value)
        pictures(folder / name, [f"{i}.jpg" for i in range(3)])
    (folder / "val/2.jpg").write_bytes(b"no picture")


def test_coco_reports_to_the_same_collector(tmp_path: Path) -> None:
    coco_folder(tmp_path)
    reader = open_reader(make.section("coco", tmp_path), "detection", 0)
    assert isinstance(reader, Reporting)
    reader.problems = problems = Problems("collect")
    assert ids(reader.samples("train")) == ["0", "1", "2"]
    assert ids(reader.samples("val")) == ["0", "1"]
    found = [str(problem).removeprefix(f"{tmp_path}/") for problem in problems.found]
    assert [text.partition(": ")[0] for text in found] == [
        "val.json:annotation 3 (image 0)",
        "val.json:annotation 4 (image 0)",
        "val.json:annotation 4 (image 0)",
        "val.json:image 2",
    ]
    assert [problem.kind for problem in problems.found] == [
        "bad box",
        "outside the list",
        "duplicate id",
        "unreadable image",
    ]
    with pytest.raises(DataError, match=r"val\.json:annotation 3 \(image 0\): bbox .* leaves the image"):
        list(open_reader(make.section("coco", tmp_path), "detection", 0).samples("val"))
