"""Every recipe `minivlm-*` as it ships, with the smallest networks, on a tiny folder in its dataset's own layout."""

import json
import math
import string
from collections.abc import Callable
from pathlib import Path

import pytest

from edgevlm.artifacts import Checkpoint
from edgevlm.manifests import read_manifest
from edgevlm.pipeline import run
from edgevlm.recipes import load_recipe, shipped_recipes
from edgevlm.stages import check_training, last_training, stages_of
from tests.edgevlm import dataset_folders as make
from tests.edgevlm.test_readers import conceptual_as_table

SIZES = ("preprocess.height=64", "preprocess.width=64", "tee.name=test-tee", "tee.num_regions=8")
TRAINED = ("steps=2", "batch_size=4", "save_every=1")


def text_model(folder: Path) -> Path:
    """A vocabulary in BERT's format: every letter and digit, at the start of a word and inside."""
    letters = string.ascii_lowercase + string.digits + "?."
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


def coco_captions(folder: Path) -> None:
    """COCO's images in Karpathy's file: two to train on, one each to evaluate."""
    images = []
    for number, split in enumerate(["train", "restval", "val", "test"]):
        sentences = [{"raw": f"a red picture number {number}"}, {"raw": "another picture"}]
        image = {"filepath": "train2014", "filename": f"{number}.png", "cocoid": number, "split": split}
        images.append(image | {"sentences": sentences})
        make.picture(folder / f"train2014/{number}.png")
    make.write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def snli_ve(folder: Path) -> None:
    """A premise picture and one sentence of each answer per split."""
    for name in ("train", "dev", "test"):
        answers = ("entailment", "neutral", "contradiction")
        rows = [{"Flickr30K_ID": "1", "sentence2": f"sentence {a}", "gold_label": a} for a in answers]
        make.write_lines(folder / f"snli_ve_{name}.jsonl", rows)
    make.pictures(folder, ["flickr30k-images/1.jpg"])


def train(name: str, data: Path, out: Path, *overrides: str) -> Checkpoint:
    """The recipe's training, whole, with few steps and small networks."""
    recipe = load_recipe(name, [*SIZES, *overrides])
    check_training(recipe, str(data))
    last = last_training(recipe)
    folders = run(stages_of(recipe), recipe, out, data_path=str(data), until=last)
    return read_manifest(folders[last], Checkpoint)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with runs of `minivlm-detector` and `minivlm-pretrain`, which the other recipes start from."""
    folder = tmp_path_factory.mktemp("minivlm")
    vocab = text_model(folder / "words")
    make.genome(folder / "genome", 40)
    detector = [f"detector.{setting}" for setting in (*TRAINED, "trunk_weights=null", "short_sides_px=[64]")]
    words = (f"text.vocab={vocab}", "text.max_tokens=128")
    found = train("minivlm-detector", folder / "genome", folder / "detector", *detector, *words)
    assert found.task == "detection" and math.isfinite(found.metrics["map"])
    conceptual_as_table(folder / "conceptual")
    pretrain = [f"pretrain.{setting}" for setting in (*TRAINED, "start=null", "fusion.name=test-fusion")]
    extractor = f"extractor={folder / 'detector/detector'}"
    found = train("minivlm-pretrain", folder / "conceptual", folder / "pretrain", *pretrain, *words, extractor)
    assert found.model.heads == ("words", "match") and math.isfinite(found.metrics["word_loss_val"])
    return folder


FOLDERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "minivlm-vqav2": ("teacher", make.vqav2_example, "accuracy_test"),
    "minivlm-captioning": ("captioning", coco_captions, "cider_test"),
    "minivlm-retrieval": ("retrieval", make.flickr30k, "tr@1_test"),
    "minivlm-nlvr2": ("pairs", make.nlvr2_example, "consistency_test"),
    "minivlm-snli-ve": ("teacher", snli_ve, "accuracy_test.entailment"),
}
"""Recipe -> its section, what writes its data, and a metric that it must have."""


def test_no_recipe_is_forgotten() -> None:
    shipped = {name for name in shipped_recipes() if name.startswith("minivlm-")}
    assert shipped == {*FOLDERS, "minivlm-detector", "minivlm-pretrain"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_the_recipe_starts_on_tiny_data(name: str, started: Path, tmp_path: Path) -> None:
    section, write, metric = FOLDERS[name]
    write(tmp_path / "data")
    settings = [f"{section}.{setting}" for setting in (*TRAINED, f"start={started / 'pretrain/pretrain'}")]
    settings += [f"{section}.fusion.name=test-fusion", f"text.vocab={started / 'words'}"]
    found = train(name, tmp_path / "data", tmp_path / "run", *settings, f"extractor={started / 'detector/detector'}")
    assert math.isfinite(found.metrics[metric])
