"""`edgevlm train --dry-run`: counts that can be checked by hand, and mistakes found before anything runs."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from edgevlm import cli, dryrun, stages
from edgevlm.artifacts import Checkpoint, Labels, ModelConfig, Provenance, TokenizerSpec
from edgevlm.data.scenes import Scenes
from edgevlm.errors import CheckpointError, DataError, RecipeError, TrainingError
from edgevlm.manifests import write_manifest
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.recipes import load_recipe
from edgevlm.train.regions import RegionSplit, shard_path
from tests.edgevlm.dataset_folders import vqav2_example
from tests.edgevlm.tiny import tiny_regions


def recipe(*overrides: str):
    return load_recipe("test-scenes", list(overrides))


def test_activations_are_what_autograd_keeps() -> None:
    """By hand: the input of the linear layer and the mask of the ReLU's output, 4 bytes each; weights do not count."""

    class TwoLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(10, 50), nn.Linear(50, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.second(self.first(x).relu()).sum(), {}

    assert dryrun.activation_bytes(TwoLayers(), {"x": torch.randn(7, 10)}) == 4 * 7 * (10 + 50)


def test_steps_epochs_and_shares() -> None:
    settings = ["detector.batch_size=30", "detector.accumulate=4", "detector.steps=12", "data.num_train=60"]
    detector, teacher = dryrun.examine(recipe(*settings), None, processes=2).stages
    assert (detector.batch, detector.per_process, detector.per_piece) == (30, 15, 4)
    assert detector.epochs == pytest.approx(12 * 30 / 60)
    assert teacher.num_rows == 60 * 8


def test_memory_follows_the_numbers() -> None:
    plain, averaged, small = (
        dryrun.examine(recipe(*settings), None).stages[0]
        for settings in ([], ["detector.ema=0.99", "detector.optimiser=sgd"], ["detector.accumulate=2"])
    )
    trained = plain.num_trained * 4 / 1e6
    assert plain.memory_mb["gradients"] == pytest.approx(trained)
    assert (plain.memory_mb["optimiser"], plain.memory_mb["average"]) == (pytest.approx(2 * trained), 0)
    assert (averaged.memory_mb["optimiser"], averaged.memory_mb["average"]) == (pytest.approx(trained),) * 2
    assert small.memory_mb["activations"] == pytest.approx(plain.memory_mb["activations"] / 2)
    teacher = dryrun.examine(recipe(), None).stages[1]
    assert teacher.num_trained < teacher.num_parameters, "the extractor is frozen"


def test_the_cache_is_as_large_as_it_says(tmp_path: Path) -> None:
    """Against a file of as many images: the index of the file is at most 3 % on top of the numbers."""
    settings = ["data.num_train=512"]
    train = next(split for split in dryrun.examine(recipe(*settings), None).splits if split.name == "train")
    regions = tiny_regions(512)
    empty = torch.zeros(0, dtype=torch.long)
    byte = empty.to(torch.uint8)
    split = RegionSplit(*regions, empty, torch.zeros(0, 4), empty, torch.zeros(0, 8), byte, [])
    split.save(tmp_path, "train")
    size_mb = shard_path(tmp_path, "train", "images", 0).stat().st_size / 1e6
    assert train.cache_mb is not None
    assert train.cache_mb <= size_mb <= 1.03 * train.cache_mb + 0.03


def test_mistakes_are_found_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"detector\.batch_size to 16"):
        dryrun.examine(recipe(), None, processes=16)
    with pytest.raises(RecipeError, match="Did you mean 'test-tee'"):
        dryrun.examine(recipe("tee.name=test-te"), None)
    original = Scenes.sample

    def broken(self: Scenes, split: str, index: int):
        sample = original(self, split, index)
        if split == "val" and index == 3:
            sample.boxes[0, 2] = sample.boxes[0, 0]  # no width
        return sample

    monkeypatch.setattr(Scenes, "sample", broken)
    with pytest.raises(DataError, match="without area"):
        dryrun.examine(recipe(), None)


def test_every_kind_of_training_is_planned(tmp_path: Path) -> None:
    """The stages are those that `edgevlm train` runs, and their rows are what the task counts."""
    captions = load_recipe("scenes-captions", ["data.num_train=40"])
    plan = dryrun.examine(captions, None)
    assert plan.stages[-1].name == stages.last_training(captions) == "captioning"
    assert plan.stages[-1].num_rows == 40 * plan.splits[0].captions_per_image
    paired = ["pretrain={fusion: {name: test-fusion}, steps: 9, batch_size: 8}", "data.num_train=40"]
    paired += ["text.max_tokens=35", "retrieval={fusion: {name: test-fusion}, batch_size: 8, steps: 5}"]
    detector, pretrain, retrieval = dryrun.examine(recipe(*paired), None).stages
    assert (detector.num_rows, pretrain.steps, retrieval.steps) == (40, 9, 5)
    assert stages.last_training(recipe(*paired)) == retrieval.name
    assert stages.last_training(recipe()) == "teacher"
    assert stages.last_training(recipe("task=detection")) == "detector"


def test_minivlm_on_a_folder_of_vqav2(tmp_path: Path) -> None:
    """The recipe as it ships, on a folder in VQAv2's layout and an extractor that another run left."""
    labels = Labels(classes=("dog", "hat"), attributes=("red",), answers=())
    spec = TokenizerSpec(vocab_sha256="", vocab_size=30522, max_tokens=128)
    config = ModelConfig(tee=TEES["tee-d0"], fusion=FUSIONS["none"])
    shipped = load_recipe("minivlm-vqav2")
    left = Checkpoint(
        provenance=Provenance(stage="detector", key="k"),
        model=config,
        task="detection",
        preprocess=shipped.preprocess,
        tokenizer=spec,
        labels=labels,
    )
    (tmp_path / "detector").mkdir()
    write_manifest(tmp_path / "detector", left)
    folder = vqav2_example(tmp_path / "vqav2")
    changed = load_recipe("minivlm-vqav2", [f"extractor={tmp_path / 'detector'}"])
    plan = dryrun.examine(changed, str(folder))
    (teacher,) = plan.stages
    assert (teacher.name, teacher.steps, teacher.batch) == ("teacher", changed.teacher.steps, 128)
    # MiniLM's published 21 million in the layers, and at most 30,522 word embeddings of 384
    assert 21e6 < plan.parameters["fusion"] < 34e6


def test_a_missing_extractor_is_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*manifest\.json is missing"):
        dryrun.examine(recipe(f"extractor={tmp_path / 'nowhere'}"), None)


def test_the_command_prints_tables_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    options = ["train", "--recipe", "test-scenes", "--dry-run", "--processes", "2"]
    result = CliRunner().invoke(cli.app, options)
    assert result.exit_code == 0, result.output
    done = CliRunner().invoke(cli.app, [*options, "--json"])
    plan = json.loads(done.stdout)
    assert plan["processes"] == 2
    assert {split["name"] for split in plan["splits"]} == {"train", "val", "test"}
    assert [stage["name"] for stage in plan["stages"]] == ["detector", "teacher"]
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_launch_configs_are_shipped() -> None:
    path = CliRunner().invoke(cli.app, ["launch-config", "ddp"]).stdout.strip()
    assert Path(path).is_file()
    refused = CliRunner().invoke(cli.app, ["launch-config", "dpp"])
    assert isinstance(refused.exception, RecipeError) and "Did you mean 'ddp'" in str(refused.exception)
