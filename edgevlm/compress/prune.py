"""Stage `prune`: choose what stays of the model, remove the rest physically, and fine-tune under the teacher.

After EfficientVLM's stage 2, without the defects of its public code: one global, monotone target ramp; the structure is
frozen once it is chosen; weights removed, not masked. With `parts: [vision, fusion]` extractor and fusion share one
budget, and every step encodes images; with the fusion alone it trains on the cached regions.
"""

import contextlib
from typing import Any

import torch
from torch import nn

from edgevlm import processes
from edgevlm.artifacts import STRUCTURE, Checkpoint, FusionConfig, GroupKept, Structure
from edgevlm.compress.cost import cost_model
from edgevlm.compress.distil import DistilObjective, load_teacher, published
from edgevlm.compress.joint import JointObjective, fit_images
from edgevlm.compress.shrink import shrink
from edgevlm.compress.structure import METHODS, TRAINED, Pruning
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.groups import groups_of
from edgevlm.models.stacks import stacks_of
from edgevlm.train.answering import evaluate, fit_answers, report, save_answering
from edgevlm.train.regions import evaluation_splits

UNITS = {"parameters": "parameters", "macs": "multiply-adds"}


def prune(job: Job) -> Checkpoint:
    """Choose the structure, remove everything else, and fine-tune what is left under the teacher."""
    recipe, section = job.recipe, published(job.recipe.prune, job.recipe)
    student, manifest = vlm.load(job.inputs["distil"])
    teacher = load_teacher(job, manifest)
    seed = recipe.seed + 3 + 1000 * section.seed
    torch.manual_seed(seed)
    joint = "vision" in section.parts

    def objective() -> nn.Module:
        inner = DistilObjective(student.train(), teacher, section, recipe.referred_weight)
        return JointObjective(inner, teacher, section.extractor_weight) if joint else inner

    def fit(
        trained: nn.Module, groups: Any = None, what: str = "prune", steps: int = section.steps, **hooks: Any
    ) -> None:
        settings: dict[str, Any] = {"what": what, "seed": seed, "groups": groups, **hooks}
        its_section = section.model_copy(update={"steps": steps})
        if joint:
            fit_images(trained, student, job, its_section, manifest, **settings)
        else:
            fit_answers(trained, student, job, its_section, **settings)

    groups = tuple(groups_of(student, section.parts))
    everything = cost_model(student, groups, section.measure, manifest.tokenizer.max_tokens)
    cost = everything.only(group.name for group in groups)  # the share asked for is one of what can be removed
    choice = METHODS[section.method](Pruning(section, student, objective(), groups, cost, fit))
    kept = choice.kept
    achieved = 1 - cost.of({name: len(members) for name, members in kept.items()}) / cost.whole
    structure = Structure(
        measure=section.measure,
        asked=1 - section.sparsity,
        cost=cost.whole,
        kept=1 - achieved,
        groups={g.name: GroupKept(part=g.part, size=g.size, kept=len(kept[g.name])) for g in groups},
        history=choice.history,
    )
    if processes.is_main():
        (job.out_dir / STRUCTURE).write_text(structure.model_dump_json(indent=1) + "\n")
    shrink(student, groups, kept)
    job.reporter.say(
        f"  prune: {achieved:.1%} of {cost.whole:,.0f} prunable {UNITS[section.measure]} removed "
        f"(asked {section.sparsity:.0%}); {_left(student.config.fusion)}"
    )
    steps = section.recover_steps + (0 if section.method in TRAINED else section.steps)
    if steps:
        fit(objective(), what="recover", steps=steps)
    regions = evaluation_splits(job, student, manifest) if joint else contextlib.nullcontext(job.inputs["regions"])
    with regions as cache:
        metrics = evaluate(student, job, cache=cache) | {"sparsity": achieved}
    report(job, "pruned", metrics)
    return save_answering(job, student, manifest, metrics)


def _left(config: FusionConfig) -> str:
    """Heads and neurons of every layer."""
    texts = []
    for stack in stacks_of(config):
        name = "" if stack.name == "fusion" else f"{stack.name}: "
        texts.append(f"{name}heads {getattr(config, stack.heads)}, neurons {getattr(config, stack.ffn)}")
        if stack.cross_heads is not None:
            texts[-1] += f", heads to the image {getattr(config, stack.cross_heads)}"
    return "; ".join(texts)
