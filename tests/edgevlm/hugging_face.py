"""The smallest BLIP, ViLT and BridgeTower of `transformers`, random, saved as their library saves them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgevlm.models._torchvision import ensure_importable

WORDS = [
    "what",
    "colour",
    "is",
    "the",
    "big",
    "star",
    "?",
    "red",
    "blue",
    "green",
    "2",
    "yes",
    "no",
    "there",
    "a",
    "of",
    "on",
    "table",
    "t",
    "-",
    "shirt",
    "tall",
    "##er",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
TEXTS = ("what colour is the big star?", "is there a star?", "the big red star is tall")


def transformers() -> Any:
    ensure_importable()  # it imports torchvision where that is installed
    return pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")


def pictures(count: int = 3) -> list[Image.Image]:
    """Noise of several sizes."""
    sizes = [(40, 50), (64, 32), (36, 36)]
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*sizes[i % 3], 3), dtype=np.uint8))
        for i in range(count)
    ]


def _bert(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "words.txt"
    path.write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    return transformers().BertTokenizer(vocab=str(path))


def _wide(model: Any) -> Any:
    """Weights as large as after a training: what a model says then depends on what it is shown."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def save_blip(folder: Path, kind: str = "BlipForQuestionAnswering") -> Path:
    library, tokenizer = transformers(), _bert(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 5, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}
    text = {**size, **special, "vocab_size": len(SPECIAL) + len(WORDS), "encoder_hidden_size": 16}
    vision = {**size, "image_size": 32, "patch_size": 16}
    config = library.BlipConfig(text_config={**text, "max_position_embeddings": 32}, vision_config=vision)
    _wide(getattr(library, kind)(config)).save_pretrained(folder)
    images = library.BlipImageProcessor(size={"height": 32, "width": 32})
    library.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def save_vilt(folder: Path, labels: tuple[str, ...] = ("red", "2", "T-shirt", "blue", "two")) -> Path:
    library, tokenizer = transformers(), _bert(folder)
    config = library.ViltConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        max_position_embeddings=24,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    _wide(library.ViltForQuestionAnswering(config)).save_pretrained(folder)
    images = library.ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=16)
    library.ViltProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def save_bridgetower(folder: Path) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    library = transformers()
    folder.mkdir(parents=True)
    cutter = ByteLevelBPETokenizer()
    cutter.train_from_iterator(list(TEXTS), vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    cutter.save_model(str(folder))
    tokenizer = library.RobertaTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    size = {"hidden_size": 64, "num_hidden_layers": 2}  # it gives every 64 numbers a head
    text = {**size, "vocab_size": len(tokenizer), "num_attention_heads": 2, "intermediate_size": 64}
    config = library.BridgeTowerConfig(
        **size,
        num_attention_heads=2,
        text_config={**text, "max_position_embeddings": 40},
        vision_config={**size, "patch_size": 16, "image_size": 32},
    )
    _wide(library.BridgeTowerForImageAndTextRetrieval(config)).save_pretrained(folder)
    images = library.BridgeTowerImageProcessor(
        size={"shortest_edge": 32}, size_divisor=16, crop_size={"shortest_edge": 32}
    )
    library.BridgeTowerProcessor(images, tokenizer).save_pretrained(folder)
    return folder
