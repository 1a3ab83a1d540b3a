"""Trim a vocabulary to the word pieces that a corpus uses: a third of a small text model is its word table.

Every single character stays, so a word of other texts is spelled in shorter pieces and not lost.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgevlm.data.text import SPECIAL_TOKENS, read_vocabulary, split_pieces
from edgevlm.errors import DataError

VOCABULARY_FILE = "vocab.txt"
BATCH = 10_000
"""Texts cut at once: a corpus may be larger than memory."""


def read_foreign(path: Path) -> tuple[list[str], bool]:
    """The tokens of a vocabulary file, or of the one in a Hugging Face folder, and whether its texts are lower-cased.

    A file alone is taken for lower case; a folder says it in `tokenizer_config.json`.

    Raises:
        DataError: no vocabulary there, or settings that cannot be read.
    """
    if not path.is_dir():
        return read_vocabulary(path), True
    settings = path / "tokenizer_config.json"
    try:
        lowercase = json.loads(settings.read_bytes()).get("do_lower_case", True) if settings.is_file() else True
    except (ValueError, AttributeError) as problem:
        raise DataError(f"{settings} is not a JSON object ({problem})", "Get the file again") from problem
    return read_vocabulary(path / VOCABULARY_FILE), bool(lowercase)


def choose_kept(tokens: Sequence[str], texts: Iterable[str], *, lowercase: bool = True) -> tuple[int, ...]:
    """Ids to keep, rising: special tokens, what `texts` use, and what spells everything else.

    Texts of the corpus are cut exactly as before: longest match first finds the same pieces in a part of the
    vocabulary that holds them. Where the vocabulary has each character of its pieces by itself, at the beginning of a
    word and inside (BERT's has, and ours have), no word becomes [UNK] that was not.

    Args:
        tokens: the vocabulary, position = id.
        texts: the corpus, cased as it comes.
        lowercase: as in the tokenizer's spec.
    """
    known = set(tokens)
    kept = {
        i
        for i, token in enumerate(tokens)
        if token in SPECIAL_TOKENS or len(spelling := _spelling(token)) == 1 or not known.issuperset(spelling)
    }
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            kept.update(*split_pieces(tokens, batch, lowercase=lowercase))
            batch.clear()
    kept.update(*split_pieces(tokens, batch, lowercase=lowercase))
    return tuple(sorted(kept))


def _spelling(token: str) -> list[str]:
    """The single-character tokens that spell a piece: '##ab' is '##a' '##b'."""
    inside = token.startswith("##") and len(token) > 2
    return [f"##{character}" if inside or i else character for i, character in enumerate(token[2 * inside :])]
