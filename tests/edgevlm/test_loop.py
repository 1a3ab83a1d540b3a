"""The loop learns, resumes bitwise, and stops at NaN with the last good state kept."""

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from edgevlm.errors import TrainingError
from edgevlm.progress import Reporter
from edgevlm.recipe import TrainSection
from edgevlm.train.loop import Batches, fit, generator_of, parameter_groups, schedule
from edgevlm.train.optimiser import MovingAverage


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


def train(
    folder: Path, steps: int = 60, kill_at: int | None = None, lr: float = 3e-3, dropout: bool = True, **section: Any
) -> Noisy:
    model = Noisy()
    if not dropout:
        model.net[2] = nn.Identity()

    def before_step(step: int) -> None:
        if step == kill_at:
            raise Killed

    fit(
        model,
        len(X),
        lambda rows: {"x": X[rows], "y": Y[rows]},
        TrainSection(**{"steps": steps, "batch_size": 16, "lr": lr, "save_every": 10, **section}),
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


def plain_loop(steps: int, batch_size: int = 16, lr: float = 3e-3, clip: float = 5.0) -> tuple[Noisy, list[float]]:
    """What `fit` with default settings means, in twenty lines of PyTorch: the reference for its numbers."""
    model = Noisy()
    torch.manual_seed(1)
    groups = parameter_groups(model, lr, 0.01)
    optimiser = torch.optim.AdamW(groups, eps=1e-8)
    losses = []
    for step in range(steps):
        epoch, position = divmod(step, len(X) // batch_size)
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(1_000_003 + epoch))
        rows = order[position * batch_size : (position + 1) * batch_size]
        rise = max(1, round(0.05 * steps))
        for group in optimiser.param_groups:
            group["lr"] = lr * min((step + 1) / rise, (steps - step) / max(1, steps - rise))
        loss, _ = model(X[rows], Y[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
        losses.append(loss.item())
        optimiser.step()
        optimiser.zero_grad()
    return model, losses


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("loaders", [0, 1, 3])
def test_defaults_are_the_plain_loop_bitwise(tmp_path: Path, loaders: int) -> None:
    expected, losses = plain_loop(60)
    assert_equal(train(tmp_path, loaders=loaders), expected)
    means = fit_again(tmp_path / "again", loaders)
    assert means["loss"] == pytest.approx(sum(losses[54:]) / 6, abs=1e-9)


def fit_again(folder: Path, loaders: int) -> dict[str, float]:
    section = TrainSection(steps=60, batch_size=16, lr=3e-3, loaders=loaders)
    return fit(Noisy(), len(X), make, section, what="n", work_dir=folder, key="k", seed=1, reporter=Reporter())


def make(rows: Tensor) -> dict[str, Tensor]:
    return {"x": X[rows], "y": Y[rows]}


def test_pieces_are_the_whole_batch(tmp_path: Path) -> None:
    """16 rows in 3 pieces (6, 5, 5), weighted: float32 sums in another order, grown by AdamW over 40 steps."""
    whole = train(tmp_path / "a", steps=40, dropout=False)
    pieces = train(tmp_path / "b", steps=40, dropout=False, accumulate=3)
    assert largest_difference(whole, pieces) < 1e-5
    with pytest.raises(TrainingError, match="batch_size to 17"):
        train(tmp_path / "c", accumulate=17)


def test_sgd_is_pytorchs_on_one_step_by_hand(tmp_path: Path) -> None:
    """Two steps of momentum on a parabola: w1 = w0 - lr g0, w2 = w1 - lr (m g0 + g1), with lr halved by the schedule."""

    class Parabola(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([2.0]))

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return (self.w * self.w / 2).sum() + 0 * x.sum(), {}

    model = Parabola()
    settings: dict[str, Any] = {"optimiser": "sgd", "momentum": 0.5, "lr": 0.1, "warmup": 0.0, "weight_decay": 0.0}
    section = TrainSection(steps=2, batch_size=4, **settings)
    fit(
        model,
        4,
        lambda rows: {"x": rows.float()},
        section,
        what="p",
        work_dir=tmp_path,
        key="k",
        seed=1,
        reporter=Reporter(),
    )
    first = 2.0 - 0.1 * 2.0
    assert model.w.item() == pytest.approx(first - 0.1 * (0.5 * 2.0 + first), abs=1e-6)


def test_average_is_its_definition(tmp_path: Path) -> None:
    """Against a recorded run: every step's weights, averaged with the rising decay in float64."""
    seen: list[list[Tensor]] = []
    model = Noisy()

    def after_step(step: int) -> None:
        seen.append([p.detach().double().clone() for p in model.parameters()])

    average = [p.detach().double().clone() for p in model.parameters()]
    section = TrainSection(steps=40, batch_size=16, lr=3e-3, ema=0.7)
    fit(
        model,
        len(X),
        make,
        section,
        what="n",
        work_dir=tmp_path,
        key="k",
        seed=1,
        reporter=Reporter(),
        after_step=after_step,
    )
    for step, weights in enumerate(seen):
        decay = min(0.7, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    for a, p, w in zip(average, model.parameters(), seen[-1], strict=True):
        torch.testing.assert_close(p.detach().double(), a, atol=1e-5, rtol=0)  # float32 over 40 averagings
        assert (p - w).abs().max() > 1e-5, "the average is not the last step"


def test_average_takes_in_batch_norms_and_leaves_frozen_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].requires_grad_(False)
    average = MovingAverage(model, 0.9)
    model(torch.randn(8, 3) + 5)
    average.update(10_000)
    live = model[1].running_mean.clone()
    average.put_in_place()
    torch.testing.assert_close(model[1].running_mean, 0.1 * live)
    assert "0.weight" not in average.names


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9}, {"optimiser": "sgd", "accumulate": 2, "loaders": 2}])
@pytest.mark.parametrize("kill_at", [5, 10, 37, 59])
def test_killed_and_resumed_equals_uninterrupted_bitwise(
    tmp_path: Path, kill_at: int, settings: dict[str, Any]
) -> None:
    whole = train(tmp_path / "whole", **settings).state_dict()
    with pytest.raises(Killed):
        train(tmp_path / "cut", kill_at=kill_at, **settings)
    resumed = train(tmp_path / "cut", **settings).state_dict()
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


def stopped_at_nan(folder: Path, make_batch: Any, **more: Any) -> tuple[str, dict[str, Any]]:
    """What the error says, and the file that it names."""
    section = TrainSection(steps=30, batch_size=16, save_every=10)
    where: dict[str, Any] = {"what": "n", "work_dir": folder, "key": "k", "seed": 1, "reporter": Reporter()}
    with pytest.raises(TrainingError) as error:
        fit(Noisy(), len(X), make_batch, section, **where, **more)
    assert (folder / ".snapshot-n.safetensors").is_file(), "the state of step 10 is kept"
    with safe_open(folder / ".snapshot-n.safetensors", "pt") as file:
        assert file.metadata()["step"] == "10"
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
    return str(error.value), json.loads((folder / ".snapshot-n-bad-batch.json").read_text())


def nth_batch(number: int, spoil: Any) -> Any:
    """Batches of which one is spoilt; they are made one after the other."""
    calls = [0]

    def make_batch(rows: Tensor) -> dict[str, Tensor]:
        calls[0] += 1
        return spoil(make(rows)) if calls[0] == number else make(rows)

    return make_batch


def test_nan_stops_and_says_which_batch(tmp_path: Path) -> None:
    spoilt = nth_batch(15, lambda batch: {**batch, "x": batch["x"] * float("nan")})
    said, written = stopped_at_nan(tmp_path, spoilt)
    rows = Batches(len(X), 16, seed=1).at(14).tolist()
    assert f"the loss became nan at step 14, on rows {', '.join(map(str, rows[:4]))} and 12 more" in said
    assert str(tmp_path / ".snapshot-n-bad-batch.json") in said
    assert written["rows"] == rows and written["samples"] == []


def test_samples_are_named_where_their_names_are_known(tmp_path: Path) -> None:
    spoilt = nth_batch(12, lambda batch: {**batch, "x": batch["x"] / 0})
    said, written = stopped_at_nan(tmp_path, spoilt, names=lambda rows: [f"photo-{row}.jpg" for row in rows.tolist()])
    rows = Batches(len(X), 16, seed=1).at(11).tolist()
    assert f"at step 11, on samples photo-{rows[0]}.jpg, photo-{rows[1]}.jpg" in said
    assert written["samples"] == [f"photo-{row}.jpg" for row in rows]


def test_a_gradient_that_is_no_number_stops_before_it_spoils_the_snapshot(tmp_path: Path) -> None:
    """The loss of step 19, the root of an exact 0, is finite; its slope is not, and step 19 would write a snapshot."""

    class Root(Noisy):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = (
                ((self.net(x) - y) * (y != 77)).abs().sqrt().mean()
                if (y == 77).all()
                else (self.net(x) - y).square().mean()
            )
            return loss, {}

    spoilt = nth_batch(20, lambda batch: {**batch, "y": torch.full_like(batch["y"], 77)})
    section = TrainSection(steps=30, batch_size=16, save_every=10)
    with pytest.raises(TrainingError, match="the gradient became nan at step 19"):
        fit(Root(), len(X), spoilt, section, what="n", work_dir=tmp_path, key="k", seed=1, reporter=Reporter())
    with safe_open(tmp_path / ".snapshot-n.safetensors", "pt") as file:
        assert file.metadata()["step"] == "10"


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


def test_cosine_falls_as_a_cosine() -> None:
    values = [schedule(step, 100, 0.1, "cosine") for step in range(100)]
    assert values[:10] == [schedule(step, 100, 0.1) for step in range(10)]
    assert values[55] == pytest.approx(0.5) and values[9] == pytest.approx(1.0)
    assert values[9:] == sorted(values[9:], reverse=True) and 0 < values[-1] < 0.001


def test_batches_are_made_ahead_in_order_and_errors_wait_for_their_step(tmp_path: Path) -> None:
    """While a step runs, its successor is made in another thread; a bad record stops the run where it is reached."""
    made: list[tuple[int, str]] = []

    def slow(rows: Tensor) -> dict[str, Tensor]:
        if len(made) == 12:
            raise TrainingError("bad record")
        made.append((len(made), threading.current_thread().name))
        return make(rows)

    seen: list[int] = []

    def before_step(step: int) -> None:
        time.sleep(0.02)
        seen.append(len(made))

    section = TrainSection(steps=30, batch_size=16, save_every=5)
    with pytest.raises(TrainingError, match="bad record"):
        fit(
            Noisy(),
            len(X),
            slow,
            section,
            what="n",
            work_dir=tmp_path,
            key="k",
            seed=1,
            reporter=Reporter(),
            before_step=before_step,
        )
    assert len(seen) == 12, "steps 0 to 11 had their batches"
    assert all(name.startswith("edgevlm-loader") for _, name in made)
    assert all(ready >= step + 2 for step, ready in enumerate(seen[:10])), "one step ahead"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("edgevlm-loader")]


def test_stall_share_is_the_time_spent_waiting(tmp_path: Path) -> None:
    """A batch takes 20 ms and a step 30: hidden. Without a loader thread two fifths of the time is waiting."""

    def slow(rows: Tensor) -> dict[str, Tensor]:
        time.sleep(0.02)
        return make(rows)

    shares = {}
    for loaders in (0, 1):
        section = TrainSection(steps=20, batch_size=16, loaders=loaders)
        shares[loaders] = fit(
            Noisy(),
            len(X),
            slow,
            section,
            what="n",
            work_dir=tmp_path / str(loaders),
            key="k",
            seed=1,
            reporter=Reporter(),
            before_step=lambda _: time.sleep(0.03),
        )["stall_share"]
    assert shares[0] > 0.2
    assert shares[1] < 0.5 * shares[0]


def test_a_batch_that_draws_global_random_numbers_is_refused(tmp_path: Path) -> None:
    """It is made ahead of its step, so the numbers would depend on how far ahead; without loader threads they do not."""

    def noisy(rows: Tensor) -> dict[str, Tensor]:
        return {"x": X[rows] + torch.randn(len(rows), 4), "y": Y[rows]}

    for loaders in (0, 1):
        section = TrainSection(steps=4, batch_size=16, loaders=loaders)
        expected = pytest.raises(TrainingError, match="generator_of") if loaders else contextlib.nullcontext()
        with expected:
            fit(
                Noisy(),
                len(X),
                noisy,
                section,
                what=f"n{loaders}",
                work_dir=tmp_path,
                key="k",
                seed=1,
                reporter=Reporter(),
            )


def test_random_numbers_of_a_batch_depend_on_its_rows_alone() -> None:
    def draw(*rows: int) -> float:
        return torch.rand(1, generator=generator_of(torch.tensor(rows))).item()

    assert draw(3, 1, 2) == draw(3, 1, 2)
    assert len({draw(3, 1, 2), draw(1, 3, 2), draw(3, 1), draw(0, 3, 1, 2), draw(0)}) == 5


def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    """bfloat16 has 8 bits: products are off by 0.4 %, and 60 small steps stay within 5 % of the weights' size."""
    exact, rounded = (train(tmp_path / p, dropout=False, precision=p) for p in ("fp32", "bf16"))
    size = max(p.abs().max().item() for p in exact.parameters())
    assert 0 < largest_difference(exact, rounded) < 0.05 * size
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
    assert_equal(train(tmp_path / "auto", dropout=False), exact)


@pytest.mark.slow
def test_compiled_training_is_the_same(tmp_path: Path) -> None:
    """Fused kernels round elsewhere: 1e-5 after 30 steps."""
    plain, compiled = (train(tmp_path / str(c), steps=30, dropout=False, compile=c) for c in (False, True))
    assert largest_difference(plain, compiled) < 1e-5
    assert compiled._compiled_call_impl is None
