"""Text weights of the BERT family (BERT, MiniLM) for the fusion: from a Hugging Face folder, tensor by tensor.

What the fusion does to words is what BERT does, so every tensor of a text model has its place here; only the region
projection has no counterpart and stays as it was initialised. BERT's first token type becomes the words', its second
the type that tags and regions share (MiniVLM and OSCAR do the same). Of two encoders, the text encoder takes the first of a text
model's layers and the cross-modal encoder the next, as X-VLM does; what reads or attends to regions stays as it was.
"""

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from edgevlm.artifacts import FusionConfig
from edgevlm.errors import CheckpointError
from edgevlm.models.fusion import Fusion
from edgevlm.models.heads import WordHead
from edgevlm.models.stacks import stacks_of

CONFIG = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""In order of preference; the second is read without executing what a pickle may carry."""
DESCRIPTIONS = (CONFIG, "vocab.txt", "tokenizer_config.json")

OUTSIDE = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types",
    "embeddings.LayerNorm": "word_norm",
    "pooler.dense": "pooler",
}
IN_LAYER = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "ffn_in",
    "output.dense": "ffn_out",
    "output.LayerNorm": "ffn_norm",
}
WORD_HEAD = {
    "cls.predictions.transform.dense.weight": "dense.weight",
    "cls.predictions.transform.dense.bias": "dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "norm.bias",
    "cls.predictions.bias": "bias",
}
"""BERT's module (or tensor) -> ours."""
TABLES = ("words", "positions", "types")
NOT_NEEDED = ("embeddings.position_ids", "cls.")
"""A buffer of old releases, and heads: the masked-word head is taken where the model has one, its copies are not."""


class TextConfig(BaseModel):
    """What of a text model's `config.json` decides what its weights mean."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "absolute"
    is_decoder: bool = False


def find_folder(
    where: str, descriptions: Sequence[str] = DESCRIPTIONS, weight_files: Sequence[str] = WEIGHT_FILES
) -> Path:
    """The local folder of a model: `where` itself, or the snapshot of a model of that name on the Hugging Face hub.

    Args:
        where: folder or name.
        descriptions, weight_files: what is downloaded; of the weights the first that is there.

    Raises:
        CheckpointError: no such folder, and the hub does not have it or cannot be reached.
    """
    if Path(where).exists():
        return Path(where)
    # Looked up here: a machine that only uses local folders need not start a network client.
    from huggingface_hub import snapshot_download

    folder = Path()
    try:
        for weights in weight_files:  # one after the other: many models offer both, hundreds of megabytes each
            folder = Path(snapshot_download(where, allow_patterns=[*descriptions, weights]))
            if (folder / weights).is_file():
                break
        return folder
    except Exception as problem:  # the client raises errors of many libraries; all of them mean: no weights
        reason = str(problem).strip().splitlines()[:1] or [type(problem).__name__]
        raise CheckpointError(
            f"No folder '{where}', and the Hugging Face hub gives no model of that name ({reason[0][:160]})",
            f"Without a network give a local folder that holds {CONFIG}, {WEIGHT_FILES[0]} and vocab.txt",
        ) from problem


def spread_layers(num_ours: int, num_theirs: int) -> tuple[int, ...]:
    """Layers of a deeper text model for a shallower fusion: evenly spread, last to last (12 to 6 gives 1, 3, 5 ...)."""
    return tuple((i + 1) * num_theirs // num_ours - 1 for i in range(num_ours))


def load_text_weights(
    fusion: Fusion,
    folder: Path,
    *,
    kept_ids: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    word_head: WordHead | None = None,
) -> list[str]:
    """Copy the weights of a text model into `fusion` (and `word_head`), in place.

    Args:
        fusion: of the text model's width, heads and FFN; with as many layers or fewer, positions likewise.
        folder: `config.json` beside `model.safetensors` or `pytorch_model.bin`.
        kept_ids: rows of the word table to take, as in `TokenizerSpec.kept_ids`; None = all.
        layers: the text model's layer for each of ours; None = `spread_layers`.
        word_head: gets the masked-word head where the text model has one.

    Returns:
        Names of the parameters that the text model says nothing of; they are as they were.

    Raises:
        CheckpointError: no text model in `folder`, one of another family or shape, or a tensor that is missing or has
            no place (it is named).
    """
    config = read_config(folder)
    ours = fusion.config
    places = _places(ours)
    layers = tuple(layers) if layers is not None else spread_layers(len(places), config.num_hidden_layers)
    _check_shape(fusion, config, layers, folder)
    given = read_tensors(folder)
    given["embeddings.word_embeddings.weight"] = _rows(given, kept_ids, fusion.words.num_embeddings, folder)
    head = {name: given[name] for name in WORD_HEAD if name in given}
    _check_names(set(given), config.num_hidden_layers, folder)
    mapped: dict[str, Tensor] = {}
    for theirs, our in _pairs(layers, places):
        tensor = given[theirs]
        mapped[our] = tensor[: fusion.positions.num_embeddings] if our == "positions.weight" else tensor
    untouched = _copy(fusion, mapped, folder)
    if word_head is not None:
        if kept_ids is not None and "cls.predictions.bias" in head:
            head["cls.predictions.bias"] = head["cls.predictions.bias"][list(kept_ids)]
        untouched += [
            f"word_head.{name}" for name in _copy(word_head, {WORD_HEAD[k]: v for k, v in head.items()}, folder)
        ]
    return untouched


def trim_embeddings(fusion: Fusion, kept_ids: Sequence[int], word_head: WordHead | None = None) -> None:
    """Keep only the rows `kept_ids` of the word table and of the word head's bias, in place; row i is then token i.

    Raises:
        CheckpointError: an id beyond the table.
    """
    if max(kept_ids) >= fusion.words.num_embeddings or min(kept_ids) < 0:
        raise CheckpointError(
            f"Token {max(kept_ids)} is beyond the word table of {fusion.words.num_embeddings} rows",
            "Trim the vocabulary that the model was trained with",
        )
    index = torch.tensor(kept_ids, device=fusion.words.weight.device)
    with torch.no_grad():
        fusion.words = torch.nn.Embedding.from_pretrained(fusion.words.weight[index].clone(), freeze=False)
        if word_head is not None:
            word_head.bias = torch.nn.Parameter(word_head.bias[index].clone())


# --- reading -----------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> TextConfig:
    """The text model's shape.

    Raises:
        CheckpointError: no readable `config.json`, or a model whose weights would mean something else here.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"No text model in {folder} ({CONFIG} is missing)", f"Give a folder with {CONFIG} and {WEIGHT_FILES[0]}"
        )
    try:
        config = TextConfig.model_validate_json(path.read_bytes())
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(
            f"{path} does not describe a BERT ({where}: {first['msg']})", "Give a model of the BERT family"
        ) from problem
    expected = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
        "is_decoder": False,
    }
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{path} has {name} {getattr(config, name)!r}; the fusion computes with {value!r}",
                "Give a BERT or MiniLM encoder",
            )
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors of a text model by BERT's names, as float32 where they are numbers.

    Raises:
        CheckpointError: no weights, or a file that is not what its name says.
    """
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"No weights in {folder}", f"Give a folder with {' or '.join(WEIGHT_FILES)}")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, OSError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise CheckpointError(f"{path} cannot be read ({reason[:160]})", "Get the file again") from problem
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(
            f"{path} is not a dictionary of tensors", "Give the weights alone, as from_pretrained reads them"
        )
    named = {_bert_name(name): tensor for name, tensor in tensors.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in named.items()}


def _bert_name(name: str) -> str:
    """Without the prefix that models with heads add; early releases called a norm's weight gamma and its bias beta."""
    return (
        name.removeprefix("bert.")
        .replace("LayerNorm.gamma", "LayerNorm.weight")
        .replace("LayerNorm.beta", "LayerNorm.bias")
    )


# --- mapping -----------------------------------------------------------------------------------------------------


def _places(config: FusionConfig) -> list[str]:
    """Our layers that read words, in order: the module of each."""
    return [f"{s.module}.{i}" for s in stacks_of(config) if s.name != "vision" for i in range(s.depth(config))]


def _pairs(layers: Sequence[int], places: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(their tensor, our tensor) for the fusion whose layer `places[i]` takes their layer `layers[i]`."""
    modules = list(OUTSIDE.items())
    for place, j in zip(places, layers, strict=True):
        modules += [(f"encoder.layer.{j}.{theirs}", f"{place}.{our}") for theirs, our in IN_LAYER.items()]
    for theirs, our in modules:
        for kind in ("weight",) if our in TABLES else ("weight", "bias"):
            yield f"{theirs}.{kind}", f"{our}.{kind}"


def _check_names(given: set[str], num_layers: int, folder: Path) -> None:
    expected = {theirs for theirs, _ in _pairs(range(num_layers), [""] * num_layers)}
    if missing := sorted(expected - given):
        raise CheckpointError(
            f"The text model in {folder} lacks {missing[0]} ({len(missing)} tensors are missing)",
            "Give a whole BERT encoder with its pooler",
        )
    left = sorted(name for name in given - expected if not name.startswith(NOT_NEEDED))
    if left:
        raise CheckpointError(
            f"The text model in {folder} has {left[0]}, which has no place in the fusion ({len(left)} such tensors)",
            "Give a plain BERT or MiniLM encoder",
        )


def _check_shape(fusion: Fusion, config: TextConfig, layers: Sequence[int], folder: Path) -> None:
    ours = fusion.config
    heads, ffn = ours.text_heads + ours.layer_heads, ours.text_ffn + ours.layer_ffn
    differing = {
        "width": (ours.hidden, config.hidden_size),
        "heads": (heads, (config.num_attention_heads,) * len(heads)),
        "neurons": (ffn, (config.intermediate_size,) * len(ffn)),
    }
    for what, (our, theirs) in differing.items():
        if our != theirs:
            raise CheckpointError(
                f"The fusion has {what} {our}, the text model in {folder} {theirs}",
                "Name a fusion of its shape (minilm-l12-h384, minilm-l6-h384, bert-base)",
            )
    if len(layers) != len(heads) or not all(0 <= j < config.num_hidden_layers for j in layers):
        raise CheckpointError(
            f"{len(heads)} fusion layers cannot take layers {list(layers)} of the "
            f"{config.num_hidden_layers} in {folder}",
            "Choose one existing layer for each of the fusion's",
        )
    if fusion.positions.num_embeddings > config.max_position_embeddings:
        raise CheckpointError(
            f"The text model in {folder} knows {config.max_position_embeddings} positions, "
            f"the fusion asks for {fusion.positions.num_embeddings}",
            f"Set text.max_tokens to {config.max_position_embeddings} or less",
        )


def _rows(given: dict[str, Tensor], kept_ids: Sequence[int] | None, vocab_size: int, folder: Path) -> Tensor:
    name = "embeddings.word_embeddings.weight"
    if name not in given:
        raise CheckpointError(f"The text model in {folder} lacks {name}", "Give a whole BERT encoder with its pooler")
    table_VD = given[name]
    if kept_ids is None and len(table_VD) == vocab_size:
        return table_VD
    if kept_ids is None or len(kept_ids) != vocab_size or max(kept_ids) >= len(table_VD):
        raise CheckpointError(
            f"The text model in {folder} has {len(table_VD)} word pieces, the vocabulary here {vocab_size}",
            "Set text.vocab to the text model's folder (and text.trim to keep only what the data use)",
        )
    return table_VD[list(kept_ids)]


def _copy(module: torch.nn.Module, tensors: dict[str, Tensor], folder: Path) -> list[str]:
    """Copy by name; returns what `tensors` does not name."""
    state = module.state_dict()
    for name, tensor in tensors.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} is {tuple(state[name].shape)} here and {tuple(tensor.shape)} in {folder}",
                "Name a fusion of the text model's shape",
            )
        state[name].copy_(tensor)
    return sorted(state.keys() - tensors.keys())
