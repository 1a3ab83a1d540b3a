"""NLVR: a small release is drawn, converted with the script and read back; the real folder is checked where there is one.

The drawing below follows the words of the upstream README, not the reader's code.
"""

import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from edgevlm.artifacts import PreprocessSpec
from edgevlm.data import open_reader
from edgevlm.data.frames import materialise
from edgevlm.data.nlvr import NLVR
from edgevlm.data.sample import Sample
from edgevlm.errors import DataError, OutputInUse, RecipeError
from edgevlm.recipe import DataSection

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "nlvr_to_parquet.py"
RGB = {"Black": (0, 0, 0), "Yellow": (255, 255, 0), "#0099ff": (0, 153, 255)}
NAMES = {"black": "Black", "yellow": "Yellow", "blue": "#0099ff"}
PIXELS = {"small": 10, "medium": 20, "large": 30}


def real_folder() -> Path | None:
    root = os.environ.get("EDGEVLM_DATA")
    folder = Path(root) / "nlvr1" if root else None
    return folder if folder and folder.is_dir() else None


needs_nlvr = pytest.mark.skipif(real_folder() is None, reason="EDGEVLM_DATA does not name a folder that holds nlvr1/")


# --- a small release ---------------------------------------------------------------------------------------------


def record(split: str, directory: int, minor: int, label: str = "true") -> dict:
    rng = np.random.default_rng([len(split), directory, minor])
    boxes = []
    for _ in range(3):
        cells = rng.permutation(9)[: rng.integers(1, 4)]  # a 3 x 3 grid keeps the shapes apart
        boxes.append(
            [
                {
                    "x_loc": int(cell % 3 * 33 + rng.integers(3)),
                    "y_loc": int(cell // 3 * 33 + rng.integers(3)),
                    "size": int(rng.choice([10, 20, 30])),
                    "type": str(rng.choice(["circle", "square", "triangle"])),
                    "color": str(rng.choice(list(RGB))),
                }
                for cell in cells
            ]
        )
    return {
        "sentence": f"There is a {'yellow' if minor % 2 else 'black'} shape.",
        "label": label,
        "identifier": f"{directory}-{minor}",
        "directory": str(directory),
        "structured_rep": boxes,
        "evals": {"r1": label},
    }


def draw(boxes: list[list[dict]], order: tuple[int, ...]) -> Image.Image:
    image = Image.new("RGBA", (400, 100), (128, 128, 128, 255))
    pen = ImageDraw.Draw(image)
    for place, box in enumerate(order):
        left = 150 * place
        pen.rectangle((left, 0, left + 99, 99), fill=(211, 211, 211, 255))
        for item in boxes[box]:
            x, y, side = left + item["x_loc"], item["y_loc"], item["size"] - 1
            corners = (x, y, x + side, y + side)
            if item["type"] == "circle":
                pen.ellipse(corners, fill=RGB[item["color"]])
            elif item["type"] == "square":
                pen.rectangle(corners, fill=RGB[item["color"]])
            else:
                pen.polygon([(x, y + side), (x + side, y + side), (x + side / 2, y)], fill=RGB[item["color"]])
    return image


EXAMPLES = {"train": [(d, m) for d in (3, 10, 27, 31) for m in range(3)], "dev": [(1, 0), (1, 1)], "test": [(2, 0)]}
UNLABELLED = (10, 9)


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with PNG images, one training example of which has no record."""
    root = tmp_path_factory.mktemp("upstream")
    for split, examples in EXAMPLES.items():
        records = [record(split, *key, label="false" if sum(key) % 2 else "true") for key in examples]
        folder = root / "nlvr" / split
        folder.mkdir(parents=True)
        (folder / f"{split}.json").write_text("".join(json.dumps(entry) + "\n" for entry in records))
        drawn = records + ([record(split, *UNLABELLED)] if split == "train" else [])
        for entry in drawn:
            images = folder / "images" / entry["directory"]
            images.mkdir(parents=True, exist_ok=True)
            for k, order in enumerate(itertools.permutations(range(3))):
                draw(entry["structured_rep"], order).save(images / f"{split}-{entry['identifier']}-{k}.png")
    return root


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nlvr_to_parquet", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folder(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "nlvr"
    counts = load_script().convert(release, out)
    assert counts["images-train-p0.parquet"] == 13
    assert counts["images-dev-p1-5.parquet"] == 10
    return out


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "nlvr"))


def objects_of(sample: Sample) -> list[tuple]:
    """(x, y, side, upstream's type, upstream's colour) of each object, from the sample alone."""
    found = []
    for box, class_id, tags in zip(sample.boxes, sample.classes, sample.attributes, strict=True):
        words = [NLVR.labels.attributes[tag] for tag in tags]
        (colour,) = (NAMES[word] for word in words if word in NAMES)
        (side,) = (PIXELS[word] for word in words if word in PIXELS)
        assert (box[2:] - box[:2]).tolist() == [side, side]
        found.append((*box[:2].tolist(), side, NLVR.labels.classes[class_id], colour))
    return found


# --- converting --------------------------------------------------------------------------------------------------


def test_conversion_keeps_every_pixel(release: Path, folder: Path) -> None:
    rows = pq.read_table(folder / "images-dev-p1-5.parquet").to_pylist()
    assert [row["image_name"] for row in rows] == [f"dev-1-{m}-{k}.png" for m in (0, 1) for k in range(1, 6)]
    for row in rows:
        original = Image.open(release / "nlvr" / "dev" / "images" / "1" / row["image_name"]).convert("RGB")
        assert Image.open(io.BytesIO(row["image"])).convert("RGB").tobytes() == original.tobytes()


def test_conversion_refuses_to_overwrite_and_names_what_is_missing(release: Path, folder: Path, tmp_path: Path) -> None:
    convert = load_script().convert
    with pytest.raises(OutputInUse, match="exists already"):
        convert(release, folder)
    with pytest.raises(DataError, match=r"train\.json is missing"):
        convert(tmp_path, tmp_path / "out")


def test_conversion_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "is missing" in done.stderr
    assert "Traceback" not in done.stderr


# --- reading -----------------------------------------------------------------------------------------------------


def test_objects_and_pixels_in_every_permutation(folder: Path) -> None:
    """Objects against the records, and the colour of the pixel at each box's centre against the picture."""
    orders = list(itertools.permutations(range(3)))
    samples = list(NLVR(folder, "reasoning").samples("dev"))
    assert [sample.id for sample in samples] == [f"dev-1-{m}/p0" for m in (0, 1)] + [
        f"dev-1-{m}/p{k}" for m in (0, 1) for k in range(1, 6)
    ]
    for sample in samples:
        entry = record("dev", 1, int(sample.id[6]))
        boxes = entry["structured_rep"]
        expected = [
            (150.0 * place + item["x_loc"], float(item["y_loc"]), item["size"], item["type"], item["color"])
            for place, box in enumerate(orders[int(sample.id[-1])])
            for item in boxes[box]
        ]
        assert sorted(objects_of(sample)) == sorted(expected)
        for x, y, side, _, colour in objects_of(sample):
            assert sample.image.getpixel((int(x + side / 2), int(y + side / 2))) == RGB[colour]


def test_splits_and_permutations(folder: Path) -> None:
    reader = NLVR(folder, "reasoning")
    ids, unlabelled = {}, {}
    for split in reader.splits:
        reader.problems.left_out.clear()
        ids[split] = [sample.id for sample in reader.samples(split)]
        unlabelled[split] = reader.problems.left_out["image without a record"]
    assert {name: len(found) for name, found in ids.items()} == {"train": 9, "val": 3, "dev": 12, "test": 6}
    assert all(name.endswith("/p0") for name in ids["train"] + ids["val"])
    assert not set(ids["train"]) & set(ids["val"])
    assert len({name.split("-")[1] for name in ids["val"]}) == 1  # one whole directory of four
    assert unlabelled == {"train": 1, "val": 1, "dev": 0, "test": 0}
    assert ids["train"] == [sample.id for sample in NLVR(folder, "reasoning", seed=9).samples("train")]
    assert [sample.id for sample in reader.samples("train", 4)] == ids["train"][:4]
    assert list(reader.samples("train", 0)) == []


def test_labels_and_seen_sentences(folder: Path) -> None:
    reader = NLVR(folder, "reasoning")
    for sample in reader.samples("train"):
        directory, minor = sample.id.removeprefix("train-").removesuffix("/p0").split("-")
        (text,) = sample.texts
        assert text.answer == ("false" if (int(directory) + int(minor)) % 2 else "true")
        assert text.kind == ""
    assert {sample.texts[0].kind for sample in reader.samples("test")} == {"seen"}


def test_unseen_sentences(broken: Path) -> None:
    path = broken / "test.jsonl"
    path.write_text(path.read_text().replace("There is a", "Nobody has ever written of a"))
    assert {sample.texts[0].kind for sample in NLVR(broken, "reasoning").samples("test")} == {"unseen"}


def test_other_permutations_on_request(folder: Path) -> None:
    all_six = NLVR(folder, "reasoning", permutations={"train": range(6), "dev": (2, 5)})
    assert len(list(all_six.samples("train"))) == 54
    assert [sample.id[-2:] for sample in all_six.samples("dev")] == ["p2", "p5"] * 2
    drawn = [NLVR(folder, "reasoning", seed, {"train": "random"}) for seed in (1, 1, 2)]
    ids = [[sample.id for sample in reader.samples("train")] for reader in drawn]
    assert len({name.split("/")[0] for name in ids[0]}) == len(ids[0]) == 9
    assert ids[0] == ids[1] != ids[2]
    for wrong in ({"train": (6,)}, {"dev": ()}, {"valid": (0,)}, {"train": "all"}):
        with pytest.raises(RecipeError, match="no permutations"):
            NLVR(folder, "reasoning", permutations=wrong)  # pyright: ignore[reportArgumentType]


def test_frames_from_a_stream(folder: Path) -> None:
    reader = open_reader(DataSection(dataset="nlvr"), "reasoning", 0, str(folder))
    frames = materialise(reader, "dev", 5, PreprocessSpec(height=64, width=256), workers=2)
    assert frames.pixels.shape == (5, 64, 256, 3)
    sample = next(iter(reader.samples("dev", 1)))
    np.testing.assert_allclose(frames.boxes[0], sample.boxes * [0.64, 0.64, 0.64, 0.64], atol=1e-4)


def test_network_is_never_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(list(NLVR(folder, "reasoning").samples("dev"))) == 12


def test_a_half_read_stream_does_not_abort_the_process(folder: Path) -> None:
    script = "import sys; from pathlib import Path; from edgevlm.data.nlvr import NLVR\n"
    script += "stream = NLVR(Path(sys.argv[1]), 'reasoning').samples('dev'); print(next(stream).id)"
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "dev-1-0/p0", "")


# --- errors ------------------------------------------------------------------------------------------------------


def test_wrong_task_and_split(folder: Path) -> None:
    with pytest.raises(RecipeError, match="no task 'vqa'"):
        NLVR(folder, "vqa")
    with pytest.raises(DataError, match="no split 'valid'"):
        next(NLVR(folder, "reasoning").samples("valid"))


def test_missing_folder_and_files(broken: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path"):
        open_reader(DataSection(dataset="nlvr"), "reasoning", 0)
    with pytest.raises(DataError, match=r"nowhere does not exist\. Get NLVR from https://github\.com/lil-lab/nlvr"):
        NLVR(broken / "nowhere", "reasoning")
    for name in ("dev.jsonl", "images-train-p0.parquet", "images-test-p1-5.parquet"):
        shutil.move(broken / name, broken / "hidden")
        with pytest.raises(DataError, match=rf"{name} is missing.*docs/data\.md"):
            NLVR(broken, "reasoning")
        shutil.move(broken / "hidden", broken / name)
    assert NLVR(broken, "reasoning")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda line: line[:-5], "JSON"),
        (lambda line: line.replace('"label": "true"', '"label": "maybe"'), "label"),
        (lambda line: line.replace('"y_loc"', '"y_lock"', 1), r"structured_rep.*y_loc"),
        (lambda line: line.replace('"sentence"', '"text"'), "sentence"),
    ],
)
def test_malformed_records_name_file_and_line(broken: Path, change, complaint: str) -> None:
    path = broken / "test.jsonl"
    line = path.read_text().rstrip("\n")
    path.write_text(line + "\n\n" + change(line) + "\n")
    with pytest.raises(DataError, match=rf"test\.jsonl:3: .*{complaint}"):
        list(NLVR(broken, "reasoning").samples("test"))


def test_malformed_images(broken: Path) -> None:
    path = broken / "images-test-p0.parquet"
    table = pq.read_table(path)
    for image, complaint in ((b"RIFF", "not an image"), (_png(400, 99), "400 x 99 pixels, not 400 x 100")):
        pq.write_table(table.set_column(3, "image", [[image]]), path)
        with pytest.raises(DataError, match=rf"images-test-\*\.parquet:test-2-0/p0.*{complaint}"):
            list(NLVR(broken, "reasoning").samples("test"))
    pq.write_table(table.drop_columns(["perm"]), path)
    with pytest.raises(DataError, match="has the columns image_name, identifier, image"):
        list(NLVR(broken, "reasoning", permutations={"test": (0,)}).samples("test"))
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match="cannot be read"):
        list(NLVR(broken, "reasoning").samples("test"))


def test_bad_records_are_left_out_or_stop(broken: Path) -> None:
    """One of each kind in six good records: with `skip` the others remain, and each is named by its line."""
    path = broken / "dev.jsonl"
    good = path.read_text().splitlines()
    numbers = len(good)
    bad = [
        good[0],
        re.sub(r'"x_loc": [0-9.]+', '"x_loc": 95', good[0].replace('"identifier": "', '"identifier": "9'), count=1),
        good[0].replace('"identifier": "', '"identifier": "8'),
    ]
    path.write_text("\n".join(good + bad) + "\n")
    reader = open_reader(DataSection(dataset="nlvr", on_bad="skip"), "reasoning", 0, str(broken))
    assert isinstance(reader, NLVR)
    assert len(list(reader.samples("dev"))) == 6 * numbers
    kinds = [(problem.kind, problem.where) for problem in reader.problems.found]
    assert kinds == [("duplicate id", numbers + 1), ("bad box", numbers + 2), *[("missing image", numbers + 3)] * 6]
    with pytest.raises(DataError, match=rf"dev\.jsonl:{numbers + 1}: .*stands twice.*on_bad: skip"):
        list(NLVR(broken, "reasoning").samples("dev"))


def _png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


# --- the real folder ---------------------------------------------------------------------------------------------


@needs_nlvr
@pytest.mark.data
def test_real_dev_and_test_are_complete() -> None:
    """Published sizes: 5,934 dev and 5,940 public test images; majority 55.3 and 56.2 % (known from the labels)."""
    folder = real_folder()
    assert folder
    for split, num_images, majority in (("dev", 5934, 0.553), ("test", 5940, 0.562)):
        reader = NLVR(folder, "reasoning")
        samples = list(reader.samples(split))
        assert len(samples) == len({sample.id for sample in samples}) == num_images
        answers = Counter(sample.texts[0].answer for sample in samples)
        assert answers["true"] / num_images == pytest.approx(majority, abs=5e-4)
        seen = Counter(sample.texts[0].kind for sample in samples)["seen"] / num_images
        assert 0.40 < seen < 0.50
        assert not reader.problems.left_out
        wrong = total = 0
        for sample in samples[::25]:
            for x, y, side, _, colour in objects_of(sample):
                pixel = sample.image.getpixel((int(x + side / 2), int(y + side / 2)))
                wrong += bool(np.abs(np.subtract(pixel, RGB[colour])).max() > 60)
                total += 1
        assert total > 1500
        assert wrong == 0


@needs_nlvr
@pytest.mark.data
def test_real_training_directories_are_divided_whole() -> None:
    folder = real_folder()
    assert folder
    lines = [json.loads(line) for line in (folder / "train.jsonl").open()]
    directory_of = {f"train-{line['identifier']}/p0": line["directory"] for line in lines}
    reader = NLVR(folder, "reasoning")
    found = {split: {sample.id for sample in reader.samples(split)} for split in ("train", "val")}
    assert found["train"] | found["val"] == set(directory_of)
    directories = {split: {directory_of[name] for name in names} for split, names in found.items()}
    assert not directories["train"] & directories["val"]
    assert 0.06 < len(found["val"]) / len(directory_of) < 0.10
    assert reader.problems.left_out == {"image without a record": 4}  # two, met in either half
