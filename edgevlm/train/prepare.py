"""Stage `prepare`: what the dataset fixes for the whole run: vocabulary, labels and the preprocessing spec."""

from collections.abc import Iterator

from edgevlm.artifacts import VOCABULARY, TokenizerSpec, Vocabulary
from edgevlm.data import Reader, open_reader
from edgevlm.data.text import make_spec, train_vocabulary, write_vocabulary
from edgevlm.data.vocabulary import choose_kept, read_foreign
from edgevlm.job import Job
from edgevlm.manifests import write_manifest
from edgevlm.models.text_weights import find_folder

MAX_SAMPLES = 1000
"""Enough texts for a vocabulary; drawing more changes nothing."""


def prepare(job: Job) -> Vocabulary:
    """Train a WordPiece vocabulary on the training texts (never on validation or test), or take the one the recipe names."""
    recipe = job.recipe
    reader = open_reader(recipe.data, recipe.task, recipe.seed, job.data_path)
    if recipe.text.vocab is not None:
        tokenizer = _bring(job, reader, recipe.text.vocab)
    else:
        texts = _texts(job, reader, min(recipe.data.num_train or MAX_SAMPLES, MAX_SAMPLES))
        # A dataset of boxes has no texts: its words are the names of what can be found.
        texts = list(texts) or [*reader.labels.classes, *reader.labels.attributes]
        write_vocabulary(job.out_dir / VOCABULARY, train_vocabulary(texts, recipe.text.vocab_size))
        tokenizer = make_spec(job.out_dir / VOCABULARY, recipe.text.max_tokens)
    manifest = Vocabulary(
        provenance=job.provenance,
        preprocess=recipe.preprocess,
        tokenizer=tokenizer,
        labels=reader.labels,
    )
    return write_manifest(job.out_dir, manifest)  # pyright: ignore[reportReturnType]


def _bring(job: Job, reader: Reader, where: str) -> TokenizerSpec:
    """Write a foreign vocabulary, whole or trimmed to the training texts and the labels, and return its spec."""
    tokens, lowercase = read_foreign(find_folder(where))
    kept_ids = None
    if job.recipe.text.trim:
        labels = reader.labels
        # Every text: what the corpus uses is a promise, not a sample. The labels' words come as tags.
        texts = _texts(job, reader, job.recipe.data.num_train)
        kept_ids = choose_kept(tokens, [*labels.classes, *labels.attributes, *texts], lowercase=lowercase)
        job.reporter.say(f"  vocabulary: {len(kept_ids):,} of {len(tokens):,} word pieces kept")
    path = job.out_dir / VOCABULARY
    write_vocabulary(path, tokens if kept_ids is None else [tokens[i] for i in kept_ids])
    return make_spec(path, job.recipe.text.max_tokens, lowercase, kept_ids)


def _texts(job: Job, reader: Reader, limit: int | None) -> Iterator[str]:
    """Questions, sentences and captions of the first training samples."""
    with job.reporter.bar("reading training texts", limit) as bar:
        for done, sample in enumerate(reader.samples("train", limit), 1):
            yield from (text.text for text in sample.texts)
            yield from sample.captions
            bar.update(done)
