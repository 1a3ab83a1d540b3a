"""Draw what pruning kept in one or more runs, side by side.

python benchmarks/structures.py runs/scenes-tiny/prune runs/nlvr/prune --out structures.png
"""

import argparse
from pathlib import Path

from edgevlm.artifacts import STRUCTURE, Checkpoint, Structure
from edgevlm.manifests import read_manifest
from edgevlm.report.structure import draw_structures, kept_by_part


def main() -> None:
    """Read the command line, draw, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="folders of the stage prune")
    parser.add_argument("--out", type=Path, required=True, help="picture, .png or .svg")
    arguments = parser.parse_args()
    structures: dict[str, Structure] = {}
    for folder in arguments.checkpoints:
        name = read_manifest(folder, Checkpoint, check_files=False).provenance.recipe["name"]
        title = f"{name} ({folder})" if name in structures else str(name)
        structures[title] = Structure.model_validate_json((folder / STRUCTURE).read_bytes())
        parts = ", ".join(f"{part} {share:.1%}" for part, share in kept_by_part(structures[title]).items())
        print(f"{title}: {structures[title].kept:.1%} of the {structures[title].measure}; members: {parts}")
    draw_structures(structures, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
