"""What pruning kept, as a picture: each layer at the end, and the kinds of structure over time; runs side by side."""

from collections.abc import Mapping
from pathlib import Path

from edgevlm.artifacts import Structure

KINDS = {
    "trunk": "trunk channels",
    "fpn": "BiFPN channels",
    "box": "box head units",
    "heads": "attention heads",
    "neurons": "FFN neurons",
    "heads.vision": "vision encoder: heads",
    "neurons.vision": "vision encoder: FFN neurons",
    "heads.text": "text encoder: heads",
    "neurons.text": "text encoder: FFN neurons",
    "heads.cross": "cross encoder: heads",
    "heads.cross_image": "cross encoder: heads to the image",
    "neurons.cross": "cross encoder: FFN neurons",
}
"""Beginning of a group's name -> what its members are, from the pixels to the answer."""


def kind_of(group: str) -> str:
    """What the members of a group are."""
    first = group.partition(".")[0]
    return KINDS.get(".".join(group.split(".")[:2])) or KINDS.get(first, first)


def shares_by_kind(structure: Structure) -> dict[str, dict[int, float]]:
    """Kind -> steps done -> share of its members that were open, 0..1; empty where nothing was trained."""
    sizes: dict[str, int] = {}
    for name, group in structure.groups.items():
        sizes[kind_of(name)] = sizes.get(kind_of(name), 0) + group.size
    found: dict[str, dict[int, float]] = {kind: {} for kind in sizes}
    for step, shares in structure.history.items():
        for name, share in shares.items():
            kind = kind_of(name)
            members = share * structure.groups[name].size
            found[kind][step] = found[kind].get(step, 0.0) + members / sizes[kind]
    return found


def kept_by_part(structure: Structure) -> dict[str, float]:
    """Part of the model -> share of its members that stayed, 0..1."""
    parts = dict.fromkeys(group.part for group in structure.groups.values())
    return {
        part: sum(g.kept for g in structure.groups.values() if g.part == part)
        / sum(g.size for g in structure.groups.values() if g.part == part)
        for part in parts
    }


def draw_structures(structures: Mapping[str, Structure], path: Path) -> None:
    """Draw runs side by side: above, the kinds over time; below, what is left of every group.

    Args:
        structures: title -> what its run kept.
        path: .png or .svg.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    most = max(len(structure.groups) for structure in structures.values())
    size = (5.2 * len(structures), 3.0 + 0.22 * most)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(2, len(structures), height_ratios=(2.4, 0.22 * most), squeeze=False)
    colours = dict(zip(KINDS.values(), colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2], strict=False))  # pyright: ignore
    for (above, below), (title, structure) in zip(axes.T, structures.items(), strict=True):
        for kind, shares in shares_by_kind(structure).items():
            if shares:
                above.plot(
                    list(shares), [100 * share for share in shares.values()], label=kind, color=colours.get(kind)
                )
        parts = ", ".join(f"{part} {100 * share:.0f} %" for part, share in kept_by_part(structure).items())
        above.set_title(
            f"{title}: {100 * structure.kept:.0f} % of the {structure.measure} kept\n({parts} of the members)",
            fontsize=9,
        )
        above.set(xlabel="step", ylabel="open, %", ylim=(0, 102))
        above.grid(alpha=0.3)
        if structure.history:
            above.legend(fontsize=7, loc="lower left")
        names = list(structure.groups)
        shares = [100 * structure.groups[name].kept / structure.groups[name].size for name in names]
        bars = below.barh(names, shares, color=[colours.get(kind_of(name), "gray") for name in names])
        counts = [f"{structure.groups[name].kept} of {structure.groups[name].size}" for name in names]
        below.bar_label(bars, counts, fontsize=6.5, padding=2)
        below.tick_params(axis="y", labelsize=7)
        below.set(xlabel="kept, %", xlim=(0, 118))
        below.invert_yaxis()  # the pixels above, the answer below
    figure.savefig(path, dpi=130)
