"""Stage `prune`: choose what stays of the fusion, remove the rest physically, and fine-tune under the teacher.

After EfficientVLM's stage 2, without the defects of its public code: one global, monotone target ramp; the structure is
frozen once it is chosen; weights removed, not masked.
"""

import torch

from edgevlm.artifacts import Checkpoint
from edgevlm.compress.cost import cost_model
from edgevlm.compress.distil import DistilObjective, load_teacher
from edgevlm.compress.shrink import shrink
from edgevlm.compress.structure import METHODS, TRAINED, Pruning
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.groups import groups_of
from edgevlm.train.answering import evaluate, fit_answers, report, save_answering


def prune(job: Job) -> Checkpoint:
    """Choose the structure, remove everything else, and fine-tune what is left under the teacher."""
    recipe, section = job.recipe, job.recipe.prune
    student, manifest = vlm.load(job.inputs["distil"])
    teacher = load_teacher(job, manifest)
    seed = recipe.seed + 3 + 1000 * section.seed
    torch.manual_seed(seed)
    inner = DistilObjective(student.train(), teacher, section, recipe.referred_weight)
    groups = tuple(groups_of(student, ("fusion",)))
    everything = cost_model(student, groups, section.measure, manifest.tokenizer.max_tokens)
    cost = everything.only(group.name for group in groups)  # the share asked for is one of what can be removed
    kept = METHODS[section.method](Pruning(job, section, student, inner, groups, cost, seed))
    shrink(student, groups, kept)
    achieved = 1 - cost.of({name: len(members) for name, members in kept.items()}) / cost.whole
    what = {"parameters": "parameters", "macs": "multiply-adds"}[section.measure]
    job.reporter.say(
        f"  prune: {achieved:.1%} of the fusion's {cost.whole:,.0f} prunable {what} removed "
        f"(asked {section.sparsity:.0%}); "
        f"heads {student.config.fusion.layer_heads}, neurons {student.config.fusion.layer_ffn}"
    )
    steps = section.recover_steps + (0 if section.method in TRAINED else section.steps)
    if steps:
        recover = section.model_copy(update={"steps": steps})
        recovery = DistilObjective(student, teacher, section, recipe.referred_weight)
        fit_answers(recovery, student, job, recover, what="recover", seed=seed)
    metrics = evaluate(student, job) | {"sparsity": achieved}
    report(job, "pruned", metrics)
    return save_answering(job, student, manifest, metrics)
