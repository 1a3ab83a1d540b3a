"""Teachers from elsewhere: their logits are those of transformers' own calls, one question at a time; bad ones are one line."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from edgevlm.data.answers import normalise_answer
from edgevlm.errors import CheckpointError, EdgeVLMError, RecipeError
from edgevlm.models.teachers import RULED_OUT, check_foreign, is_foreign, open_foreign
from tests.edgevlm.hugging_face import TEXTS, pictures, save_blip, save_bridgetower, save_vilt, transformers

ANSWERS = ("red", "2", "t-shirt", "taller", "no", "green star")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip(tmp_path_factory.mktemp("blip") / "model")


@pytest.fixture(scope="module")
def vilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vilt(tmp_path_factory.mktemp("vilt") / "model")


def own_model(folder: Path, kind: str) -> tuple[Any, Any]:
    library = transformers()
    return getattr(library, kind).from_pretrained(folder).eval(), library.AutoProcessor.from_pretrained(folder)


def test_blip_ranks_answers_by_transformers_own_loss(blip: Path) -> None:
    """Its `forward` with one answer as labels returns the mean loss of the answer's tokens: that, times their number."""
    model, processor = own_model(blip, "BlipForQuestionAnswering")
    images, expected = pictures(), torch.zeros(3, len(ANSWERS))
    for row, (image, text) in enumerate(zip(images, TEXTS, strict=True)):
        inputs = processor(images=image, text=text, return_tensors="pt")
        for column, answer in enumerate(ANSWERS):
            ids = [5, *processor.tokenizer(answer, add_special_tokens=False).input_ids, 3]
            with torch.no_grad():
                output = model(**inputs, labels=torch.tensor([ids]))
            expected[row, column] = -output.loss * (len(ids) - 1)
    teacher = open_foreign(str(blip), ANSWERS)
    assert teacher.known == tuple(range(len(ANSWERS))) and not teacher.sentences
    # Answers side by side, padded: float32 sums in another order.
    torch.testing.assert_close(teacher.logits(images, TEXTS), expected, atol=1e-4, rtol=0)
    assert expected.std(0).min() > 1e-2, "the images and questions matter"


def test_blip_scores_what_it_would_write(blip: Path) -> None:
    """Of one-word answers, the likeliest is what greedy `generate` writes, if it may write nothing else first."""
    model, processor = own_model(blip, "BlipForQuestionAnswering")
    words = [word for word in processor.tokenizer.get_vocab() if word.isalpha()]
    forbidden = sorted(set(range(len(processor.tokenizer))) - set(processor.tokenizer.convert_tokens_to_ids(words)))
    teacher = open_foreign(str(blip), words, candidates=1)
    for image, text in zip(pictures(), TEXTS, strict=True):
        inputs = processor(images=image, text=text, return_tensors="pt")
        wrote = model.generate(**inputs, max_new_tokens=1, num_beams=1, do_sample=False, suppress_tokens=forbidden)
        best = int(teacher.logits([image], [text]).argmax())
        assert words[best] == processor.tokenizer.convert_ids_to_tokens(int(wrote[0, -1]))


def test_blip_candidates_have_their_own_score_and_the_others_none(blip: Path) -> None:
    everything = open_foreign(str(blip), ANSWERS).logits(pictures(), TEXTS)
    some = open_foreign(str(blip), ANSWERS, candidates=2).logits(pictures(), TEXTS)
    scored = some != RULED_OUT
    assert scored.sum(1).tolist() == [2, 2, 2]
    torch.testing.assert_close(some[scored], everything[scored], atol=1e-4, rtol=0)


def test_blip_encodes_an_image_once(blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, seen = transformers(), []
    original = library.models.blip.modeling_blip.BlipVisionModel.forward

    def counted(self: Any, pixel_values: Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(len(pixel_values))
        return original(self, pixel_values, *rest, **more)

    teacher = open_foreign(str(blip), ANSWERS)
    apart = teacher.logits(pictures(), TEXTS)
    monkeypatch.setattr(library.models.blip.modeling_blip.BlipVisionModel, "forward", counted)
    image = pictures(1)[0]
    together = teacher.logits([image] * 3, TEXTS)
    assert seen == [1]
    torch.testing.assert_close(together[0], apart[0], atol=1e-4, rtol=0)


def test_vilt_maps_its_labels_to_the_runs_answers(vilt: Path) -> None:
    """'2' and 'two' are one answer (the first label counts), 'T-shirt' is 't-shirt'; it has no 'taller'."""
    model, processor = own_model(vilt, "ViltForQuestionAnswering")
    teacher = open_foreign(str(vilt), ANSWERS, normalise=normalise_answer)
    assert [ANSWERS[i] for i in teacher.known] == ["red", "2", "t-shirt"]
    images = pictures()
    with torch.no_grad():
        own = [
            model(**processor(images=image, text=text, return_tensors="pt")).logits[0, [0, 1, 2]]
            for image, text in zip(images, TEXTS, strict=True)
        ]
    found = teacher.logits(images, TEXTS)
    torch.testing.assert_close(
        found, torch.stack(own), atol=1e-4, rtol=0
    )  # it shuffles its patches: sums in another order
    assert found.std(0).min() > 1e-2
    before = torch.get_rng_state()
    assert torch.equal(teacher.logits(images, TEXTS), found), "the same patches in the same order"
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


@pytest.mark.parametrize("answers", [("false", "true"), ("yes", "no")])
def test_bridgetower_says_whether_a_sentence_fits(tmp_path: Path, answers: tuple[str, str]) -> None:
    folder = save_bridgetower(tmp_path / "model")
    model, processor = own_model(folder, "BridgeTowerForImageAndTextRetrieval")
    teacher = open_foreign(str(folder), answers)
    assert teacher.known == (0, 1) and teacher.sentences
    images = pictures()
    with torch.no_grad():
        own = torch.cat(
            [
                model(**processor(images=i, text=t, return_tensors="pt")).logits
                for i, t in zip(images, TEXTS, strict=True)
            ]
        )
    fits = answers.index("true" if "true" in answers else "yes")
    found = teacher.logits(images, TEXTS)
    torch.testing.assert_close(found[:, fits], own[:, 1], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[:, 1 - fits], own[:, 0], atol=1e-4, rtol=0)
    with pytest.raises(CheckpointError, match="others than false and true"):
        open_foreign(str(folder), ANSWERS)
    assert teacher.logits(images, [TEXTS[0] * 30] * 3).isfinite().all(), "long texts are cut"


# --- functions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module with a function `ask` of this body; returns what a recipe would name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(body: str) -> str:
        sys.modules.pop("my_teacher", None)
        (tmp_path / "my_teacher.py").write_text(f"def ask(images, texts, answers):\n    {body}\n")
        return "my_teacher:ask"

    return write


def test_a_function_sees_images_texts_and_answers(module: Callable[[str], str]) -> None:
    where = module("return [[i.width + len(t) + len(a) for a in answers] for i, t in zip(images, texts, strict=True)]")
    assert is_foreign(where)
    check_foreign(where)
    teacher = open_foreign(where, ANSWERS)
    images: Sequence[Image.Image] = pictures()
    expected = [[i.width + len(t) + len(a) for a in ANSWERS] for i, t in zip(images, TEXTS, strict=True)]
    assert teacher.logits(images, TEXTS).tolist() == expected
    changed = open_foreign(module("return [[0.0] * len(answers)] * len(texts)"), ANSWERS)
    assert changed.hash != teacher.hash, "another function is another teacher"


def test_a_function_must_exist_and_return_a_row_per_text(module: Callable[[str], str]) -> None:
    for where, said in {"no_such_module:ask": "no_such_module", "json:no_such": "no function no_such"}.items():
        with pytest.raises(RecipeError, match=said):
            check_foreign(where)
    teacher = open_foreign(module("return [[0.0, 1.0]]"), ANSWERS)
    with pytest.raises(CheckpointError, match=r"shape \(1, 2\) for 3 texts and 6 answers"):
        teacher.logits(pictures(), TEXTS)


# --- bad input ---------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
@pytest.mark.parametrize("call", [check_foreign, lambda where: open_foreign(where, ANSWERS)])
def test_pickled_weights_are_refused_unread(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[[str], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pickled"
    shutil.copytree(blip, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / name).write_bytes(pickle.dumps({"weight": Bomb()}))
    for where in (folder, folder / name):
        with pytest.raises(CheckpointError, match=f"{name} is a pickle, which may carry code") as error:
            call(str(where))
        assert "safetensors" in error.value.fix
    assert not Path("exploded").exists()


def test_safetensors_beside_a_pickle_are_read(blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(blip, tmp_path / "both")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    both, plain = (open_foreign(str(folder), ANSWERS) for folder in (tmp_path / "both", blip))
    assert both.hash == plain.hash and not Path("exploded").exists()


def test_a_model_that_was_not_trained_to_answer_is_refused(tmp_path: Path) -> None:
    """A captioner has the same configuration, and no question encoder: it would be random."""
    folder = save_blip(tmp_path / "captioner", "BlipForConditionalGeneration")
    with pytest.raises(CheckpointError, match=r"lacks text_encoder.*not trained as BlipForQuestionAnswering"):
        open_foreign(str(folder), ANSWERS)


def test_wrong_folders_are_one_line(vilt: Path, tmp_path: Path) -> None:
    def mistake(where: Path | str, answers: Sequence[str] = ANSWERS) -> str:
        with pytest.raises(EdgeVLMError) as error:
            open_foreign(str(where), answers, normalise=normalise_answer)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "none of the run's 2 answers" in mistake(vilt, ("maybe", "never"))
    (tmp_path / "empty").mkdir()
    assert "neither a checkpoint of edgevlm nor" in mistake(tmp_path / "empty")
    other = tmp_path / "other"
    shutil.copytree(vilt, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert "of type 'gpt2'; teachers are blip, vilt, bridgetower" in mistake(other)
    (other / "config.json").write_text("{")
    assert "does not describe a model" in mistake(other)
    (other / "config.json").write_text(json.dumps(config))
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "Get the folder again" in mistake(other)
