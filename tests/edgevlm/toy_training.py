"""A small training for tests of several processes: `python -m tests.edgevlm.toy_training FOLDER '{"options": ...}'`.

It fits a tiny fusion on random cached regions and leaves, written by the main process, `weights.safetensors` and
`losses.json` (loss by step). LayerNorm only: batch norms see their own process's rows.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgevlm import processes
from edgevlm.artifacts import FusionConfig
from edgevlm.models.attention import Layer
from edgevlm.progress import Reporter
from edgevlm.recipe import TrainSection
from edgevlm.train import loop

NUM_ROWS = 96
SECTION = {"steps": 24, "batch_size": 16, "lr": 3e-3, "save_every": 5, "warmup": 0.1}


class Toy(nn.Module):
    """One layer of the fusion between two linear ones, with dropout where asked."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(6, 32)
        config = FusionConfig.uniform(hidden=32, layers=1, heads=4, ffn=64, dropout=dropout)
        self.layer = Layer(config, heads=4, ffn=64)
        self.head = nn.Linear(32, 3)
        self.unused = nn.Linear(4, 4)  # a head that the task leaves alone

    def forward(self, x_BTF: Tensor, y_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mixed, *_ = self.layer(self.embed(x_BTF), x_BTF.new_zeros(1))
        logits = self.head(mixed.mean(1))
        loss = nn.functional.cross_entropy(logits, y_B)
        return loss, {"accuracy": (logits.argmax(1) == y_B).float().mean()}


def data() -> tuple[Tensor, Tensor]:
    """Rows whose class is the sign pattern of two sums."""
    x = torch.randn(NUM_ROWS, 5, 6, generator=torch.Generator().manual_seed(0))
    return x, (x[..., 0].sum(1) > 0).long() + (x[..., 1].sum(1) > 0).long()


def run(folder: Path, *, dropout: float = 0.0, kill_at: int | None = None, kill_rank: int = 1, **section: Any) -> Toy:
    """Train in `folder`; the process `kill_rank` kills itself before step `kill_at`, unless the launcher restarted it."""
    x, y = data()
    losses: dict[int, float] = {}

    class Recorder(loop.Logs):
        def read(self, accelerator: Any) -> list[tuple[int, dict[str, float]]]:
            steps = super().read(accelerator)
            losses.update({step: values["loss"] for step, values in steps})
            return steps

    def before_step(step: int) -> None:
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if step == kill_at and processes.rank() == kill_rank and first_life:
            os.kill(os.getpid(), signal.SIGKILL)

    model = Toy(dropout)
    original, loop.Logs = loop.Logs, Recorder
    try:
        loop.fit(
            model,
            NUM_ROWS,
            lambda rows: {"x_BTF": x[rows], "y_B": y[rows]},
            TrainSection.model_validate(SECTION | section),
            what="toy",
            work_dir=folder,
            key="toy",
            seed=5,
            reporter=Reporter(),
            before_step=before_step,
        )
    finally:
        loop.Logs = original
    if processes.is_main():
        save_file(model.state_dict(), folder / "weights.safetensors")
        (folder / "losses.json").write_text(json.dumps(losses))
    same = processes.gathered({name: value.sum().item() for name, value in model.state_dict().items()})
    assert all(sums == same[0] for sums in same), "the processes ended with different weights"
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    run(target, **json.loads(sys.argv[2]))
