"""Where a new fusion starts: from an earlier checkpoint of ours, or from a text model's weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edgevlm.artifacts import VOCABULARY, TokenizerSpec
from edgevlm.data.text import read_vocabulary, vocabulary_sha256
from edgevlm.data.vocabulary import read_foreign
from edgevlm.errors import CheckpointError
from edgevlm.manifests import MANIFEST
from edgevlm.models import vlm
from edgevlm.models.text_weights import find_folder, load_text_weights, trim_embeddings
from edgevlm.models.vlm import VLM
from edgevlm.progress import Reporter

PARTS = ("fusion.", "word_head.", "match_head.")
"""What pre-training trains. The extractor is never copied: the fusion reads features of the run's own."""
POSITIONS = "fusion.positions.weight"


@dataclass(frozen=True)
class Started:
    """What a model took over."""

    copied: tuple[str, ...]
    """Parameters now equal to the source's (of the positions, as many rows as both have)."""
    fresh: tuple[str, ...]
    """Parameters of the model that stay as initialised."""
    left: tuple[str, ...]
    """Parameters of the source that have no place of their shape in the model."""


def start_from(model: VLM, folder: Path, tokenizer: TokenizerSpec) -> Started:
    """Copy into `model`, in place, what fits of the fusion and heads of the checkpoint in `folder`.

    Args:
        model: gets the parameters of equal name and shape; where its vocabulary was trimmed from the checkpoint's, the
            word table's rows that it kept.
        folder: a checkpoint, usually of the stage `pretrain`.
        tokenizer: of `model`.

    Raises:
        CheckpointError: no checkpoint, another vocabulary, or not one layer that fits.
    """
    source, manifest = vlm.load(folder)
    if manifest.tokenizer.vocab_sha256 != tokenizer.vocab_sha256:
        tokens, kept_ids = read_vocabulary(folder / VOCABULARY), tokenizer.kept_ids or ()
        # The words of this run may be a part of those that the checkpoint knows.
        if vocabulary_sha256([tokens[i] for i in kept_ids if i < len(tokens)]) != tokenizer.vocab_sha256:
            raise CheckpointError(
                f"The checkpoint in {folder} was trained with another vocabulary",
                f"Set text.vocab to {folder / VOCABULARY}",
            )
        trim_embeddings(source.fusion, kept_ids, source.word_head)
    theirs, ours = _parts(source), _parts(model)
    copied = []
    with torch.no_grad():
        for name in theirs.keys() & ours.keys():
            if theirs[name].shape == ours[name].shape:
                ours[name].copy_(theirs[name])
            elif name == POSITIONS and theirs[name].shape[1] == ours[name].shape[1]:
                rows = min(len(theirs[name]), len(ours[name]))
                ours[name][:rows] = theirs[name][:rows]
            else:
                continue
            copied.append(name)
    if not any(name.startswith("fusion.layers.") for name in copied):
        widths = source.config.fusion.hidden, model.config.fusion.hidden
        raise CheckpointError(
            f"No layer of the fusion in {folder} (width {widths[0]}) fits this one (width {widths[1]})",
            "Name the fusion that the checkpoint was trained with",
        )
    done = set(copied)
    return Started(tuple(sorted(done)), tuple(sorted(ours.keys() - done)), tuple(sorted(theirs.keys() - done)))


def warm_start(model: VLM, where: str, vocabulary: Path, tokenizer: TokenizerSpec, reporter: Reporter) -> None:
    """Start `model` from whatever `where` names, and say what stays untrained.

    Args:
        model: changed in place.
        where: folder of a checkpoint of ours or of a Hugging Face text model, or a text model's name on the hub.
        vocabulary: the model's `vocab.txt`.
        tokenizer: its spec.
        reporter: hears one line.

    Raises:
        CheckpointError: nothing there, another vocabulary, or weights that do not fit.
    """
    folder = find_folder(where)
    left: tuple[str, ...] = ()
    if (folder / MANIFEST).is_file():
        started = start_from(model, folder, tokenizer)
        fresh, left = started.fresh, started.left
    else:
        theirs = read_foreign(folder)[0]
        kept_ids = tokenizer.kept_ids or range(len(theirs))
        if [theirs[i] for i in kept_ids if i < len(theirs)] != read_vocabulary(vocabulary):
            raise CheckpointError(
                f"The text model in {folder} has another vocabulary than this run", f"Set text.vocab to {where}"
            )
        fresh = load_text_weights(model.fusion, folder, kept_ids=tokenizer.kept_ids, word_head=model.word_head)
    untrained, unused = (
        f"; {what}: {_modules(names)}" if names else ""
        for what, names in (("stays untrained", fresh), ("left behind", left))
    )
    reporter.say(f"  starting from {where}{untrained}{unused}")


def _modules(names: Iterable[str]) -> str:
    """The parts that parameters belong to, each once: 'layers.1, region'."""
    parts = (name.removeprefix("fusion.").split(".") for name in names)
    return ", ".join(sorted({".".join(part[: 2 if part[0] == "layers" else 1]) for part in parts}))


def _parts(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.startswith(PARTS)}
