from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcolor.model import convolution
from fastcolor.model.convolution import convolve, weight_gradient


def made(inputs, outputs, stride, layout=torch.channels_last):
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False).to(memory_format=layout)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 5, 7, 4), (3, 8, 6, 6)], ids=str)
def test_weight_gradient_is_autograds(shape, stride):
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(6, shape[1], 3, 3, dtype=torch.float64, requires_grad=True)
    y = nn.functional.conv2d(x, weight, None, stride, 1)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, weight, grad)
    for layout in (torch.channels_last, torch.contiguous_format):
        found = weight_gradient(grad.contiguous(memory_format=layout), x.contiguous(memory_format=layout), stride)
        assert torch.allclose(found, expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_of_wide_ones(stride, bf16):
    """Against float64, no worse than PyTorch's own."""
    conv = made(512, 512, stride)
    x = torch.randn(2, 512, 6, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(2, 512, 6 // stride, 4 // stride)

    def gradients(call, module, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = call(module, x)
        assert y.dtype == (torch.bfloat16 if bf16 and x.dtype != torch.float64 else x.dtype)
        return torch.autograd.grad(y, (x, module.weight), grad.to(y.dtype))

    exact = made(512, 512, stride).double()
    exact.load_state_dict(conv.state_dict())
    with torch.autocast("cpu", enabled=False):
        y = exact(x.detach().double().requires_grad_())
    wide = x.detach().double().requires_grad_()
    truth = torch.autograd.grad(exact(wide), (wide, exact.weight), grad.double())
    assert convolution._pays(conv, x)
    ours, theirs = gradients(convolve, conv, x), gradients(lambda m, z: m(z), conv, x)
    for o, t, e in zip(ours, theirs, truth, strict=True):
        assert o.dtype == torch.float32 and o.stride() == t.stride()
        assert (o - e).abs().max() <= 2 * (t - e).abs().max() + 1e-6 * e.abs().max()
    assert y.dtype == torch.float64


def test_what_is_left_to_pytorch():
    x = torch.randn(1, 512, 4, 4)
    assert convolution._pays(made(512, 512, 1), x)
    assert not convolution._pays(made(256, 256, 1), x[:, :256])  # narrow, in float32
    assert convolution._pays(made(256, 256, 1), x[:, :256].bfloat16())
    assert convolution._pays(made(128, 256, 2), x[:, :128])
    assert not convolution._pays(made(512, 512, 1, torch.contiguous_format), x)
    assert not convolution._pays(nn.Conv2d(512, 512, 1, bias=False).to(memory_format=torch.channels_last), x)
    for options in ({"dilation": 2}, {"padding_mode": "reflect"}, {"stride": (1, 2)}, {"bias": True}):
        other = nn.Conv2d(512, 512, 3, **{"padding": 1, "bias": False, **options}).to(memory_format=torch.channels_last)
        assert not convolution._pays(other, x)
        assert torch.equal(convolve(other, x), other(x))
    with torch.no_grad():
        assert not convolution._pays(made(512, 512, 1), x)
