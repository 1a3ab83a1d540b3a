"""Teachers that look at images themselves and give logits over the run's answers: Hugging Face models, or a function.

| model type | class of `transformers` | logits |
|---|---|---|
| blip | BlipForQuestionAnswering | log-likelihood of each answer as the decoder would write it |
| vilt | ViltForQuestionAnswering | of its labels that are answers here; the others' places are unknown |
| bridgetower | BridgeTowerForImageAndTextRetrieval | its matching head: does the sentence fit the image (false and true, no and yes) |

Weights are read from safetensors alone: a pickle may carry code.
"""

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from edgevlm.artifacts import digest
from edgevlm.errors import CheckpointError, RecipeError
from edgevlm.manifests import MANIFEST, file_sha256
from edgevlm.models._torchvision import ensure_importable
from edgevlm.models.text_weights import CONFIG, find_folder

RULED_OUT = -1e4
"""Logit of an answer that the teacher gives no probability; finite, so that a KL with it is."""
DECODED_AT_ONCE = 256
"""Answers, over all questions, that BLIP's decoder scores in one pass: their logits over its vocabulary are large."""
DESCRIPTIONS, WEIGHTS, PICKLES = ("*.json", "*.txt"), "*.safetensors", (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_YES = (("false", "true"), ("no", "yes"))

Logits = Callable[[Sequence[Image.Image], Sequence[str]], Tensor]
"""B RGB images and the text about each -> (B, K) float32."""


@dataclass(frozen=True)
class Teacher:
    """A model that answers from images."""

    hash: str
    """Of everything that decides its logits."""
    known: tuple[int, ...]
    """Answers it can give, rising: index into the run's list; K in all."""
    logits: Logits
    sentences: bool = False
    """It says whether a sentence is true of an image; questions mean nothing to it."""


def is_checkpoint(where: str | None) -> bool:
    """Whether this names a folder that edgevlm wrote."""
    return where is not None and (Path(where) / MANIFEST).is_file()


def is_foreign(where: str | None) -> TypeGuard[str]:
    """Whether this names a teacher of any other kind: it looks at images, and has logits to give and nothing else."""
    return where is not None and not is_checkpoint(where)


def check_foreign(where: str) -> None:
    """Find out whether there is such a teacher, without loading its weights (a hub name is downloaded).

    Raises:
        CheckpointError: no such model, a model of another kind, or no weights in safetensors.
        RecipeError: no such function.
    """
    if _is_function(where):
        _function(where)
    else:
        _model_type(_folder(where))


def open_foreign(
    where: str,
    answers: Sequence[str],
    *,
    normalise: Callable[[str], str] = str,
    candidates: int | None = None,
    device: torch.device | None = None,
) -> Teacher:
    """A teacher from elsewhere, ready to answer.

    Args:
        where: folder or hub name of a Hugging Face model, or `module:function`; the function is called with B images, B
            texts and the A answers and returns logits (B, A).
        answers: of the run; what the logits' columns stand for is `Teacher.known`.
        normalise: the form in which two spellings of an answer are equal.
        candidates: see `TeacherOutputsSection`.
        device: where it runs; the logits come back to the CPU.

    Raises:
        CheckpointError: no such model, one of another kind, weights missing or pickled, or it knows none of the answers.
        RecipeError: no such function.
    """
    if _is_function(where):
        return _from_function(where, answers)
    folder = _folder(where)
    kind = _model_type(folder)
    library_class, adapt = ADAPTERS[kind]
    model, processor = _load(library_class, folder, device or torch.device("cpu"))
    known, logits = adapt(model, processor, answers, normalise, candidates)
    if not known:
        raise CheckpointError(
            f"The teacher in {where} gives none of the run's {len(answers)} answers", "Choose another"
        )
    files = sorted(file for pattern in (*DESCRIPTIONS, WEIGHTS) for file in folder.glob(pattern))
    content = digest([(file.name, file_sha256(file)) for file in files])
    return Teacher(content, known, logits, sentences=kind == "bridgetower")


# --- Hugging Face models -----------------------------------------------------------------------------------------


def _blip(
    model: Any, processor: Any, answers: Sequence[str], normalise: Callable[[str], str], candidates: int | None
) -> tuple[tuple[int, ...], Logits]:
    """Log-likelihood of every answer, its end included, as BLIP ranks a closed list (without label smoothing)."""
    config, device, num_answers = model.config.text_config, model.device, len(answers)
    pieces = processor.tokenizer(list(answers), add_special_tokens=False).input_ids
    written = [torch.tensor([config.bos_token_id, *ids, config.sep_token_id]) for ids in pieces]
    ids_AL = torch.nn.utils.rnn.pad_sequence(written, True, config.pad_token_id).to(device)
    lengths_A = torch.tensor([len(ids) for ids in written], device=device)
    num_chosen = min(candidates or num_answers, num_answers)

    def decode(ids_RL: Tensor, question_RTD: Tensor) -> Tensor:
        output = model.text_decoder(input_ids=ids_RL, encoder_hidden_states=question_RTD, use_cache=False)
        return output.logits.float().log_softmax(-1)

    def score(chosen_R: Tensor, question_RTD: Tensor) -> Tensor:
        ids_RL, lengths_R = ids_AL[chosen_R], lengths_A[chosen_R]
        ids_RL = ids_RL[:, : int(lengths_R.max())]
        says_RLV = decode(ids_RL[:, :-1], question_RTD)
        token_RL = says_RLV.gather(2, ids_RL[:, 1:, None]).squeeze(2)
        written_RL = torch.arange(1, ids_RL.shape[1], device=device) < lengths_R[:, None]
        return (token_RL * written_RL).sum(1)

    def rank(ids_BT: Tensor, image_BPD: Tensor) -> Tensor:
        """Logits (B, A) of questions of one length."""
        question_BTD = model.text_encoder(input_ids=ids_BT, encoder_hidden_states=image_BPD).last_hidden_state
        chosen_BC = torch.arange(num_answers, device=device).expand(len(ids_BT), -1)
        if num_chosen < num_answers:
            start_B1 = torch.full((len(ids_BT), 1), config.bos_token_id, device=device)
            first_BV = decode(start_B1, question_BTD)[:, 0]
            chosen_BC = first_BV[:, ids_AL[:, 1]].topk(num_chosen, dim=1).indices
        row_R = torch.arange(len(ids_BT), device=device).repeat_interleave(num_chosen)
        pieces = zip(chosen_BC.flatten().split(DECODED_AT_ONCE), row_R.split(DECODED_AT_ONCE), strict=True)
        scores_R = torch.cat([score(chosen, question_BTD[row]) for chosen, row in pieces])
        ruled_out_BA = torch.full((len(ids_BT), num_answers), RULED_OUT, device=device)
        return ruled_out_BA.scatter(1, chosen_BC, scores_R.view_as(chosen_BC))

    @torch.no_grad()
    def logits(images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        different = list({id(image): image for image in images}.values())  # questions about one image encode it once
        place = {id(image): i for i, image in enumerate(different)}
        pixels = processor.image_processor(different, return_tensors="pt").pixel_values.to(device)
        states_PD = model.vision_model(pixels).last_hidden_state
        options = {"truncation": True, "max_length": config.max_position_embeddings}
        questions = processor.tokenizer(list(texts), **options).input_ids
        found_BA = torch.empty(len(texts), num_answers)
        # Without padding: the decoder of transformers 5.23 attends to a question's padding, whatever mask it is given.
        for length in {len(ids) for ids in questions}:
            rows = [row for row, ids in enumerate(questions) if len(ids) == length]
            ids_BT = torch.tensor([questions[row] for row in rows], device=device)
            found_BA[rows] = rank(ids_BT, states_PD[[place[id(images[row])] for row in rows]]).cpu()
        return found_BA

    return tuple(range(num_answers)), logits


def _vilt(
    model: Any, processor: Any, answers: Sequence[str], normalise: Callable[[str], str], candidates: int | None
) -> tuple[tuple[int, ...], Logits]:
    """Its classifier's logits, where the label and an answer are the same words (the first such label counts)."""
    column: dict[str, int] = {}
    for index, label in sorted(model.config.id2label.items()):
        column.setdefault(normalise(label), index)
    known = tuple(i for i, answer in enumerate(answers) if normalise(answer) in column)
    columns = [column[normalise(answers[i])] for i in known]

    @torch.no_grad()
    def logits(images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        batch = _inputs(processor, images, texts, model.config.max_position_embeddings).to(model.device)
        with torch.random.fork_rng(devices=[]):  # it draws the order of its patches
            torch.default_generator.manual_seed(0)
            return model(**batch).logits[:, columns].float().cpu()

    return known, logits


def _bridgetower(
    model: Any, processor: Any, answers: Sequence[str], normalise: Callable[[str], str], candidates: int | None
) -> tuple[tuple[int, ...], Logits]:
    """Its matching head, whose two logits say that the text does not fit, and that it does."""
    pair = next((pair for pair in NO_YES if sorted(pair) == sorted(answers)), None)
    if pair is None:
        raise CheckpointError(
            "BridgeTower says whether a sentence fits an image; the run's answers are others than false and true",
            "Take it for a task of true and false sentences (reasoning), or choose a BLIP or ViLT",
        )
    columns = [pair.index(answer) for answer in answers]
    text = model.config.text_config
    length = (
        text.max_position_embeddings - text.pad_token_id - 1
    )  # RoBERTa counts its positions from behind the padding's

    @torch.no_grad()
    def logits(images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        batch = _inputs(processor, images, texts, length).to(model.device)
        return model(**batch).logits[:, columns].float().cpu()

    return (0, 1), logits


ADAPTERS: dict[str, tuple[str, Callable[..., tuple[tuple[int, ...], Logits]]]] = {
    "blip": ("BlipForQuestionAnswering", _blip),
    "vilt": ("ViltForQuestionAnswering", _vilt),
    "bridgetower": ("BridgeTowerForImageAndTextRetrieval", _bridgetower),
}
"""`model_type` of a `config.json` -> class of `transformers`, and what makes logits over the answers of it."""


def _inputs(processor: Any, images: Sequence[Image.Image], texts: Sequence[str], max_length: int) -> Any:
    options = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
    return processor(images=list(images), text=list(texts), **options)


def _folder(where: str) -> Path:
    """The local folder of a Hugging Face model, with weights that may be read."""
    if Path(where).suffix in PICKLES:
        raise _pickled(where)
    folder = find_folder(where, DESCRIPTIONS, (WEIGHTS,))
    if not any(folder.glob(WEIGHTS)):
        if found := next((file.name for file in sorted(folder.glob("*")) if file.suffix in PICKLES), None):
            raise _pickled(f"{folder / found}")
        raise CheckpointError(
            f"{where} holds neither a checkpoint of edgevlm nor a model's weights in safetensors",
            f"Give the folder with {MANIFEST}, or one that save_pretrained wrote",
        )
    return folder


def _pickled(path: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle, which may carry code and is not read",
        "Give the same weights as safetensors (load them where you trust them, then save_pretrained)",
    )


def _model_type(folder: Path) -> str:
    try:
        kind = json.loads((folder / CONFIG).read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise CheckpointError(f"{folder / CONFIG} does not describe a model", "Give a Hugging Face folder") from problem
    if kind not in ADAPTERS:
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r}; teachers are {', '.join(ADAPTERS)}",
            "Choose one of these, or write a function and name it as module:function",
        )
    return kind


def _load(library_class: str, folder: Path, device: torch.device) -> tuple[Any, Any]:
    """The model in evaluation mode, and its processor."""
    ensure_importable()
    try:
        import transformers
    except ImportError as problem:
        raise CheckpointError(
            f"The teacher in {folder} needs transformers, which is not installed", "pip install 'edgevlm[teachers]'"
        ) from problem
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, library_class)
    try:
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise CheckpointError(f"{folder} is no {library_class} ({reason[:160]})", "Get the folder again") from problem
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"The model in {folder} lacks {missing[0]} ({len(missing)} tensors): it was not trained as {library_class}",
            "Choose one that was fine-tuned for this",
        )
    return model.eval().to(device), processor


# --- functions ---------------------------------------------------------------------------------------------------


def _is_function(where: str) -> bool:
    return ":" in where and not Path(where).exists()


def _function(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as problem:
        raise RecipeError(
            f"distil.teacher: there is no function {name} in a module {module} ({problem})",
            "Give module:function of something that Python finds (PYTHONPATH)",
        ) from problem


def _from_function(where: str, answers: Sequence[str]) -> Teacher:
    function, names = _function(where), tuple(answers)

    def logits(images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        found = torch.as_tensor(function(list(images), list(texts), names)).detach().float().cpu()
        if found.shape != (len(texts), len(names)):
            raise CheckpointError(
                f"{where} returned logits of shape {tuple(found.shape)} for {len(texts)} texts and {len(names)} answers",
                "Return one row per text and one column per answer",
            )
        return found

    source = inspect.getsource(inspect.getmodule(function) or function)
    return Teacher(digest([where, source]), tuple(range(len(names))), logits)
