"""The closed-form case: its frames, members and law agree with each other."""

import math

import pytest
import torch

from edm2.forecast import Torus
from edm2.metrics.ensemble import score_ensemble

TORUS = Torus()


def test_frames_are_stationary() -> None:
    frames = TORUS.frames(torch.arange(1500), 5, seed=0)
    assert frames.shape == (1500, 5, 16, 16)
    assert frames.mean().item() == pytest.approx(0, abs=0.02)
    assert frames.var(dim=(0, 2, 3)).tolist() == pytest.approx([1.0] * 5, abs=0.04)
    # Neighbours in time, too: what members add to the first pair is the same process.
    lagged = [(frames[:, t] * frames[:, t + 1]).mean().item() for t in range(4)]
    assert lagged == pytest.approx([lagged[0]] * 4, abs=0.03)


def test_members_follow_the_law() -> None:
    start = TORUS.frames(torch.arange(1), 2, seed=0)
    mean, std = TORUS.law(start, 4)
    members = TORUS.members(start.expand(1500, -1, -1, -1), torch.arange(1500), 4, seed=1)
    error = members.mean(0) - mean[0]
    assert error.abs().max().item() < 5 * std.max().item() / math.sqrt(1500)
    assert (members - mean).square().mean((0, 2, 3)).sqrt().tolist() == pytest.approx(std.tolist(), rel=0.02)
    assert std.tolist() == sorted(std.tolist())
    assert TORUS.law(start, 200)[1][-1].item() == pytest.approx(1, abs=1e-3)  # nothing is known of then


def test_a_field_without_forcing_drifts_by_the_drift() -> None:
    torus = Torus(drift=(2.0, -3.0), damping=0.1, diffusion=0.0, memory=0.0, length=1.5)
    start = torus.frames(torch.arange(3), 2, seed=0)
    mean, _ = torus.law(start, 1)
    want = math.exp(-0.1) * start[:, 1].roll((2, -3), dims=(1, 2))
    # Apart from the highest wave, which is in no frame.
    torch.testing.assert_close(mean[:, 0], want, atol=2e-5, rtol=0)


def test_the_law_scores_as_it_should() -> None:
    frames = TORUS.frames(torch.arange(150), 5, seed=3)
    start = frames[:, :2]
    _, std = TORUS.law(start, 3)
    index = torch.arange(150 * 12)
    members = TORUS.members(start.repeat_interleave(12, 0), index, 3, seed=9).reshape(150, 12, 3, 1, 16, 16)
    found = score_ensemble(members.numpy(), frames[:, 2:, None].numpy(), start=frames[:, 1, None].numpy())
    assert found.crps_fair.value[:, 0] == pytest.approx(std.numpy() / math.sqrt(math.pi), rel=0.05)
    assert found.crps_fair.value[:, 0] == pytest.approx(TORUS.law_score(start, frames[:, 2:]), rel=0.02)
    assert found.spread_skill.value == pytest.approx(1, abs=0.06)
    assert (found.ranks_p > 0.001).all()
    assert (found.baselines["persistence"].skill.value > 0.3).all()


def test_films_and_members_are_functions_of_seed_and_index() -> None:
    many = TORUS.frames(torch.arange(6), 3, seed=0)
    assert torch.equal(TORUS.frames(torch.tensor([4]), 3, seed=0)[0], many[4])
    assert not torch.equal(TORUS.frames(torch.tensor([4]), 3, seed=1)[0], many[4])
    more = TORUS.members(many[:2, :2], torch.tensor([7, 8]), 2, seed=0)
    assert torch.equal(TORUS.members(many[1:2, :2], torch.tensor([8]), 1, seed=0)[0], more[1, :1])
