"""The loop learns, resumes bitwise, and stops at NaN with the last good state kept."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgevlm.errors import TrainingError
from edgevlm.progress import Reporter
from edgevlm.recipe import TrainSection
from edgevlm.train.loop import Batches, fit, schedule


class Noisy(nn.Module):
    """Regression with dropout, so that a resume must restore the random state as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.net(x) - y).square().mean()
        return loss, {"error": loss.detach()}


X = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Killed(Exception):
    pass


def train(folder: Path, steps: int = 60, kill_at: int | None = None, lr: float = 3e-3) -> Noisy:
    model = Noisy()

    def before_step(step: int) -> None:
        if step == kill_at:
            raise Killed

    fit(
        model,
        len(X),
        lambda rows: {"x": X[rows], "y": Y[rows]},
        TrainSection(steps=steps, batch_size=16, lr=lr, save_every=10),
        what="noisy",
        work_dir=folder,
        key="k",
        seed=1,
        reporter=Reporter(),
        before_step=before_step,
    )
    return model


def test_it_learns(tmp_path: Path) -> None:
    model = train(tmp_path, steps=300, lr=1e-2)
    assert (model.eval().net(X) - Y).square().mean() < 0.2 * Y.square().mean()


@pytest.mark.parametrize("kill_at", [5, 10, 37, 59])
def test_killed_and_resumed_equals_uninterrupted_bitwise(tmp_path: Path, kill_at: int) -> None:
    whole = train(tmp_path / "whole").state_dict()
    with pytest.raises(Killed):
        train(tmp_path / "cut", kill_at=kill_at)
    resumed = train(tmp_path / "cut").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_snapshot_of_another_key_is_ignored(tmp_path: Path) -> None:
    from edgevlm.train.snapshot import load_snapshot, save_snapshot

    model, other = Noisy(), Noisy()
    optimiser = torch.optim.AdamW(model.parameters())
    save_snapshot(tmp_path / "s", model, optimiser, 7, "mine")
    assert load_snapshot(tmp_path / "s", other, torch.optim.AdamW(other.parameters()), "yours") == 0
    assert load_snapshot(tmp_path / "s", other, torch.optim.AdamW(other.parameters()), "mine") == 7


def test_half_written_snapshot_is_ignored(tmp_path: Path) -> None:
    from edgevlm.train.snapshot import load_snapshot

    (tmp_path / "s").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{broken")
    model = Noisy()
    assert load_snapshot(tmp_path / "s", model, torch.optim.AdamW(model.parameters()), "k") == 0


def test_nan_stops_and_says_which_step(tmp_path: Path) -> None:
    def poisoned(rows: Tensor) -> dict[str, Tensor]:
        poisoned.calls += 1  # pyright: ignore
        return {"x": X[rows] * (float("nan") if poisoned.calls == 15 else 1.0), "y": Y[rows]}  # pyright: ignore

    poisoned.calls = 0  # pyright: ignore
    section = TrainSection(steps=30, batch_size=16, save_every=10)
    with pytest.raises(TrainingError, match="nan at step 14"):
        fit(Noisy(), len(X), poisoned, section, what="n", work_dir=tmp_path, key="k", seed=1, reporter=Reporter())
    assert list(tmp_path.glob(".snapshot-*.safetensors")), "the state of step 10 is kept"


def test_batches_cover_an_epoch_and_split_among_processes() -> None:
    one = Batches(50, 10, seed=4)
    epoch = torch.cat([one.at(step) for step in range(5)])
    assert sorted(epoch.tolist()) == list(range(50))
    assert not torch.equal(epoch, torch.cat([one.at(step) for step in range(5, 10)])), "each epoch is shuffled anew"
    ranks = [Batches(50, 10, seed=4, rank=rank, world=2) for rank in range(2)]
    assert sorted(torch.cat([ranks[0].at(3), ranks[1].at(3)]).tolist()) == sorted(one.at(3).tolist())


def test_schedule_rises_then_falls() -> None:
    values = [schedule(step, 100, 0.1) for step in range(100)]
    assert values.index(max(values)) == 9 and max(values) == pytest.approx(1.0)
    assert values[:10] == sorted(values[:10]) and values[9:] == sorted(values[9:], reverse=True)
    assert values[-1] > 0
