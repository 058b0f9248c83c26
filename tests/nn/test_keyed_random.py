import pytest
import torch

from edm2.nn import keyed_bits, keyed_dropout, keyed_normal, keyed_uniform
from edm2.nn.keyed_random import philox


def words(*values):
    return [torch.tensor(v) for v in values]


# Known answers published with the Random123 library for philox4x32, 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    assert tuple(int(w) for w in philox(words(*counter), words(*key))) == answer


def test_numbers_belong_to_the_index_whatever_the_batch():
    index = torch.tensor([5, 17, 2**40 + 3, 0])
    whole = keyed_normal(index, (3, 7, 5), seed=11, stream=2)
    for i in range(4):
        assert torch.equal(whole[i], keyed_normal(index[i : i + 1], (3, 7, 5), seed=11, stream=2)[0])
    assert not torch.equal(whole, keyed_normal(index, (3, 7, 5), seed=12, stream=2))
    assert not torch.equal(whole, keyed_normal(index, (3, 7, 5), seed=11, stream=3))
    assert not torch.equal(whole[0], whole[1])


def test_normal_moments_and_independence():
    x = keyed_normal(torch.arange(2000), (101,), seed=3).double()
    n = x.numel()
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.square().mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs(x.pow(4).mean() - 3) < 5 * (96 / n) ** 0.5
    half = x.shape[1] // 2
    for lag in (1, half, half + 1):  # pairs of one Box-Muller draw stand half a row apart
        assert abs((x[:, lag:] * x[:, :-lag]).mean()) < 5 / n**0.5 * 1.5
    assert abs((x[1:] * x[:-1]).mean()) < 5 / n**0.5


def test_uniform_is_open_and_even():
    u = keyed_uniform(torch.arange(1000), (100,), seed=1)
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 10, 0, 1)
    assert ((counts - 1e4).abs() < 500).all()
    bits = keyed_bits(torch.arange(10), 5)
    assert bits.shape == (10, 5)
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 2**32


def test_dropout_share_scale_and_key():
    x = torch.ones(50, 8, 16, 16)
    y = keyed_dropout(x, 0.3, torch.arange(50), seed=1, stream=4)
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=5e-3)
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.7))
    assert torch.equal(y[20:30], keyed_dropout(x[20:30], 0.3, torch.arange(20, 30), seed=1, stream=4))
    for other in (dict(seed=2, stream=4), dict(seed=1, stream=5)):
        z = keyed_dropout(x, 0.3, torch.arange(50), **other)
        assert float(((y == 0) & (z == 0)).float().mean()) == pytest.approx(0.09, abs=5e-3)
    pairs = (y[:-1] == 0) & (y[1:] == 0)
    assert float(pairs.float().mean()) == pytest.approx(0.09, abs=5e-3)
