"""Networks by name. `test-*` are the smallest that have every part; they make the test suite fast."""

from typing import Any

from pydantic import BaseModel, ValidationError

from edgevlm.artifacts import FusionConfig, TEEConfig
from edgevlm.errors import RecipeError, nearest
from edgevlm.recipe import Choice

_TEE_D0 = TEEConfig(
    trunk="efficientnet_b0",
    num_levels=5,
    fpn_channels=64,
    fpn_repeats=3,
    anchor_scale=4.0,
    candidates_per_level=1000,
    num_proposals=300,
    num_regions=50,
    roi_hidden=1024,
    attribute_head="own",
)

# For inputs of about 320 px: no level above P6, and a fifth of the boxes (300 would be a third of all the work).
_TEE_EDGE = _TEE_D0.model_copy(
    update={
        "num_levels": 4,
        "candidates_per_level": 128,
        "num_proposals": 64,
        "num_regions": 32,
        "roi_hidden": 512,
        "attribute_head": "linear",
    }
)

TEES: dict[str, TEEConfig] = {
    "test-tee": TEEConfig(
        trunk="test_edgevlm",
        fpn_channels=16,
        fpn_repeats=1,
        num_candidates=32,
        num_proposals=12,
        num_regions=8,
        roi_hidden=32,
    ),
    # P2 and anchors of 16, 32, 64 px: objects of 16 px have two cells at stride 8, too few to tell a star from a cross.
    "edge-nano": TEEConfig(trunk="edgevlm_nano", first_level=2, anchor_scale=4.0, fpn_channels=32, fpn_repeats=1),
    # MiniVLM's extractor: anchors of 32 to 512 px, 1000 candidates per level, 300 boxes into a head of width 1024.
    "tee-d0": _TEE_D0,
    "tee-d0-p2": _TEE_D0.model_copy(update={"first_level": 2, "anchor_scale": 8.0}),
    "tee-d1": _TEE_D0.model_copy(
        update={
            "trunk": "efficientnet_b1",
            "first_level": 2,
            "anchor_scale": 8.0,
            "fpn_channels": 88,
            "fpn_repeats": 4,
        }
    ),
    # The same without squeeze-excite and with ReLU6 throughout, which int8 and NPUs take as they are.
    "tee-lite0": _TEE_D0.model_copy(update={"trunk": "efficientnet_lite0"}),
    "tee-lite0-edge": _TEE_EDGE.model_copy(update={"trunk": "efficientnet_lite0"}),
    # The same form on a trunk that int8 likes.
    "tee-fused-edge": _TEE_EDGE.model_copy(update={"trunk": "edgevlm_fused"}),
}
"""Extractor name -> config."""


def _efficientvlm(vision: int, text: int, cross: int) -> FusionConfig:
    layers = {"vision": vision, "text": text, "cross": cross}
    return FusionConfig.two_encoders(hidden=768, **layers, heads=12, ffn=3072, dropout=0.1)


FUSIONS: dict[str, FusionConfig] = {
    "none": FusionConfig.uniform(hidden=8, layers=1, heads=1, ffn=8),  # beside an extractor that is not fused yet
    "test-fusion": FusionConfig.uniform(hidden=32, layers=2, heads=2, ffn=64),
    "edge-l3-h128": FusionConfig.uniform(hidden=128, layers=3, heads=4, ffn=384),
    "edge-l3-h96": FusionConfig.uniform(hidden=96, layers=3, heads=4, ffn=384),
    "edge-l4-h96": FusionConfig.uniform(hidden=96, layers=4, heads=4, ffn=256),
    # The shapes of published text models, so that their weights fit (MiniVLM, section 3); dropout as in BERT.
    "minilm-l12-h384": FusionConfig.uniform(hidden=384, layers=12, heads=12, ffn=1536, dropout=0.1),
    "minilm-l6-h384": FusionConfig.uniform(hidden=384, layers=6, heads=12, ffn=1536, dropout=0.1),
    "bert-base": FusionConfig.uniform(hidden=768, layers=12, heads=12, ffn=3072, dropout=0.1),
    # Two encoders. EfficientVLM's student and teacher (its code), whose vision layers here read regions instead of patches.
    "test-dual": FusionConfig.two_encoders(hidden=32, vision=2, text=1, cross=2, heads=2, ffn=64),
    "edge-dual-2v2t2x-h96": FusionConfig.two_encoders(hidden=96, vision=2, text=2, cross=2, heads=4, ffn=256),
    "edge-dual-4v4t4x-h96": FusionConfig.two_encoders(hidden=96, vision=4, text=4, cross=4, heads=4, ffn=256),
    "efficientvlm": _efficientvlm(6, 3, 3),
    "efficientvlm-teacher": _efficientvlm(12, 6, 6),
}
"""Fusion name -> config."""


def resolve_tee(choice: Choice) -> TEEConfig:
    """The extractor a recipe names, with its overrides."""
    return _resolve(choice, TEES, TEEConfig, "tee")


def resolve_fusion(choice: Choice) -> FusionConfig:
    """The fusion transformer a recipe names, with its overrides."""
    return _resolve(choice, FUSIONS, FusionConfig, "fusion")


def _resolve(choice: Choice, table: dict[str, Any], kind: type[BaseModel], what: str) -> Any:
    if choice.name not in table:
        raise RecipeError(f"Unknown {what} '{choice.name}'", f"{nearest(choice.name, table)} Known: {', '.join(table)}")
    try:
        return kind.model_validate({**table[choice.name].model_dump(), **choice.overrides})
    except ValidationError as problem:
        key = ".".join(map(str, problem.errors()[0]["loc"]))
        if not key:
            reason = problem.errors()[0]["msg"].removeprefix("Value error, ")
            raise RecipeError(f"{what} '{choice.name}': {reason}", "Look at its overrides") from problem
        hint = nearest(key, kind.model_fields)
        raise RecipeError(
            f"{what} '{choice.name}' has no or another '{key}'", hint or problem.errors()[0]["msg"]
        ) from problem
