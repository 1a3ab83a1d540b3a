"""Stage `prune`: choose what stays of the model, remove the rest physically, and fine-tune under the teacher.

After EfficientVLM's stage 2, without the defects of its public code: one global, monotone target ramp; the structure is
frozen once it is chosen; weights removed, not masked. With `parts: [vision, fusion]` extractor and fusion share one
budget, and every step encodes images; with the fusion alone it trains on the cached regions.
"""

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from edgevlm import processes
from edgevlm.artifacts import STRUCTURE, Checkpoint, FusionConfig, GroupKept, LatencyTable, Structure
from edgevlm.compress.cost import Cost, cost_model
from edgevlm.compress.distil import DistilObjective, load_teacher, published
from edgevlm.compress.joint import JointObjective, fit_images
from edgevlm.compress.latency import latency_model
from edgevlm.compress.shrink import Kept, check_reachable, shrink, steps_of
from edgevlm.compress.structure import METHODS, TRAINED, Pruning
from edgevlm.errors import RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.groups import Group, groups_of
from edgevlm.models.stacks import stacks_of
from edgevlm.models.vlm import VLM
from edgevlm.train.answering import evaluate, fit_answers, report, save_answering
from edgevlm.train.images import image_questions
from edgevlm.train.loop import SNAPSHOTS
from edgevlm.train.regions import evaluation_splits

UNITS = {"parameters": " prunable parameters", "macs": " prunable multiply-adds", "ms": ""}
CHOSEN = SNAPSHOTS.replace("*", "chosen.json")
"""What stays, once it was measured: a resumed run must not measure, and so perhaps choose, again."""
CLOSE_ENOUGH, MAX_TRIES = 0.02, 5
"""Of a budget in milliseconds: where the search for the structure that takes it ends."""
SUSPECT, MAX_REPEATS = 1.1, 3
"""A time so much above the table's is measured again, so often in all."""

Meter = Callable[[VLM], float]
"""A model -> what it takes on the recipe's target, milliseconds."""


def prune(job: Job, meter: Meter | None = None) -> Checkpoint:
    """Choose the structure, remove everything else, and fine-tune what is left under the teacher.

    Args:
        job: with the artifact `latency` among its inputs where the budget is a time.
        meter: measures a candidate, where the budget is a time.

    Raises:
        RecipeError: a budget out of reach; the least is named.
    """
    recipe, section = job.recipe, published(job.recipe.prune, job.recipe)
    student, manifest = vlm.load(job.inputs["distil"])
    teacher = load_teacher(job, manifest)
    seed = recipe.seed + 3 + 1000 * section.seed
    torch.manual_seed(seed)
    joint = "vision" in section.parts
    images = functools.cache(lambda: image_questions(job, section, manifest))  # read once, for choosing and recovering

    def objective() -> nn.Module:
        inner = DistilObjective(student.train(), teacher, section, recipe.referred_weight)
        return JointObjective(inner, teacher, section.extractor_weight) if joint else inner

    def fit(
        trained: nn.Module, groups: Any = None, what: str = "prune", steps: int = section.steps, **hooks: Any
    ) -> None:
        settings: dict[str, Any] = {"what": what, "seed": seed, "groups": groups, **hooks}
        its_section = section.model_copy(update={"steps": steps})
        if section.method in TRAINED and section.one_schedule:
            one = {"schedule": "constant"} if what == "prune" else {"warmup": 0.0}
            its_section = its_section.model_copy(update=one)
        if joint:
            fit_images(trained, student, job, its_section, images(), **settings)
        else:
            fit_answers(trained, student, job, its_section, **settings)

    groups = tuple(groups_of(student, section.parts))
    cost = cost_of(job, student, groups, manifest)
    sparsity = section.sparsity if section.target_ms is None else 1 - section.target_ms / cost.whole
    if sparsity <= 0:
        raise RecipeError(
            f"prune: the student takes {cost.show(cost.whole)}, no more than the {section.target_ms:g} ms it may take",
            "Ask for less, or leave prune out",
        )
    check_reachable(groups, cost, cost.whole * (1 - sparsity), section.round_to)  # before hours of training
    pruning = Pruning(section, student, objective(), groups, cost, fit, sparsity)
    choice = METHODS[section.method](pruning)
    kept = _recall(job) or (
        choice.at(pruning.budget) if meter is None else measured_choice(pruning, choice.at, meter, job)
    )
    achieved = 1 - cost.of({name: len(members) for name, members in kept.items()}) / cost.whole
    structure = Structure(
        measure=section.measure,
        asked=1 - sparsity,
        cost=cost.whole,
        kept=1 - achieved,
        groups={g.name: GroupKept(part=g.part, size=g.size, kept=len(kept[g.name])) for g in groups},
        history=choice.history,
    )
    if processes.is_main():
        (job.out_dir / STRUCTURE).write_text(structure.model_dump_json(indent=1) + "\n")
    shrink(student, groups, kept)
    job.reporter.say(
        f"  prune: {achieved:.1%} of {cost.show(cost.whole)}{UNITS[section.measure]} removed "
        f"(asked {sparsity:.0%}); {_left(student.config.fusion)}"
    )
    steps = section.recover_steps + (0 if section.method in TRAINED else section.steps)
    if steps:
        fit(objective(), what="recover", steps=steps)
    regions = evaluation_splits(job, student, manifest) if joint else contextlib.nullcontext(job.inputs["regions"])
    with regions as cache:
        metrics = evaluate(student, job, cache=cache) | {"sparsity": achieved}
    if meter is not None:
        asked_ms = cost.whole * (1 - sparsity)
        metrics["pruned_ms"] = processes.from_main(
            _steady(meter, student.eval(), asked_ms) if processes.is_main() else 0.0
        )
        job.reporter.say(f"  pruned: {metrics['pruned_ms']:.3f} ms on {section.target} {section.precision}")
    report(job, "pruned", metrics)
    return save_answering(job, student, manifest, metrics)


def cost_of(job: Job, student: VLM, groups: Sequence[Group], manifest: Checkpoint) -> Cost:
    """What the recipe measures: of all that can be removed, or of the whole where it is a time."""
    section = job.recipe.prune
    if section.measure == "ms":
        table = read_manifest(job.inputs["latency"], LatencyTable)
        return latency_model(table, {group.name: group.size for group in groups})
    everything = cost_model(student, groups, section.measure, manifest.tokenizer.max_tokens)
    return everything.only(group.name for group in groups)


def measured_choice(pruning: Pruning, at: Callable[[float], Kept], meter: Meter, job: Job) -> Kept:
    """The structure that takes the budget's time when it is measured, whatever the table says it should take.

    The table's pieces have the right slopes, and their sum may be off by what runs between them: the budget given to the
    table moves by the difference between what was asked and what was measured.
    """
    best: tuple[float, Kept] | None = None
    if processes.is_main():
        budget = asked = pruning.budget
        least = pruning.cost.of(steps_of(pruning.groups, pruning.section.round_to))
        for _ in range(MAX_TRIES):
            kept = at(budget)
            smaller = copy.deepcopy(pruning.student).eval()
            shrink(smaller, pruning.groups, kept)
            said = pruning.cost.of({name: len(members) for name, members in kept.items()})
            measured = _steady(meter, smaller, said)
            job.reporter.say(f"  prune: measured {measured:.3f} ms, by the table {said:.3f}, asked {asked:.3f}")
            miss = abs(measured - asked)
            if best is None or miss < best[0]:
                best = (miss, kept)
            if miss <= CLOSE_ENOUGH * asked:
                break
            budget = min(pruning.cost.whole, max(least, budget + asked - measured))
        assert best is not None
        _remember(job, best[1])
    processes.barrier()
    found = _recall(job)
    assert found is not None
    return found


def _steady(meter: Meter, model: VLM, expected_ms: float) -> float:
    """What a model takes; measured again where it is more than expected, for the machine's other work only adds time."""
    times = [meter(model)]
    while times[-1] > SUSPECT * expected_ms and len(times) < MAX_REPEATS:
        times.append(meter(model))
    return min(times)


def _remember(job: Job, kept: Kept) -> None:
    temporary = job.out_dir / f"{CHOSEN}.tmp"
    temporary.write_text(json.dumps({"key": job.provenance.key, "kept": kept}))
    temporary.replace(job.out_dir / CHOSEN)


def _recall(job: Job) -> Kept | None:
    try:
        found = json.loads((job.out_dir / CHOSEN).read_bytes())
    except OSError:
        return None
    if found["key"] != job.provenance.key:
        return None
    return {name: tuple(members) for name, members in found["kept"].items()}


def _left(config: FusionConfig) -> str:
    """Heads and neurons of every layer."""
    texts = []
    for stack in stacks_of(config):
        name = "" if stack.name == "fusion" else f"{stack.name}: "
        texts.append(f"{name}heads {getattr(config, stack.heads)}, neurons {getattr(config, stack.ffn)}")
        if stack.cross_heads is not None:
            texts[-1] += f", heads to the image {getattr(config, stack.cross_heads)}"
    return "; ".join(texts)
