"""A small model with seeded weights that behaves like a trained one where conversion is concerned.

Random weights alone make a poor test: scores of all boxes are nearly equal, so every runtime's rounding reorders
them, and a zero-mean BatchNorm hides a wrong normalisation. Here BatchNorm has real statistics, objectness and class
scores are spread out, and the fusion has learned a question that needs both the image (its tint) and the text.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from edgevlm.artifacts import (
    VOCABULARY,
    WEIGHTS,
    Checkpoint,
    FusionConfig,
    Labels,
    ModelConfig,
    PreprocessSpec,
    Provenance,
    Rung,
    TEEConfig,
    TokenizerSpec,
    TrimConfig,
)
from edgevlm.manifests import file_sha256, write_manifest
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.models.tee import Regions
from edgevlm.models.trimmer import Trim
from edgevlm.models.vlm import VLM

WORDS = ("is", "it", "red", "green", "blue", "the", "scene", "a", "tint", "?", "what", "of", "picture", "this", "here")
VOCAB = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
TINTS = ("red", "green", "blue")
LABELS = Labels(classes=("cube", "ball", "cone"), attributes=("big", "small"), answers=("no", "yes", *TINTS))
TINT_RGB = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])


def draw_images(num: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocky images (num, size, size, 3) uint8 with a tint each, and the tints (num,)."""
    rng = np.random.default_rng(seed)
    tints = rng.integers(0, 3, num)
    images = []
    for tint in tints:
        coarse = rng.integers(0, 256, (6, 6, 3)) * 0.25 + TINT_RGB[tint] * 0.75
        images.append(
            np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST))
        )
    return np.stack(images), tints


def draw_questions(tints: np.ndarray, seed: int) -> tuple[list[str], np.ndarray]:
    """A question per image ('what tint ...' or 'is it red ...') and its answer (num,)."""
    rng = np.random.default_rng(seed)
    texts, answers = [], []
    for tint in tints:
        if rng.random() < 0.5:
            texts.append(f"what tint {rng.choice(['of', 'is'])} the {rng.choice(['scene', 'picture'])} ?")
            answers.append(2 + tint)
        else:
            asked = tint if rng.random() < 0.5 else rng.integers(0, 3)
            texts.append(f"is {rng.choice(['it', 'this', 'the scene'])} {TINTS[asked]} {rng.choice(['here', ''])} ?")
            answers.append(int(asked == tint))
    return texts, np.array(answers, np.int64)


def encode_texts(texts: list[str], max_tokens: int) -> np.ndarray:
    """Whole words to ids, (num, max_tokens) int32: [CLS] words [SEP] [PAD]..."""
    ids = np.zeros((len(texts), max_tokens), np.int32)
    for row, text in zip(ids, texts, strict=True):
        tokens = ["[CLS]", *text.split(), "[SEP]"]
        row[: len(tokens)] = [VOCAB.index(token) for token in tokens]
    return ids


def make_model(
    tee: TEEConfig, fusion: FusionConfig, size: int, rungs: tuple[int, ...], steps: int = 400
) -> tuple[VLM, Checkpoint]:
    """The model and its manifest (the vocabulary's hash is filled in by `write_checkpoint`)."""
    spec = PreprocessSpec(height=size, width=size)
    tokenizer = TokenizerSpec(vocab_sha256="", vocab_size=len(VOCAB), max_tokens=12)
    config = ModelConfig(tee=tee, fusion=fusion)
    layers = 0 if fusion.trim is None else len(fusion.trim.layers)
    manifest = Checkpoint(
        provenance=Provenance(stage="trim", key="k0", recipe={"name": "lively"}),
        model=config,
        task="vqa",
        preprocess=spec,
        tokenizer=tokenizer,
        labels=LABELS,
        rungs=tuple(Rung(name=f"b{n}", regions=(n,) * max(1, layers)) for n in rungs),
        metrics={"test_accuracy": 0.9},
    )
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small matrices only wait for a second thread
    model = VLM(config, spec, tokenizer, LABELS).eval()
    _settle_extractor(model, size)
    _teach(model, size, rungs, steps)
    torch.set_num_threads(threads)
    return model.eval(), manifest


@torch.no_grad()
def _settle_extractor(model: VLM, size: int) -> None:
    tee = model.tee
    norms = [m for m in tee.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.weight.mul_(0.8 + 0.4 * torch.rand_like(norm.weight))
        norm.bias.copy_(0.2 * torch.randn_like(norm.bias))
        norm.train()
    for seed in range(4):
        tee.dense(_planes(draw_images(16, size, seed)[0]))
    for norm in norms:
        norm.eval()
    pixels = _planes(draw_images(16, size, 9)[0])
    tee.rpn.objectness.weight.mul_(1.5 / tee.dense(pixels).objectness_BM.std())
    tee.rpn.deltas.weight.mul_(0.2 / tee.dense(pixels).deltas_BM4.std())
    dense = tee.dense(pixels)
    proposals = tee.propose(dense)
    # Region features that tell images apart, as trained ones do: centred hidden units, unit spread.
    for layer in (tee.box_head.fc1, tee.box_head.fc2):
        seen: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output))
        tee.box_features(dense.maps, proposals)
        hook.remove()
        spread = seen[0].std((0, 1))
        layer.bias.sub_(seen[0].mean((0, 1))).div_(spread)
        layer.weight.div_(spread.unsqueeze(1))
    logits = tee.box_features(dense.maps, proposals).class_logits_BRC
    mean, scale = logits.mean((0, 1)), 1.5 / logits.std((0, 1)).mean()
    tee.box_head.classes.weight.mul_(scale)
    tee.box_head.classes.bias.sub_(mean).mul_(scale)
    tee.box_head.deltas.weight.mul_(0.5 / tee.box_features(dense.maps, proposals).deltas_BR4.std())


def _teach(model: VLM, size: int, rungs: tuple[int, ...], steps: int) -> None:
    images, tints = draw_images(256, size, 20)
    with torch.no_grad():
        regions = Regions(
            *(torch.cat(parts) for parts in zip(*(model.encode(p) for p in _planes(images).split(32)), strict=True))
        )
    donors = [np.flatnonzero(tints == tint) for tint in range(3)]
    parameters = [*model.fusion.parameters(), *model.head.parameters()]
    optimiser = torch.optim.Adam(parameters, 2e-3)
    generator = torch.Generator().manual_seed(0)
    layers = 0 if model.config.fusion.trim is None else len(model.config.fusion.trim.layers)
    for step in range(steps):
        rows = torch.randint(0, len(images), (48,), generator=generator)
        texts, answers = draw_questions(tints[rows.numpy()], 1000 + step)
        # Noise, and regions of another image of that tint: the answer must not hang on which regions were chosen.
        noise = torch.randn(regions.features_BND[rows].shape, generator=generator)
        other = torch.from_numpy(np.array([donors[t][step % len(donors[t])] for t in tints[rows.numpy()]]))
        batch = Regions(
            regions.features_BND[rows] + 0.3 * noise, regions.boxes_norm_BN4[other], regions.scores_BN[other]
        )
        input_ids = torch.from_numpy(encode_texts(texts, 12))
        numbers = (rungs[step % len(rungs)],) * layers
        logits = model.answer(batch, input_ids, trim=Trim(regions=numbers)).logits_BA
        loss = F.cross_entropy(logits, torch.from_numpy(answers), label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _planes(images_NHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images_NHWC).float().permute(0, 3, 1, 2)


def small_model() -> tuple[VLM, Checkpoint]:
    """`test-tee` and `test-fusion` at 64 px with rungs of 8, 5 and 3 regions."""
    fusion = FUSIONS["test-fusion"].model_copy(update={"trim": TrimConfig(layers=(0,))})
    return make_model(TEES["test-tee"], fusion, 64, (8, 5, 3))


def write_checkpoint(folder: Path, model: VLM, manifest: Checkpoint) -> Checkpoint:
    """Save a checkpoint as the training stages do."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / VOCABULARY
    vocabulary.write_text("".join(f"{token}\n" for token in VOCAB))
    tokenizer = manifest.tokenizer.model_copy(update={"vocab_sha256": file_sha256(vocabulary)})
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)
    written = write_manifest(folder, manifest.model_copy(update={"tokenizer": tokenizer}))
    assert isinstance(written, Checkpoint)
    return written
