"""Written outputs are what the live teacher says, shard by shard, from any number of processes, and `distil` learns the same."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import edgevlm.data
from edgevlm.artifacts import Labels, TeacherOutputs
from edgevlm.compress import distil as distil_stage
from edgevlm.compress.distil import DistilObjective, check_distil, distil
from edgevlm.data.sample import Text
from edgevlm.errors import CheckpointError, DataError, RecipeError, TrainingError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.pipeline import stage_keys
from edgevlm.recipes import load_recipe
from edgevlm.stages import stages_of
from edgevlm.train import answering
from edgevlm.train import teacher_outputs as outputs_module
from edgevlm.train.answering import batch_of, train_teacher
from edgevlm.train.regions import RegionSplit, image_ids
from edgevlm.train.teacher_outputs import Outputs
from tests.edgevlm.asking import ask
from tests.edgevlm.hugging_face import save_blip, save_bridgetower, save_vilt
from tests.edgevlm.launching import finish, start
from tests.edgevlm.runs import SMALL, Made, cached_job, job_for, made_sample

SHARDS = "regions.shard_images=5"
"""16 training images: four shards."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the stages up to a teacher of two training steps."""
    folder = tmp_path_factory.mktemp("run")
    job = cached_job(folder, SHARDS, "teacher.steps=2", stage="teacher")
    train_teacher(job)
    return folder


def copy_of(run: Path, folder: Path) -> Path:
    for name in ("prepare", "detector", "regions", "teacher"):
        folder.mkdir(exist_ok=True, parents=True)
        (folder / name).symlink_to(run / name, target_is_directory=True)
    return folder


def job_in(folder: Path, stage: str, *overrides: str) -> Job:
    recipe = load_recipe("test-scenes", [*SMALL, SHARDS, *overrides])
    names = ("prepare", "detector", "regions", "teacher", "teacher_outputs")
    return job_for(stage, folder, recipe, {name: folder / name for name in names})


@torch.no_grad()
def live(folder: Path, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and pooled states as `distil` would have them, in batches of its own."""
    teacher, _ = vlm.load(folder / "teacher")
    batch = batch_of(teacher, RegionSplit.load(folder / "regions", "train"), rows)
    answer = teacher.answer(batch.regions, batch.input_ids)
    return answer.logits_BA, answer.fusion.pooled_BD


def test_what_is_written_is_what_the_teacher_says(run: Path, tmp_path: Path) -> None:
    """To 1e-6: padding is masked, but sums over longer rows are rounded elsewhere. float16 keeps eleven bits."""
    folder = copy_of(run, tmp_path / "full")
    ask(folder, SHARDS, "teacher_outputs.pooled=true", "teacher_outputs.batch_size=7")
    artifact = read_manifest(folder / "teacher_outputs", TeacherOutputs)
    assert (artifact.teacher, artifact.num_questions) == ("teacher", 32)
    assert len(list((folder / "teacher_outputs" / "train").glob("*.parquet"))) == 4
    outputs = Outputs(folder / "teacher_outputs", 32)
    for rows in torch.randperm(32, generator=torch.Generator().manual_seed(0)).split(9):
        logits, pooled = live(folder, rows)
        written = outputs.batch(rows)
        torch.testing.assert_close(written.logits_BK, logits, atol=1e-6, rtol=0)
        torch.testing.assert_close(written.pooled_BD, pooled, atol=1e-6, rtol=0)
    right = live(folder, torch.arange(32))[0].argmax(1) == RegionSplit.load(folder / "regions", "train").answers
    assert artifact.accuracy == pytest.approx(right.float().mean().item())
    half = copy_of(run, tmp_path / "half")
    ask(half, SHARDS, "teacher_outputs.dtype=float16")
    rounded = Outputs(half / "teacher_outputs", 32).batch(torch.arange(32))
    assert rounded.pooled_BD is None
    torch.testing.assert_close(rounded.logits_BK, live(half, torch.arange(32))[0], atol=1e-6, rtol=2**-10)


@pytest.mark.slow
def test_two_processes_write_what_one_does(run: Path, tmp_path: Path) -> None:
    """Byte by byte, each a half of the shards."""
    one, two = copy_of(run, tmp_path / "one"), copy_of(run, tmp_path / "two")
    ask(one, SHARDS, "teacher_outputs.pooled=true")
    results = finish(start(2, "tests.edgevlm.asking", two, SHARDS, "teacher_outputs.pooled=true"))
    assert [code for code, _, _ in results] == [0, 0], results
    files = sorted(path.relative_to(one) for path in (one / "teacher_outputs").rglob("*.parquet"))
    assert len(files) == 4
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    manifests = [read_manifest(folder / "teacher_outputs", TeacherOutputs) for folder in (one, two)]
    assert manifests[0].files == manifests[1].files and manifests[0].accuracy == manifests[1].accuracy


def test_a_killed_stage_keeps_its_shards(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made, original = copy_of(run, tmp_path / "cut"), [], outputs_module.write_table

    def killed_at_the_third(path: Path, *rest: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        original(path, *rest)

    monkeypatch.setattr(outputs_module, "write_table", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        ask(folder, SHARDS)
    monkeypatch.setattr(
        outputs_module, "write_table", lambda path, *rest: (made.append(path.name), original(path, *rest))
    )
    ask(folder, SHARDS)
    assert made == [f"outputs-0000{i}.parquet" for i in range(4)], "nothing twice"
    made.clear()
    ask(folder, SHARDS, "teacher_outputs.dtype=float16")
    assert len(made) == 4, "another dtype is another key"


def test_damaged_and_foreign_outputs_are_noticed(run: Path, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path / "run")
    ask(folder, SHARDS)
    shard = folder / "teacher_outputs" / "train" / "outputs-00003.parquet"
    with pytest.raises(CheckpointError, match="answers 32 questions, the region cache has 40"):
        Outputs(folder / "teacher_outputs", 40)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="outputs-00003"):
        Outputs(folder / "teacher_outputs", 32)
    shard.unlink()
    with pytest.raises(CheckpointError, match="answers 30 questions"):
        Outputs(folder / "teacher_outputs", 32)
    with pytest.raises(CheckpointError, match="no whole set"):
        Outputs(tmp_path, 32)


def test_distilling_from_written_outputs_is_distilling_from_the_teacher(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and the contrast, without layers: the same losses to 1e-5 over eight steps, and the same student."""
    folder, losses = copy_of(run, tmp_path / "run"), []
    ask(folder, SHARDS, "teacher_outputs.pooled=true")
    original = DistilObjective.forward

    def recorded(self: DistilObjective, *arguments: Any, **more: Any) -> Any:
        loss, logs = original(self, *arguments, **more)
        losses.append(loss.item())
        assert ("outputs" in more) == cached_run[0]
        return loss, logs

    monkeypatch.setattr(DistilObjective, "forward", recorded)
    terms = ["distil.attention_weight=0", "distil.hidden_weight=0", "distil.nce_weight=0.3", "distil.nce_queue=40"]
    cached_run = [False]
    job = job_in(folder, "distil-live", *terms)
    distil(job)
    cached_run[0] = True
    cached = job_in(folder, "distil-cached", "distil.precompute=true", "teacher_outputs.pooled=true", *terms[2:])
    distil(cached)
    assert len(losses) == 16 and losses[0] != losses[7]
    assert losses[8:] == pytest.approx(losses[:8], abs=1e-5)
    students = [vlm.load(j.out_dir)[0].state_dict() for j in (job, cached)]
    # AdamW makes full steps of a gradient that is rounding alone (the keys' biases): those are left out.
    for name in (name for name in students[0] if "key.bias" not in name):
        torch.testing.assert_close(students[0][name], students[1][name], atol=1e-4, rtol=0)


# --- in the flow -------------------------------------------------------------------------------------------------


def test_the_stage_is_there_where_the_recipe_asks(run: Path) -> None:
    def flow(*overrides: str) -> dict[str, tuple[str, ...]]:
        return {stage.name: stage.inputs for stage in stages_of(load_recipe("test-scenes", list(overrides)))}

    assert "teacher_outputs" not in flow() and "teacher_outputs" not in flow(f"distil.teacher={run / 'teacher'}")
    own, foreign = flow("distil.precompute=true"), flow("distil.teacher=json:dumps")
    assert list(own)[3:6] == ["teacher", "teacher_outputs", "distil"]
    assert own["distil"][-1] == foreign["distil"][-1] == "teacher_outputs"
    assert "teacher" in own["teacher_outputs"] and "teacher" not in foreign["teacher_outputs"]


def test_only_what_outputs_depend_on_makes_them_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys(*overrides: str) -> dict[str, str]:
        recipe = load_recipe("test-scenes", ["distil.precompute=true", *overrides])
        return stage_keys(stages_of(recipe), recipe, None)

    first = keys()
    assert keys("distil.lr=0.5")["teacher_outputs"] == first["teacher_outputs"]
    assert keys("distil.lr=0.5")["distil"] != first["distil"]
    assert keys("teacher_outputs.dtype=float16")["teacher_outputs"] != first["teacher_outputs"]
    assert keys("teacher.lr=0.5")["teacher_outputs"] != first["teacher_outputs"]
    foreign = keys("distil.teacher=json:dumps")
    assert foreign["teacher"] == first["teacher"], "the run's own teacher does not depend on it"
    assert foreign["teacher_outputs"] != first["teacher_outputs"]
    monkeypatch.syspath_prepend(tmp_path)
    changing = []
    for body in ("return 1", "return 2"):
        (tmp_path / "changing.py").write_text(f"def ask(*_):\n    {body}\n")
        changing.append(keys("distil.teacher=changing:ask")["teacher_outputs"])
    assert changing[0] != changing[1], "the function's file counts"
    adopted = keys(f"distil.teacher={run / 'teacher'}")
    assert adopted["teacher"] != first["teacher"] and adopted["detector"] == first["detector"]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("distil.attention_weight=1", "distil.attention_weight"),
        ("distil.hidden_weight=0.1", "distil.hidden_weight"),
        ("distil.nce_weight=0.1", "distil.nce_weight"),
        ("teacher_outputs.pooled=true", "teacher_outputs.pooled"),
    ],
)
def test_what_a_teacher_from_elsewhere_cannot_give_is_named(override: str, named: str) -> None:
    with pytest.raises(RecipeError, match=f"gives logits alone; {named} needs"):
        check_distil(load_recipe("test-scenes", ["distil.teacher=json:dumps", override]))


def test_a_missing_teacher_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no function"):
        check_distil(load_recipe("test-scenes", ["distil.teacher=json:nothing"]))
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        check_distil(load_recipe("test-scenes", [f"distil.teacher={tmp_path}"]))


# --- teachers from elsewhere -------------------------------------------------------------------------------------

ANSWERS = ("red", "2", "no", "mauve")


def colour_of(images: list[Any], texts: list[str], answers: tuple[str, ...]) -> list[list[float]]:
    """A teacher that tells the images apart by their first pixel, and the texts by their length."""
    return [
        [float(image.getpixel((0, 0))[0]), float(len(text)), 3.0, -1.0]
        for image, text in zip(images, texts, strict=True)
    ]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on seven images with one to three questions each, behind `regions`."""
    counts = {"train": 7, "val": 2, "test": 2}
    samples = {
        split: [
            made_sample(i, *(Text("what colour is the big star?"[: 11 + 6 * n], ANSWERS[n]) for n in range(1 + i % 3)))
            for i in range(count)
        ]
        for split, count in counts.items()
    }
    labels = Labels(classes=("a",), attributes=("b",), answers=ANSWERS)
    monkeypatch.setitem(edgevlm.data.READERS, "scenes", lambda *_: Made(labels, samples))
    job = cached_job(tmp_path / "run", "regions.shard_images=3", "teacher.steps=1", stage="teacher")
    train_teacher(job)
    return tmp_path / "run"


def asked(folder: Path, teacher: str, *overrides: str) -> TeacherOutputs:
    ask(folder, "regions.shard_images=3", f"distil.teacher={teacher}", *overrides)
    return read_manifest(folder / "teacher_outputs", TeacherOutputs)


def test_images_and_texts_reach_the_teacher_in_the_order_of_the_cache(made: Path) -> None:
    """Original images and texts, question by question over shards of 3, 3 and 1 images in batches of 4."""
    artifact = asked(made, "tests.edgevlm.test_teacher_outputs:colour_of", "teacher_outputs.batch_size=4")
    assert (artifact.known, artifact.num_questions) == ((0, 1, 2, 3), 13)
    expected = []
    for i in range(7):
        sample = made_sample(i)
        texts = ["what colour is the big star?"[: 11 + 6 * n] for n in range(1 + i % 3)]
        expected += colour_of([sample.image] * len(texts), texts, ANSWERS)
    assert Outputs(made / "teacher_outputs", 13).logits[torch.arange(13)].tolist() == expected


def test_a_hugging_face_teacher_through_the_stage_to_the_student(made: Path, tmp_path: Path) -> None:
    """ViLT knows two of the four answers: the student imitates it on those, and on nothing else."""
    vilt = save_vilt(tmp_path / "vilt", ("two", "frisbee", "RED"))
    artifact = asked(made, str(vilt))
    assert artifact.known == (0, 1)
    job = job_in(made, "distil", f"distil.teacher={vilt}", "distil.kd_weight=1", "distil.steps=2")
    seen: list[DistilObjective] = []
    original = distil_stage.DistilObjective
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil_stage, "DistilObjective", lambda *a: seen.append(original(*a)) or seen[-1])
        student = distil(replace(job, recipe=job.recipe.model_copy(update={"referred_weight": 0.0})))
    assert student.metrics["accuracy_test"] >= 0
    objective = seen[0].eval()
    rows = torch.arange(5)
    batch = batch_of(objective.student, RegionSplit.load(made / "regions", "train"), rows)
    written = Outputs(made / "teacher_outputs", 13).batch(rows)
    logits = objective.student.answer(batch.regions, batch.input_ids).logits_BA
    p, q = written.logits_BK.softmax(1), logits[:, [0, 1]].softmax(1)
    loss, _ = objective(batch, outputs=written)
    assert loss.item() == pytest.approx(((p * (p / q).log()).sum() / 5).item(), abs=1e-5)
    assert not list(objective.distiller.parameters())


def test_blip_through_the_stage(made: Path, tmp_path: Path) -> None:
    artifact = asked(made, str(save_blip(tmp_path / "blip")), "teacher_outputs.candidates=2")
    assert artifact.known == (0, 1, 2, 3)
    logits = Outputs(made / "teacher_outputs", 13).logits[torch.arange(13)]
    assert ((logits > -1e3).sum(1) == 2).all()


def broken(images: list[Any], texts: list[str], answers: tuple[str, ...]) -> Tensor:
    logits = torch.zeros(len(texts), len(answers))
    if any(len(text) > 20 for text in texts):
        logits[-1, 0] = torch.nan
    return logits


def test_what_a_teacher_must_not_do_is_one_line(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="logits of sample sample-2, 'what colour is the big"):
        asked(made, "tests.edgevlm.test_teacher_outputs:broken")
    with pytest.raises(CheckpointError, match="others than false and true"):
        asked(made, str(save_bridgetower(tmp_path / "bridgetower")))
    reader = edgevlm.data.READERS["scenes"]
    samples = [replace(sample, texts=sample.texts[::-1]) for sample in reader(None, "", 0).samples("train")]  # pyright: ignore
    monkeypatch.setitem(edgevlm.data.READERS, "scenes", lambda *_: Made(reader(None, "", 0).labels, {"train": samples}))  # pyright: ignore
    with pytest.raises(DataError, match="other texts than those in the region cache"):
        asked(made, "tests.edgevlm.test_teacher_outputs:colour_of", "teacher_outputs.dtype=float16")


def test_a_judge_of_sentences_is_no_teacher_for_questions(run: Path, tmp_path: Path) -> None:
    """Yes and no are its answers, but a question has no truth: the task decides."""
    teacher = outputs_module.Teacher("h", (0, 1), lambda *_: torch.zeros(1), sentences=True)
    with pytest.raises(RecipeError, match="whether a sentence fits an image; task vqa"):
        outputs_module._check_use(teacher, "bridgetower", job_in(tmp_path, "teacher_outputs"))
    outputs_module._check_use(teacher, "bridgetower", job_in(tmp_path, "teacher_outputs", "task=reasoning"))


# --- names of samples --------------------------------------------------------------------------------------------


def test_images_of_the_cache_have_the_readers_names(made: Path, run: Path) -> None:
    images = torch.tensor([6, 0, 3, 3])
    assert image_ids(made / "regions", "train", images) == ["sample-6", "sample-0", "sample-3", "sample-3"]
    shutil.copytree(run / "regions", made / "old")
    split = RegionSplit.load(made / "old", "train")
    split.save(made / "older", "train")  # as caches were before they had names
    assert image_ids(made / "older", "train", images[:2]) == ["image 6", "image 0"]


def test_a_stop_in_training_names_the_samples(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN among the cached features stops the teacher; the samples of its batch are named, and the file has all."""
    original = answering.batch_of

    def poisoned(model: vlm.VLM, split: RegionSplit, rows: Tensor, *rest: Any) -> Any:
        batch = original(model, split, rows, *rest)
        bad = (split.image_index[rows] == 5)[:, None, None]
        return batch._replace(regions=batch.regions._replace(features_BND=batch.regions.features_BND / ~bad))

    monkeypatch.setattr(answering, "batch_of", poisoned)
    job = job_in(made, "again", "teacher.batch_size=2")
    with pytest.raises(TrainingError, match=r"teacher: the loss became nan at step \d+, on samples .*sample-5"):
        answering.train_teacher(job)
