"""Pre-training's inputs with a perfect detector: what is in drawn scenes, as region features, captions and a checkpoint.

Nothing is drawn: the features say in 16 numbers what a region shows, so a test of minutes becomes one of seconds.
"""

from pathlib import Path

import numpy as np
import torch

from edgevlm.artifacts import VOCABULARY, Checkpoint, Labels, ModelConfig, PreprocessSpec, Provenance, RegionCache
from edgevlm.data.scene_facts import COLOURS, SHAPES, SIZES, TEXTURES, Scene
from edgevlm.data.scene_texts import make_caption
from edgevlm.data.scenes import CANVAS_PX, Scenes
from edgevlm.data.text import Tokenizer, make_spec, train_vocabulary, write_vocabulary
from edgevlm.job import Job
from edgevlm.manifests import write_manifest
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.models.vlm import VLM
from edgevlm.recipes import load_recipe
from edgevlm.train.captions import save_captions
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.regions import RegionSplit

MAX_TOKENS = 40
ASPECTS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}
TEE = TEES["test-tee"]


def provenance(stage: str) -> Provenance:
    return Provenance(stage=stage, key=stage)


def first_sentence(scene: Scene, rng: np.random.Generator) -> str:
    """'a large red star is left of a blue dotted cross.'"""
    return make_caption(scene, rng)[0].partition(".")[0] + "."


def region_split(scenes: list[Scene]) -> RegionSplit:
    """One region per thing: one-hot looks as its feature, its box, and a score of 0.9."""
    features = torch.zeros(len(scenes), TEE.num_regions, TEE.roi_hidden)
    boxes = torch.zeros(len(scenes), TEE.num_regions, 4)
    scores = torch.zeros(len(scenes), TEE.num_regions)
    for i, scene in enumerate(scenes):
        for n, thing in enumerate(scene.things):
            offset = 0
            for aspect, values in ASPECTS.items():
                features[i, n, offset + values.index(str(getattr(thing.looks, aspect)))] = 1.0
                offset += len(values)
            boxes[i, n] = torch.tensor(thing.box) / CANVAS_PX
            scores[i, n] = 0.9
    none = torch.zeros(0, dtype=torch.long)
    referred = torch.zeros(0, TEE.num_regions, dtype=torch.uint8)
    questions = torch.zeros(0, MAX_TOKENS, dtype=torch.int32)
    return RegionSplit(features, boxes, scores, none, questions, none, referred, none.to(torch.uint8), [])


def write_inputs(folder: Path, num_images: dict[str, int], captions_per_image: int, seed: int = 0) -> dict[str, Path]:
    """Artifacts of the stages `detector` and `regions`; stage name -> folder."""
    reader = Scenes("vqa", seed)
    inputs = {name: folder / name for name in ("detector", "regions")}
    for path in inputs.values():
        path.mkdir(parents=True)
    captions: dict[str, list[list[str]]] = {}
    scenes = {split: [reader.scene(split, i) for i in range(number)] for split, number in num_images.items()}
    for stream, split in enumerate(scenes):
        rng = np.random.default_rng([seed, stream])
        captions[split] = [[first_sentence(scene, rng) for _ in range(captions_per_image)] for scene in scenes[split]]
    vocabulary = inputs["detector"].parent / VOCABULARY
    texts = [*SHAPES, *(text for several in captions["train"] for text in several)]
    write_vocabulary(vocabulary, train_vocabulary(texts, 200))
    manifest = Checkpoint(
        provenance=provenance("detector"),
        model=ModelConfig(tee=TEE, fusion=FUSIONS["none"]),
        task="detection",
        preprocess=PreprocessSpec(height=64, width=64),
        tokenizer=make_spec(vocabulary, MAX_TOKENS),
        labels=Labels(classes=SHAPES, attributes=(*COLOURS, *SIZES, *TEXTURES), answers=("no", "yes")),
    )
    torch.manual_seed(seed)
    model = VLM(manifest.model, manifest.preprocess, manifest.tokenizer, manifest.labels)
    with torch.no_grad():  # the classifier reads the shape where `region_split` writes it
        model.tee.box_head.classes.weight.copy_(torch.eye(len(SHAPES) + 1, TEE.roi_hidden))
        model.tee.box_head.classes.bias.zero_()
    save_checkpoint(inputs["detector"], model, vocabulary, manifest)
    tokenizer = Tokenizer(vocabulary, manifest.tokenizer)
    for split in scenes:
        region_split(scenes[split]).save(inputs["regions"], split)
        save_captions(inputs["regions"], split, 0, captions[split], tokenizer)
    cache = RegionCache(provenance=provenance("regions"), preprocess_hash="", extractor_hash="", num_images=num_images)
    write_manifest(inputs["regions"], cache)
    return inputs


def make_job(folder: Path, inputs: dict[str, Path], **pretrain: object) -> Job:
    """A job of the stage `pretrain` on those inputs."""
    out = folder / "pretrain"
    out.mkdir(parents=True, exist_ok=True)
    section = {"fusion": {"name": "test-fusion"}, "caption_tokens": 14, "tag_tokens": 6, **pretrain}
    overrides = [f"text.max_tokens={MAX_TOKENS}", f"pretrain={section}"]
    return Job(load_recipe("test-scenes", overrides), inputs, out, provenance("pretrain"))
