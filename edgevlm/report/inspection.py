"""`edgevlm inspect`: parameters and multiply-adds of a network by part, as a table or as JSON."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from edgevlm.artifacts import TEEConfig, TokenizerSpec
from edgevlm.errors import RecipeError, nearest
from edgevlm.models import vlm
from edgevlm.models.fusion import Fusion
from edgevlm.models.inspect import Part, build_tee, inspect_fusion, inspect_tee, total
from edgevlm.models.registry import FUSIONS, TEES

PAPER_CLASSES, PAPER_ATTRIBUTES, PAPER_EMBEDDED = 1591, 524, 326
"""What MiniVLM's detector tells apart; the class embedding of its attribute head has 326 rows."""
PAPER_VOCABULARY, PAPER_POSITIONS, PAPER_WORDS, PAPER_REGIONS = 30522, 512, 35, 50
"""Its fusion in pre-training: 20 words of the caption, 15 tags, 50 regions."""


def parts_of(
    name: str, size: str = "512", num_classes: int | None = None, num_attributes: int | None = None
) -> list[Part]:
    """The parts of a registered network, or of a checkpoint's.

    Args:
        name: an extractor or a fusion of `edgevlm.models.registry`, or a checkpoint folder.
        size: of an extractor's input, pixels: `512`, or rows x columns as `384x512`. A checkpoint has its own.
        num_classes, num_attributes: of an extractor; default: MiniVLM's 1591 and 524. A checkpoint has its own.

    Raises:
        RecipeError: no such name, or a size that is none.
        CheckpointError: the folder is no checkpoint.
    """
    if Path(name).is_dir():
        model, manifest = vlm.load(Path(name))
        fusion = inspect_fusion(model.fusion, manifest.tokenizer.max_tokens, manifest.model.tee.num_regions)
        return [*inspect_tee(model.tee, pruned=bool(manifest.model.widths)), fusion]
    if name in TEES:
        height, width = parse_size(size)
        config = _as_published(TEES[name], num_classes)
        classes = PAPER_CLASSES if num_classes is None else num_classes
        attributes = PAPER_ATTRIBUTES if num_attributes is None else num_attributes
        return inspect_tee(build_tee(config, height, width, classes, attributes))
    if name in FUSIONS:
        tokenizer = TokenizerSpec(vocab_sha256="", vocab_size=PAPER_VOCABULARY, max_tokens=PAPER_POSITIONS)
        fusion = Fusion(FUSIONS[name], tokenizer, TEES["tee-d0"].roi_hidden)
        return [inspect_fusion(fusion, PAPER_WORDS, PAPER_REGIONS)]
    known = [*TEES, *FUSIONS]
    raise RecipeError(f"'{name}' is no network and no folder", f"{nearest(name, known)} Known: {', '.join(known)}")


def parse_size(text: str) -> tuple[int, int]:
    """`512` or `384x512` -> rows, columns.

    Raises:
        RecipeError: neither form, or not positive.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise RecipeError(f"'{text}' is no size", "Write 512, or rows x columns: 384x512")
    return int(sides[0]), int(sides[-1])


def as_dict(name: str, parts: list[Part]) -> dict[str, Any]:
    """For `--json`."""
    rows = [
        {
            "part": part.name,
            "parameters": part.counted.parameters,
            "macs": part.counted.macs,
            "formula_parameters": part.formula.parameters if part.formula else None,
            "formula_macs": part.formula.macs if part.formula else None,
        }
        for part in parts
    ]
    everything = total(parts)
    return {"name": name, "parts": rows, "parameters": everything.parameters, "macs": everything.macs}


def print_parts(name: str, parts: list[Part], console: Console) -> None:
    """The table, with the sum of what published figures count, and of everything."""
    table = Table(box=box.SIMPLE_HEAD, title=name, title_justify="left")
    for heading in ("part", "parameters", "formula", "MMACs", "formula"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in parts:
        formula = (f"{part.formula.parameters:,}", _millions(part.formula.macs)) if part.formula else ("-", "-")
        row = (part.name, f"{part.counted.parameters:,}", formula[0], _millions(part.counted.macs), formula[1])
        table.add_row(*row)
    table.add_section()
    published = [part for part in parts if part.counted.parameters]
    for title, some in (("as published figures count", published), ("with the matrices", parts)):
        cost = total(some)
        table.add_row(title, f"{cost.parameters:,}", "", _millions(cost.macs), "")
    console.print(table)
    console.print("[dim]One multiply-add is one MAC (half a FLOP); biases, norms and activations are not counted.[/]")


def _as_published(config: TEEConfig, num_classes: int | None) -> TEEConfig:
    if num_classes is None and config.attribute_head == "own" and config.attribute_classes is None:
        return config.model_copy(update={"attribute_classes": PAPER_EMBEDDED})
    return config


def _millions(macs: int) -> str:
    return f"{macs / 1e6:,.1f}"
