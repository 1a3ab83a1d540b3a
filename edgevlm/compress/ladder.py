"""The ladder: static token budgets of one trained model, chosen where they cost least accuracy on half of the validation split.

The search walks down from the full budget: of all numbers (regions read, regions and words kept behind every trimming layer) it
lowers the one whose next step loses least accuracy per multiply-add saved, over and over. Everything that was tried on the
way makes the Pareto front, and the rungs are spread over it. Ours.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from edgevlm.artifacts import Checkpoint, Rung
from edgevlm.compress.cost import fusion_macs
from edgevlm.job import Job
from edgevlm.models.trimmer import FULL, Trim, trim_of
from edgevlm.models.vlm import VLM
from edgevlm.recipe import RungBudget, TrimSection
from edgevlm.train.answering import predict, question_scores
from edgevlm.train.halves import held_out, units_of
from edgevlm.train.regions import RegionSplit

SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)
"""Steps of every number, as shares of all tokens."""
WORDS_MULTIPLE = 4
"""Words read are rounded up to a multiple of this."""


@dataclass(frozen=True)
class Candidate:
    """A budget that was tried."""

    trim: Trim
    macs: int
    accuracy: float
    """On the validation questions that choose, 0..1."""


def named_rungs(budgets: dict[str, RungBudget], layers: Sequence[int]) -> tuple[Rung, ...]:
    """The rungs that a recipe names."""

    def spread(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return numbers * len(layers) if len(numbers) == 1 else numbers

    return tuple(
        Rung(
            name=name,
            regions=spread(budget.regions),
            words=spread(budget.words),
            num_words=budget.num_words,
            num_regions=budget.num_regions,
        )
        for name, budget in budgets.items()
    )


def choose_ladder(model: VLM, manifest: Checkpoint, job: Job, section: TrimSection) -> tuple[Rung, ...]:
    """The full rung and those below it, by falling cost."""
    split, rows = choosing(job)
    if not len(rows):
        job.reporter.say("  ladder: no validation question to choose by, so the full rung alone")
    tried = search(model, split, section, rows) if len(rows) else [Candidate(FULL, 0, 0.0)]
    full, num_words, num_regions = tried[0], manifest.tokenizer.max_tokens, manifest.model.tee.num_regions
    rungs = [Rung(name="full", regions=(num_regions,) * len(section.layers))]
    for candidate in spread(pareto(tried), full, section):
        trim, name = candidate.trim, f"m{100 * candidate.macs / full.macs:.0f}"
        if name == rungs[-1].name:  # hardly cheaper, and two programs of one name cannot be
            continue
        rungs.append(
            Rung(
                name=name,
                regions=trim.regions,
                words=trim.words,
                num_words=None if trim.num_words in (None, num_words) else trim.num_words,
                num_regions=None if trim.num_regions in (None, num_regions) else trim.num_regions,
            )
        )
    job.reporter.say(f"  ladder: {len(tried)} budgets tried, {len(rungs)} rungs: {', '.join(r.name for r in rungs)}")
    return tuple(rungs)


def choosing(job: Job) -> tuple[RegionSplit, torch.Tensor]:
    """The validation split and which of its questions choose: the half that the governor does not test its thresholds on."""
    cache = job.inputs["regions"]
    split = RegionSplit.load(cache, "val")
    chooses = ~held_out(units_of(cache, "val", split, job.recipe.govern.unit))
    return split, torch.from_numpy(np.flatnonzero(chooses))


def search(model: VLM, split: RegionSplit, section: TrimSection, rows: torch.Tensor | None = None) -> list[Candidate]:
    """Budgets from everything down to what loses more than `max_loss`, in the order in which they were tried.

    `rows` are the questions that choose; None = all of the split.
    """
    rows = torch.arange(len(split.answers)) if rows is None else rows
    num_words, num_regions = split.input_ids.shape[1], split.scores.shape[1]
    config, region_dim = model.config.fusion, model.tee.region_dim
    longest = int((split.input_ids != model.fusion.pad_id).sum(1).amax())
    longest = min(num_words, math.ceil(longest / WORDS_MULTIPLE) * WORDS_MULTIPLE)
    trims_words = config.trim is not None and config.trim.words
    context = config.trim.context if config.trim is not None else 0
    least = {"num_regions": context + 1, "regions": context + 1, "words": 2}
    tried: dict[Trim, Candidate] = {}

    def attempt(trim: Trim) -> Candidate:
        if trim not in tried:
            accuracy = accuracy_of(model, split, rows, trim)
            tried[trim] = Candidate(trim, fusion_macs(config, num_words, num_regions, region_dim, trim), accuracy)
        return tried[trim]

    full = attempt(FULL)
    layers = len(section.layers)
    # Words that no question has cost without being of use: reading fewer is free.
    here = attempt(
        Trim(
            num_words=longest,
            num_regions=num_regions,
            words=(longest,) * layers if trims_words else (),
            regions=(num_regions,) * layers,
        )
    )
    while True:
        below = [attempt(trim) for trim in _one_step_down(here.trim, longest, num_regions, least)]
        below = [candidate for candidate in below if candidate.macs < here.macs]
        if not below:
            break
        here = min(below, key=lambda c: (here.accuracy - c.accuracy + 1e-4) / (here.macs - c.macs))
        if here.accuracy < full.accuracy - section.max_loss - 0.02:
            break
    return list(tried.values())


def _one_step_down(trim: Trim, num_words: int, num_regions: int, least: dict[str, int]) -> Iterator[Trim]:
    """Every number a step lower, and what follows it in later layers no higher."""

    def lower(value: int, whole: int, floor: int) -> int | None:
        return next((n for share in SHARES if (n := max(floor, math.ceil(share * whole))) < value), None)

    if trim.num_regions is not None:
        fewer = lower(trim.num_regions, num_regions, least["num_regions"])
        if fewer is not None:
            yield replace(trim, num_regions=fewer, regions=tuple(min(n, fewer) for n in trim.regions))
    for field, whole in (("regions", num_regions), ("words", num_words)):
        numbers: tuple[int, ...] = getattr(trim, field)
        for place, value in enumerate(numbers):
            fewer = lower(value, whole, least[field])
            if fewer is not None:
                changed = (*numbers[:place], *(min(n, fewer) for n in numbers[place:]))
                yield replace(trim, **{field: changed})


def pareto(tried: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both, by rising cost."""
    front: list[Candidate] = []
    for candidate in sorted(tried, key=lambda c: (c.macs, -c.accuracy)):
        if not front or candidate.accuracy > front[-1].accuracy:
            front.append(candidate)
    return front


def spread(front: Sequence[Candidate], full: Candidate, section: TrimSection) -> list[Candidate]:
    """`rungs - 1` candidates of the front, spread evenly by the logarithm of their cost, the largest first.

    The least is the cheapest that loses no more than `max_loss`.
    """
    assert isinstance(section.rungs, int)
    allowed = [c for c in front if c.accuracy >= full.accuracy - section.max_loss and c.macs < full.macs]
    count = section.rungs - 1
    if not allowed or not count:
        return []
    low, high = math.log(allowed[0].macs), math.log(allowed[-1].macs)
    chosen: list[Candidate] = []
    for i in range(count):
        wanted = low if count == 1 else high + (low - high) * i / (count - 1)
        nearest = min(allowed, key=lambda c: abs(math.log(c.macs) - wanted))
        if nearest not in chosen:
            chosen.append(nearest)
    return sorted(chosen, key=lambda c: -c.macs)


@torch.no_grad()
def score_rungs(model: VLM, job: Job, rungs: Sequence[Rung]) -> list[float]:
    """Accuracy of every rung on the validation questions that choose."""
    split, rows = choosing(job)
    return [accuracy_of(model, split, rows, trim_of(rung)) for rung in rungs]


def accuracy_of(model: VLM, split: RegionSplit, rows: torch.Tensor, trim: Trim) -> float:
    """Mean score of some questions, 0..1."""
    predicted = np.zeros(len(split.answers), np.int64)
    predicted[rows.numpy()] = predict(model, split, trim, rows=rows)
    return float(question_scores(predicted, split)[rows.numpy()].mean())
