"""Drawn sentences and scenes as batches of a model: alone, or beside the real ones of a dataset."""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgevlm.artifacts import VOCABULARY, Vocabulary
from edgevlm.data import open_reader
from edgevlm.data.nlvr import NLVR
from edgevlm.data.nlvr_pairs import Errors, PairSource
from edgevlm.data.nlvr_words import SAME
from edgevlm.data.text import Tokenizer
from edgevlm.errors import RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from edgevlm.recipe import SyntheticSection
from edgevlm.train.regions import AnswerBatch

MOST_COUNTED = 8
"""Counts above are one class."""

Parts = tuple[tuple[float, float, float, float], ...]
"""As in FusionConfig."""


class Trace(NamedTuple):
    """What a sentence's program says of each part of the image; rows of real sentences are unknown."""

    holds_BP: Tensor
    """1.0 where the claim holds in the part."""
    counts_BP: Tensor
    """Items that the claim counts in the part."""
    known_B: Tensor
    """1.0 for drawn sentences."""


@dataclass
class Drawn:
    """Drawn sentences in a model's language."""

    source: PairSource
    tokenizer: Tokenizer
    same: Tensor
    """(V,) long: token -> the token that stands for it."""

    def batch(self, number: int, sentences: int) -> tuple[AnswerBatch, Trace]:
        """Drawn batch `number`."""
        pairs = self.source.make(number, sentences)
        ids = torch.from_numpy(self.tokenizer.encode_batch(pairs.texts, truncate=True))
        ids = ids[:, : int((ids != self.tokenizer.spec.pad_id).sum(1).amax())]
        ids = ids.repeat_interleave(self.source.per_sentence, 0)
        features, boxes, scores, truth, referred, holds, counts = (
            torch.from_numpy(np.ascontiguousarray(part))
            for part in (pairs.tags, pairs.boxes, pairs.scores, pairs.truth, pairs.referred, pairs.holds, pairs.counts)
        )
        known = torch.ones(len(truth))
        batch = AnswerBatch(Regions(features, boxes, scores), ids, truth, referred, known.to(torch.uint8))
        return batch, Trace(holds, counts.clamp(max=MOST_COUNTED), known)

    def beside(self, real: AnswerBatch, rows: Tensor, share: float, parts: Parts) -> tuple[AnswerBatch, Trace]:
        """Real questions with drawn ones behind them: `share` of all, chosen by `rows`; the same rows, the same batch."""
        number = number_of(rows)
        real = shuffle_parts(real._replace(input_ids=self.spell(real.input_ids)), parts, number)
        count, num_parts = len(real.answers), len(parts)
        unknown = Trace(
            torch.zeros(count, num_parts), torch.zeros(count, num_parts, dtype=torch.long), torch.zeros(count)
        )
        if (companions := self.companions(count, share, number)) is None:
            return real, unknown
        drawn, trace = companions
        traces = (torch.cat(pair) for pair in zip(unknown, trace, strict=True))
        return join(real, drawn, self.tokenizer.spec.pad_id), Trace(*traces)

    def companions(self, count: int, share: float, number: int) -> tuple[AnswerBatch, Trace] | None:
        """Drawn batch `number`, to be `share` of all beside `count` real questions; None if that is less than one."""
        sentences = round(count * share / (1 - share) / self.source.per_sentence)
        return self.batch(number, sentences) if sentences else None

    def spell(self, input_ids: Tensor) -> Tensor:
        """Token ids with one spelling for every word, as drawn sentences have it."""
        return self.same[input_ids.long()].int()

    @torch.no_grad()
    def tie(self, model: VLM) -> None:
        """Give every spelling the embedding of the word it stands for: what is trained is the latter."""
        words = model.fusion.words.weight
        words.copy_(words[self.same.to(words.device)])


def number_of(rows: Tensor) -> int:
    """A number that depends on the rows of a batch and on nothing else."""
    return zlib.crc32(rows.numpy().tobytes())


def shuffle_parts(batch: AnswerBatch, parts: Parts, seed: int) -> AnswerBatch:
    """The parts of each image (of one size) in a random order, for data where what is said holds in any."""
    parts_P4, boxes = torch.tensor(parts), batch.regions.boxes_norm_BN4
    place_BP = torch.rand(len(boxes), len(parts), generator=torch.Generator().manual_seed(seed)).argsort(1)
    centres_BN2, middles_P2 = (0.5 * (corners[..., :2] + corners[..., 2:]) for corners in (boxes, parts_P4))
    part_BN = (centres_BN2.unsqueeze(2) - middles_P2).square().sum(-1).argmin(-1)
    shift_BN2 = parts_P4[place_BP.gather(1, part_BN), :2] - parts_P4[part_BN, :2]
    return batch._replace(regions=batch.regions._replace(boxes_norm_BN4=boxes + shift_BN2.repeat(1, 1, 2)))


def join(first: AnswerBatch, second: AnswerBatch, pad_id: int) -> AnswerBatch:
    """Two batches as one, padded to the longer text and to the image with more regions."""

    def stack(a: Tensor, b: Tensor, fill: float = 0) -> Tensor:
        width = max(a.shape[1], b.shape[1])
        rows = [F.pad(x, (0, 0) * (x.dim() - 2) + (0, width - x.shape[1]), value=fill) for x in (a, b)]
        return torch.cat(rows)

    return AnswerBatch(
        Regions(*(stack(a, b) for a, b in zip(first.regions, second.regions, strict=True))),
        stack(first.input_ids, second.input_ids, pad_id),
        torch.cat([first.answers, second.answers]),
        stack(first.referred, second.referred),
        torch.cat([first.has_referred, second.has_referred]),
    )


def synthetic_section(job: Job) -> SyntheticSection:
    """The recipe's `synthetic`.

    Raises:
        RecipeError: it has none.
    """
    if job.recipe.synthetic is None:
        raise RecipeError("The recipe draws no sentences", "Add a section `synthetic`")
    return job.recipe.synthetic


def open_drawn(job: Job, seed: int) -> Drawn:
    """The supply of drawn sentences that a recipe asks for, in the language of stage `prepare`.

    Raises:
        RecipeError: the recipe has no section `synthetic`, or its dataset nothing to draw from.
    """
    recipe, section = job.recipe, synthetic_section(job)
    reader = open_reader(recipe.data, recipe.task, recipe.seed, job.data_path)
    if not isinstance(reader, NLVR):
        raise RecipeError(f"Dataset {recipe.data.dataset} has no drawn sentences", "Remove `synthetic`, or use nlvr")
    source = PairSource(
        reader.records("train"),
        families=section.families,
        share_towers=section.share_towers,
        scenes_per_sentence=section.scenes_per_sentence,
        errors=Errors(section.box_error_px, section.tag_error),
        seed=seed,
    )
    vocabulary = read_manifest(job.inputs["prepare"], Vocabulary)
    tokenizer = Tokenizer(job.inputs["prepare"] / VOCABULARY, vocabulary.tokenizer)
    ids = {token: i for i, token in enumerate(tokenizer.tokens)}
    same = torch.arange(len(ids))
    for word, meaning in SAME.items():
        same[ids[word]] = ids[meaning]
    return Drawn(source, tokenizer, same)
