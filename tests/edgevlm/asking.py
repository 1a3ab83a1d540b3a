"""Stage `teacher_outputs` for tests of several processes: `python -m tests.edgevlm.asking FOLDER 'OVERRIDES...'`.

FOLDER holds the artifacts of the stages before it; the outputs go to FOLDER/teacher_outputs. Every process also hands
the others some rows (`from_everyone`), each another number of them, and checks what comes back.
"""

import sys
from pathlib import Path

import torch

from edgevlm import processes
from edgevlm.recipes import load_recipe
from edgevlm.tasks.distillation import from_everyone
from edgevlm.train.teacher_outputs import teacher_outputs
from tests.edgevlm.runs import SMALL, job_for


def ask(folder: Path, *overrides: str) -> None:
    recipe = load_recipe("test-scenes", [*SMALL, *overrides])
    inputs = {name: folder / name for name in ("prepare", "detector", "regions", "teacher")}
    teacher_outputs(job_for("teacher_outputs", folder, recipe, inputs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world = processes.rank(), processes.world_size()
    processes.join()
    shared = from_everyone(torch.full((rank + 2, 3), float(rank)))
    assert shared[:, 0].tolist() == [float(r) for r in range(world) for _ in range(r + 2)], shared
    ask(Path(sys.argv[1]), *sys.argv[2:])
