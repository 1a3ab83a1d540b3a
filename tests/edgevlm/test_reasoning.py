"""Learning from drawn sentences: mixed batches, resuming, and that a small fusion does learn from them."""

import json
from pathlib import Path

import pytest
import torch

from edgevlm.artifacts import WEIGHTS, Checkpoint, ModelConfig, Provenance, Vocabulary
from edgevlm.compress.distil import start_from_teacher
from edgevlm.data.nlvr import LABELS, NLVR
from edgevlm.data.nlvr_words import SAME
from edgevlm.data.text import make_spec, train_vocabulary, write_vocabulary
from edgevlm.errors import RecipeError
from edgevlm.job import Job
from edgevlm.manifests import write_manifest
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM, load
from edgevlm.recipe import Recipe
from edgevlm.recipes import load_recipe
from edgevlm.stages import stages_of
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.drawn import Drawn, join, open_drawn, shuffle_parts
from edgevlm.train.reasoning import check_synthetic, finetune_reasoning, pretrain_reasoning
from edgevlm.train.regions import AnswerBatch, RegionSplit
from tests.edgevlm.test_nlvr_pairs import _records
from tests.edgevlm.tiny import SPEC, tiny_vlm

PARTS = [[0.0, 0.0, 0.25, 1.0], [0.375, 0.0, 0.625, 1.0], [0.75, 0.0, 1.0, 1.0]]
FUSION = {"name": "test-fusion", "box_encoding": "geometry", "parts": PARTS}


def _recipe(steps: int = 6) -> Recipe:
    values = load_recipe("nlvr").model_dump()
    values["tee"] = {"name": "test-tee", "region_feature": "tags"}
    values["synthetic"] |= {"fusion": FUSION, "steps": steps, "batch_size": 8, "families": 20, "save_every": 2}
    values["synthetic"] |= {"scenes_per_sentence": 4}
    values["teacher"] |= {"fusion": FUSION, "steps": 4, "batch_size": 8, "save_every": 2}
    return Recipe.model_validate(values)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Finished `prepare`, `detector` (untrained) and `regions` (drawn) over a folder of NLVR without images."""
    recipe, data = _recipe(), tmp_path / "data"
    data.mkdir()
    lines = [json.dumps(record.model_dump() | {"directory": str(i)}) for i, record in enumerate(_records(40))]
    for split in ("train", "dev", "test"):
        (data / f"{split}.jsonl").write_text("\n".join(lines))
        for name in ("p0", "p1-5"):
            (data / f"images-{split}-{name}.parquet").touch()
    folders = {name: tmp_path / name for name in ("prepare", "detector", "regions", "out")}
    for folder in folders.values():
        folder.mkdir()
    vocab = folders["prepare"] / "vocab.txt"
    write_vocabulary(vocab, train_vocabulary(["there is one black circle"], 400, NLVR.words))
    provenance = Provenance(stage="x", key="x")
    spec = make_spec(vocab, 48)
    write_manifest(
        folders["prepare"], Vocabulary(provenance=provenance, preprocess=SPEC, tokenizer=spec, labels=LABELS)
    )
    tee = TEES["test-tee"].model_copy(update={"region_feature": "tags"})
    config = ModelConfig(tee=tee, fusion=FUSIONS["none"])
    manifest = Checkpoint(provenance=provenance, model=config, task="x", preprocess=SPEC, tokenizer=spec, labels=LABELS)
    torch.manual_seed(0)
    save_checkpoint(folders["detector"], VLM(config, SPEC, spec, LABELS), vocab, manifest)
    out = folders.pop("out")
    job = Job(recipe, folders, out, provenance, str(data))
    drawn = open_drawn(job, 9)
    for number, split in enumerate(("train", "val", "test")):
        batch, _ = drawn.batch(number, 8)
        ids = torch.zeros(len(batch.answers), 48, dtype=torch.int32)
        ids[:, : batch.input_ids.shape[1]] = batch.input_ids
        index = torch.arange(len(ids))
        known = torch.zeros(len(ids), dtype=torch.uint8)
        kinds = ["seen" if i % 2 else "unseen" for i in range(len(ids))]
        RegionSplit(*batch.regions, index, ids, batch.answers, batch.referred, known, kinds).save(
            folders["regions"], split
        )
    return job


def test_a_killed_run_ends_like_one_that_was_not(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed after 5 of 6 steps (the last snapshot is of step 4) and run again: the same weights to rounding."""
    whole = pretrain_reasoning(job)
    expected = load(job.out_dir)[0].state_dict()
    again = Job(job.recipe, job.inputs, tmp_path / "again", job.provenance, job.data_path)
    again.out_dir.mkdir()
    batch, calls = Drawn.batch, []

    def dies(self: Drawn, number: int, sentences: int) -> object:
        calls.append(number)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return batch(self, number, sentences)

    monkeypatch.setattr(Drawn, "batch", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain_reasoning(again)
    monkeypatch.setattr(Drawn, "batch", batch)
    resumed = pretrain_reasoning(again)
    for name, value in load(again.out_dir)[0].state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    assert resumed.metrics == whole.metrics


def test_the_teacher_goes_on_from_the_drawn_ones(job: Job, tmp_path: Path) -> None:
    pretrain_reasoning(job)
    after = Job(
        job.recipe, {**job.inputs, "synthetic": job.out_dir}, tmp_path / "teacher", job.provenance, job.data_path
    )
    after.out_dir.mkdir()
    manifest = finetune_reasoning(after)
    assert {"accuracy_test", "accuracy_test.seen", "accuracy_test.unseen"} <= set(manifest.metrics)
    before, now = load(job.out_dir)[0], load(after.out_dir)[0]
    moved = [(a - b).abs().max() for a, b in zip(before.fusion.parameters(), now.fusion.parameters(), strict=True)]
    assert 0 < max(moved).item() < 0.1, "a few small steps away from where it began"
    assert (after.out_dir / WEIGHTS).is_file() and not list(after.out_dir.glob(".snapshot*"))


def test_spellings_answer_alike(job: Job) -> None:
    """After `tie`, "two boxes" is "2 box" to the model, without a rule at run time."""
    drawn = open_drawn(job, 0)
    config = ModelConfig(tee=TEES["test-tee"], fusion=FUSIONS["test-fusion"])
    torch.manual_seed(0)
    model = VLM(config, SPEC, drawn.tokenizer.spec, LABELS).eval()
    drawn.tie(model)
    a, b = (torch.from_numpy(drawn.tokenizer.encode_batch([text])) for text in ("two boxes", "2 box"))
    assert not torch.equal(a, b)
    words = model.fusion.words
    assert torch.equal(words(a), words(b))
    tokens = set(drawn.tokenizer.tokens)
    assert set(SAME) <= tokens and set(SAME.values()) <= tokens


def test_shuffled_parts_keep_what_is_in_a_box_together(job: Job) -> None:
    batch, _ = open_drawn(job, 0).batch(0, 2)
    parts = tuple(tuple(part) for part in PARTS)
    moved = shuffle_parts(batch, parts, 1)  # pyright: ignore[reportArgumentType]
    before, after = batch.regions.boxes_norm_BN4, moved.regions.boxes_norm_BN4
    assert not torch.equal(before, after)
    torch.testing.assert_close(after[..., 2:] - after[..., :2], before[..., 2:] - before[..., :2])
    assert torch.equal(after[..., 1], before[..., 1])
    shift = ((after - before)[..., 0] / 0.375).round()
    torch.testing.assert_close((after - before)[..., 0], shift * 0.375, atol=1e-6, rtol=0)
    valid = batch.regions.scores_BN > 0.5
    box = ((before[..., 0] + before[..., 2]) / 2 / 0.375).floor()
    for row in range(len(box)):
        pairs = set(zip(box[row, valid[row]].tolist(), (box + shift)[row, valid[row]].tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert all(0 <= b <= 2 for _, b in pairs)


def test_joined_batches_answer_as_before() -> None:
    model = tiny_vlm()

    def batch(rows: int, regions: int, length: int) -> AnswerBatch:
        generator = torch.Generator().manual_seed(rows)
        boxes = torch.rand(rows, regions, 4, generator=generator).sort(-1).values
        parts = Regions(torch.rand(rows, regions, 32, generator=generator), boxes, torch.ones(rows, regions))
        ids = torch.randint(5, 40, (rows, length), generator=generator)
        answers = torch.zeros(rows, dtype=torch.long)
        return AnswerBatch(parts, ids, answers, torch.zeros(rows, regions, dtype=torch.uint8), torch.ones(rows))

    one, two = batch(2, 3, 7), batch(3, 6, 4)
    both = join(one, two, 0)
    with torch.no_grad():
        apart = torch.cat([model.answer(b.regions, b.input_ids).logits_BA for b in (one, two)])
        together = model.answer(both.regions, both.input_ids).logits_BA
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)  # float32 sums over more zeros


def test_a_student_can_start_as_its_teacher() -> None:
    teacher, student = tiny_vlm(0), tiny_vlm(1)
    start_from_teacher(student, teacher)
    for name, value in student.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name])
    shallow = tiny_vlm(2, layer_heads=(2,), layer_ffn=(64,))
    start_from_teacher(shallow, teacher)
    last = teacher.fusion.layers[1].state_dict()
    assert all(torch.equal(value, last[name]) for name, value in shallow.fusion.layers[0].state_dict().items())
    with pytest.raises(RecipeError, match=r"distil\.start"):
        start_from_teacher(tiny_vlm(3, layer_ffn=(32, 32)), teacher)


def test_stage_synthetic_is_there_only_when_asked_for() -> None:
    with_it, without = (stages_of(load_recipe(name)) for name in ("nlvr", "nlvr-tiny"))
    names = [stage.name for stage in with_it]
    assert names[:5] == ["prepare", "detector", "regions", "synthetic", "teacher"]
    assert "synthetic" in with_it[4].inputs
    assert "synthetic" not in {name for stage in without for name in (stage.name, *stage.inputs)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teacher.fusion.hidden=128", "another shape"),
        ("tee.region_feature=hidden", "no pixels"),
        ("synthetic.fusion.parts=[]", "another shape"),
    ],
)
def test_mistakes_are_found_before_training(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_synthetic(load_recipe("nlvr", [change]))
    check_synthetic(load_recipe("nlvr"))
