"""Stage `prepare`: what the dataset fixes for the whole run: vocabulary, labels and the preprocessing spec."""

from edgevlm.artifacts import VOCABULARY, Vocabulary
from edgevlm.data import open_reader
from edgevlm.data.text import make_spec, train_vocabulary, write_vocabulary
from edgevlm.job import Job
from edgevlm.manifests import write_manifest

MAX_SAMPLES = 1000
"""Enough texts for a vocabulary; drawing more changes nothing."""


def prepare(job: Job) -> Vocabulary:
    """Train a WordPiece vocabulary on the training texts (never on validation or test)."""
    recipe = job.recipe
    reader = open_reader(recipe.data, recipe.task, recipe.seed, job.data_path)
    texts: list[str] = []
    limit = min(recipe.data.num_train or MAX_SAMPLES, MAX_SAMPLES)
    with job.reporter.bar("reading training texts", limit) as bar:
        for done, sample in enumerate(reader.samples("train", limit), 1):
            texts += [text.text for text in sample.texts] + list(sample.captions)
            bar.update(done)
    if not texts:  # a dataset of boxes: its words are the names of what can be found
        texts = [*reader.labels.classes, *reader.labels.attributes]
    path = job.out_dir / VOCABULARY
    write_vocabulary(path, train_vocabulary(texts, recipe.text.vocab_size))
    manifest = Vocabulary(
        provenance=job.provenance,
        preprocess=recipe.preprocess,
        tokenizer=make_spec(path, recipe.text.max_tokens),
        labels=reader.labels,
    )
    return write_manifest(job.out_dir, manifest)  # pyright: ignore[reportReturnType]
