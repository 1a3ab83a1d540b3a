"""The text side of the contract: a WordPiece vocabulary, and sentences -> fixed-length ids.

The rules are BERT's (clean, split on punctuation, lower-case and strip accents if `lowercase`, longest match first),
through Hugging Face `tokenizers`. Special tokens cannot be typed: "[SEP]" in a question is split like any other text.
Vocabularies of BERT's family are read as they are; only where their special tokens stand differs.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_lowercase, digits

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from edgevlm.artifacts import TokenizerSpec
from edgevlm.errors import DataError, TextError
from edgevlm.manifests import file_sha256

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""They come first in a vocabulary trained here, and stand anywhere in one that was brought."""

BASE_CHARACTERS = ascii_lowercase + digits + "?.,'-"
"""Always in the vocabulary, so that a word outside the training data is spelled and not lost."""


def train_vocabulary(texts: Iterable[str], size: int) -> list[str]:
    """A WordPiece vocabulary of at most `size` tokens, lower case; the position of a token is its id.

    The same texts, in any order, give the same vocabulary.

    Raises:
        TextError: `size` does not hold the special tokens and the characters of the texts.
    """
    tokenizer = _build(models.WordPiece(unk_token="[UNK]"), lowercase=True)
    texts = sorted(texts)
    characters = set(BASE_CHARACTERS)
    for text in texts:
        for word, _ in _words(tokenizer, text):
            characters.update(word)
    # `tokenizers` numbers the "##x" pieces in hash-map order, which differs from run to run and decides ties between
    # merges. Handed over as special tokens, all single characters have fixed ids.
    fixed = [*SPECIAL_TOKENS, *sorted(characters), *(f"##{character}" for character in sorted(characters))]
    if size < len(fixed):
        raise TextError(
            f"A vocabulary of {size} tokens cannot hold the {len(fixed)} special tokens and characters of the texts",
            f"Set text.vocab_size to {len(fixed)} or more",
        )
    trainer = trainers.WordPieceTrainer(vocab_size=size, show_progress=False, special_tokens=fixed)
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def write_vocabulary(path: Path, tokens: Sequence[str]) -> None:
    """Write one token per line (UTF-8, "\\n"), the form that BERT tokenizers of every language read."""
    path.write_text(_file_text(tokens), encoding="utf-8", newline="\n")


def vocabulary_sha256(tokens: Sequence[str]) -> str:
    """SHA-256 of the file that `write_vocabulary` makes of these tokens, as in `TokenizerSpec.vocab_sha256`."""
    return hashlib.sha256(_file_text(tokens).encode()).hexdigest()


def _file_text(tokens: Sequence[str]) -> str:
    return "".join(f"{token}\n" for token in tokens)


def read_vocabulary(path: Path) -> list[str]:
    """The tokens of a vocabulary file, in order of their ids.

    Raises:
        DataError: the file is missing, lacks a special token, or holds a token twice.
    """
    if not path.is_file():
        raise DataError(f"The vocabulary {path} is missing", "Copy the folder whole, or run the stage again")
    tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if missing := [token for token in SPECIAL_TOKENS if token not in tokens]:
        raise DataError(f"{path} lacks {' '.join(missing)}", "Give a vocab.txt of the BERT family, one token per line")
    if len(set(tokens)) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise DataError(f"{path} holds {twice!r} twice", "Remove one: the position of a token is its id")
    return tokens


def make_spec(
    vocab_path: Path, max_tokens: int, lowercase: bool = True, kept_ids: Sequence[int] | None = None
) -> TokenizerSpec:
    """The spec that goes with a vocabulary file; ids of the special tokens are where the file has them."""
    tokens = read_vocabulary(vocab_path)
    pad, unk, cls, sep, mask = (tokens.index(token) for token in SPECIAL_TOKENS)
    return TokenizerSpec(
        vocab_sha256=file_sha256(vocab_path),
        vocab_size=len(tokens),
        lowercase=lowercase,
        max_tokens=max_tokens,
        pad_id=pad,
        unk_id=unk,
        cls_id=cls,
        sep_id=sep,
        mask_id=mask,
        kept_ids=None if kept_ids is None else tuple(kept_ids),
    )


def split_pieces(tokens: Sequence[str], texts: Sequence[str], *, lowercase: bool = True) -> list[list[int]]:
    """Ids of the word pieces of each text: any number of them, without special tokens."""
    encodings = _wordpiece(tokens, lowercase).encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


class Tokenizer:
    """Sentences -> ids of fixed length: [CLS], pieces, [SEP], then [PAD].

    Raises:
        DataError: the vocabulary is missing, or is not the one that the spec names.
    """

    def __init__(self, vocab_path: Path, spec: TokenizerSpec) -> None:
        tokens = read_vocabulary(vocab_path)
        if file_sha256(vocab_path) != spec.vocab_sha256 or len(tokens) != spec.vocab_size:
            raise DataError(
                f"{vocab_path} is not the vocabulary that the model was trained with", "Copy the model's folder whole"
            )
        self.spec = spec
        self.tokens = tokens
        self._special = {spec.pad_id, spec.unk_id, spec.cls_id, spec.sep_id, spec.mask_id}
        self._tokenizer = _wordpiece(tokens, spec.lowercase)

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text: (max_tokens,) int32.

        Raises:
            TextError: no words, or more tokens than the model takes.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, truncate: bool = False) -> np.ndarray:
        """Ids of many texts: (n, max_tokens) int32.

        Args:
            texts: questions or sentences.
            truncate: cut what is too long (the last token stays [SEP]) instead of raising.

        Raises:
            TextError: a text without words or, unless `truncate`, with more tokens than the model takes.
        """
        spec = self.spec
        ids_NL = np.full((len(texts), spec.max_tokens), spec.pad_id, np.int32)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        for row, encoding, text in zip(ids_NL, encodings, texts, strict=True):
            pieces = encoding.ids
            if not pieces:
                raise TextError(f"The text {text!r} has no words", "Ask a question in words")
            if len(pieces) + 2 > spec.max_tokens and not truncate:
                raise TextError(
                    f"{_shorten(text)!r} has {len(pieces) + 2} tokens with [CLS] and [SEP]; "
                    f"the model takes {spec.max_tokens}",
                    "Shorten it, or train with a larger text.max_tokens",
                )
            pieces = pieces[: spec.max_tokens - 2]
            row[: len(pieces) + 2] = [spec.cls_id, *pieces, spec.sep_id]
        return ids_NL

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Readable text of ids, for reports; special tokens are left out."""
        words = [self.tokens[int(i)] for i in ids if int(i) not in self._special]
        return " ".join(words).replace(" ##", "")


def _wordpiece(tokens: Sequence[str], lowercase: bool) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    return _build(models.WordPiece(vocab, unk_token="[UNK]"), lowercase=lowercase)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _build(model: models.Model, *, lowercase: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _words(tokenizer: tokenizers.Tokenizer, text: str) -> list[tuple[str, tuple[int, int]]]:
    return tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))  # pyright: ignore


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
