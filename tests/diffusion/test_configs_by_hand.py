"""Whole denoisers of all configurations against their definition written a second time, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from edm2.diffusion import build_denoiser

WIDTH, HEAD, CLASSES, SIGMA_DATA = 16, 16, 5, 0.5
NORMALISED, GROUP_NORMS, AFFINE = "DEFG", "ABCDE", "AB"


class ByHand:
    """A network as a function of its state; names and widths come from the state, the rest from the letter."""

    def __init__(self, config, state):
        self.config = config
        self.state = {name: value.double() for name, value in state.items()}
        self.preserves = config == "G"

    def __call__(self, x, sigma, labels, *, resolution, levels, blocks):
        s = sigma[:, None, None, None]
        c_noise = sigma.log() / 4
        emb = self.embedding(c_noise, labels)
        h = x / (s**2 + SIGMA_DATA**2).sqrt()
        if self.config not in AFFINE:
            h = torch.cat([h, torch.ones_like(h[:, :1])], 1)
        h = self.layer(f"unet.enc.{resolution}x{resolution}_conv", h)
        skips = [h]
        sides = [resolution >> level for level in range(levels)]
        for side in sides:
            names = [f"{side}x{side}_block{j}" for j in range(blocks)]
            for name in names if side == resolution else [f"{side}x{side}_down", *names]:
                h = self.block(f"unet.enc.{name}", h, emb)
                skips.append(h)
        for side in reversed(sides):
            begin = ["in0", "in1"] if side == sides[-1] else ["up"]
            for name in begin:
                h = self.block(f"unet.dec.{side}x{side}_{name}", h, emb)
            for j in range(blocks + 1):
                h = self.block(f"unet.dec.{side}x{side}_block{j}", self.joined(h, skips.pop()), emb)
        if self.config in GROUP_NORMS:
            h = self.silu(self.group_norm("unet.out_norm", h))
        out = self.layer("unet.out_conv", h) * (self.state["unet.out_gain"] if self.preserves else 1)
        denoised = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2) * x
        denoised = denoised + s * SIGMA_DATA / (s**2 + SIGMA_DATA**2).sqrt() * out
        if self.config == "A":
            return denoised, torch.zeros(len(x))
        return denoised, self.layer("logvar_linear", self.fourier("logvar_fourier", c_noise)).flatten()

    def embedding(self, c_noise, labels):
        if self.config in AFFINE:
            freqs = torch.tensor([10000 ** (-i / (WIDTH // 2)) for i in range(WIDTH // 2)])
            angle = c_noise[:, None] * freqs
            emb = torch.cat([angle.cos(), angle.sin()], 1)
        else:
            emb = self.fourier("unet.emb_fourier", c_noise)
        emb = self.layer("unet.emb_noise", emb)
        if self.config in GROUP_NORMS:
            emb = self.layer("unet.emb_noise1", self.silu(emb))
        one_hot = F.one_hot(labels, CLASSES).double() * (1 if self.config in AFFINE else math.sqrt(CLASSES))
        return self.silu(self.sum(emb, self.layer("unet.emb_label", one_hot), 0.5))

    def block(self, name, x, emb):
        encodes, has_skip = ".enc." in name, f"{name}.conv_skip.weight" in self.state
        mode = name.rsplit("_", 1)[1]
        if self.config in GROUP_NORMS:
            y = self.layer(
                f"{name}.conv_res0", resample(self.silu(self.group_norm(f"{name}.norm0", x)), mode)
            )
            y = self.group_norm(f"{name}.norm1", y)
            x = resample(x, mode)
        else:
            x = resample(x, mode)
            if encodes:
                x = self.layer(f"{name}.conv_skip", x) if has_skip else x
                x = self.unit(x, 1)
            y = self.layer(f"{name}.conv_res0", self.silu(x))
        condition = self.layer(f"{name}.emb_linear", emb)[:, :, None, None]
        if self.config in AFFINE:
            scale, shift = condition.chunk(2, 1)
            y = y * (1 + scale) + shift
        else:
            y = y * (1 + condition * (self.state[f"{name}.emb_gain"] if self.preserves else 1))
        y = self.layer(f"{name}.conv_res1", self.silu(y))
        if has_skip and (self.config in GROUP_NORMS or not encodes):
            x = self.layer(f"{name}.conv_skip", x)
        x = self.sum(x, y, 0.3)
        if f"{name}.attn_qkv.weight" in self.state:
            x = self.sum(x, self.attention(name, x), 0.3)
        return x if self.config in AFFINE else x.clamp(-256, 256)

    def attention(self, name, x):
        y = self.group_norm(f"{name}.attn_norm", x) if self.config in AFFINE else x
        qkv = self.layer(f"{name}.attn_qkv", y).reshape(len(x), -1, HEAD, 3, x[0, 0].numel())
        q, k, v = (qkv if self.config in AFFINE else self.unit(qkv, 2)).unbind(3)
        weights = torch.einsum("bhcq,bhck->bhqk", q, k / math.sqrt(HEAD)).softmax(-1)
        return self.layer(f"{name}.attn_proj", torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape))

    def layer(self, name, x):
        w, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        if self.config in NORMALISED:
            n = w[0].numel()
            norm = w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1))
            w = w / (1e-4 + norm / math.sqrt(n)) / math.sqrt(n)
        return F.linear(x, w, bias) if w.ndim == 2 else F.conv2d(x, w, bias, padding=w.shape[-1] // 2)

    def group_norm(self, name, x):
        groups = x.reshape(len(x), min(32, x.shape[1] // 4), -1)
        if self.config not in AFFINE:
            return (groups / (groups.square().mean(2, keepdim=True) + 1e-4).sqrt()).reshape(x.shape)
        variance, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
        y = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
        weight, bias = (self.state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return y * weight + bias

    def unit(self, x, dim):
        square = x.square().mean(dim, keepdim=True)
        return x / (1e-4 + square.sqrt()) if self.preserves else x / (square + 1e-4).sqrt()

    def fourier(self, name, x):
        features = torch.cos(x[:, None] * self.state[f"{name}.freqs"] + self.state[f"{name}.phases"])
        return features * math.sqrt(2) if self.preserves else features

    def silu(self, x):
        return x * torch.sigmoid(x) / (0.596 if self.preserves else 1)

    def sum(self, a, b, t):
        return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2) if self.preserves else a + b

    def joined(self, a, b):
        if not self.preserves:
            return torch.cat([a, b], 1)
        na, nb = a.shape[1], b.shape[1]
        k = math.sqrt((na + nb) / (0.5**2 + 0.5**2))
        return torch.cat([k * 0.5 / math.sqrt(na) * a, k * 0.5 / math.sqrt(nb) * b], 1)


def resample(x, mode):
    if mode == "down":
        batch, channels, height, width = x.shape
        return x.reshape(batch, channels, height // 2, 2, width // 2, 2).mean((3, 5))
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if mode == "up" else x


@pytest.mark.parametrize("config", "ABCDEFG")
def test_the_whole_denoiser_equals_its_definition(config, speak):
    torch.manual_seed(0)
    net = build_denoiser(
        32, 2, CLASSES, config=config, model_channels=WIDTH, channel_mult=(1, 2, 3), num_blocks=2,
        channels_per_head=HEAD,
    ).eval()  # fmt: skip
    speak(net)
    attends = {name.split(".")[2] for name in net.state_dict() if name.endswith("attn_qkv.weight")}
    assert {name.split("_")[0] for name in attends} == (
        {"32x32", "16x16", "8x8"} if config == "A" else {"16x16", "8x8"}
    )
    x, sigma, labels = torch.randn(2, 2, 32, 32), torch.tensor([0.3, 4.0]), torch.tensor([2, 4])
    with torch.no_grad():
        found, u = net(x, sigma, labels, return_logvar=True)
        expected, expected_u = ByHand(config, net.state_dict())(
            x.double(), sigma.double(), labels, resolution=32, levels=3, blocks=2
        )
    assert (expected - 0.25 / (sigma**2 + 0.25)[:, None, None, None] * x).square().mean() > 1e-3
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert torch.allclose(u.flatten().double(), expected_u.double(), atol=1e-5)
