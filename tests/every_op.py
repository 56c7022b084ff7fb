"""Every op that has CPU kernels, called once, for tests of threads and processes."""

import torch

import fastlm
from fastlm import _native

# Whose products are torch's in part, and need not have the same bits on another number of threads.
PRODUCTS = {"linear_act", "linear_cross_entropy"}


def _numbers(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def every_op_once():
    """Name -> value and gradients of each op that has CPU kernels, on inputs that several threads share."""
    with fastlm.use_backend("native" if _native.cpu is not None else "reference"):  # torch would take the smaller ones
        return _every_op_once()


def _every_op_once():
    x, up, dy = (_numbers((600, 512), seed=seed) for seed in range(3))
    weight, target = _numbers((512,), seed=3), torch.arange(600) % 512
    q, k, v = (_numbers((2, 4, 200, 32), seed=seed) for seed in range(3))
    cos, sin = _numbers((200, 16), seed=5), _numbers((200, 16), seed=6)
    bias, slopes = _numbers((4, 200, 200), seed=8), _numbers((4,), seed=9)

    def everything(q, k, v, bias):  # few key heads, and one bias for the batch
        return fastlm.attention(
            q, k, v, bias=bias, causal=True, dropout_p=0.2, seed=torch.tensor(4), softcap=2.0, alibi_slopes=slopes,
            sinks=slopes,
        )  # fmt: skip

    def decode(q, k, v):
        return fastlm.attention_decode(q, k, v, cache_seqlens=torch.tensor([200, 77]))

    calls = {
        "relu": (fastlm.relu, [x]),
        "gelu": (fastlm.gelu, [x]),
        "bias_act": (lambda x, w: fastlm.bias_act(x, w, "silu"), [x, weight]),
        "dropout": (lambda x: fastlm.dropout(x, 0.3, seed=torch.tensor(4)), [x]),
        "bias_act with dropout": (lambda x, w: fastlm.bias_act(x, w, "tanh", 0.3, torch.tensor(4)), [x, weight]),
        "glu": (fastlm.glu, [x, up]),
        "layer_norm": (lambda x, w: fastlm.layer_norm(x, (512,), w), [x, weight]),
        "rms_norm": (lambda x, w: fastlm.rms_norm(x, (512,), w), [x, weight]),
        "rope": (lambda q: fastlm.rope(q.transpose(1, 2), cos, sin), [q]),
        "embedding": (lambda x: fastlm.embedding(target.repeat(3), x), [x]),
        "attention": (lambda q, k, v: fastlm.attention(q, k, v, causal=True), [q, k, v]),
        "attention with everything": (everything, [q[:, :, :, :8], k[:, :1, :, :8], v[:, :1, :, :8], bias]),
        "attention of one query": (fastlm.attention, [q[:, :, :1], k, v]),
        "attention_decode": (decode, [q[:, :, :3], k, v]),
        "gelu past the caches": (fastlm.gelu, [_numbers((1 << 22) + 5)]),
        "cross_entropy": (lambda x: fastlm.cross_entropy(x, target), [x]),
        "mse_loss": (fastlm.mse_loss, [x, up]),
        "linear_act": (lambda x, u: fastlm.linear_act(x, u, act="gelu"), [x, up]),
        "linear_cross_entropy": (lambda x, u: fastlm.linear_cross_entropy(x, u, target), [x, up]),
    }
    found = {}
    for name, (call, inputs) in calls.items():
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = call(*leaves)
        found[name] = (y.detach(), *torch.autograd.grad(y, leaves, _numbers(y.shape, seed=7)))
    parameter = torch.nn.Parameter(x.clone())
    parameter.grad = dy
    fastlm.optim.AdamW([parameter], max_norm=1.0).step()
    found["AdamW"] = (parameter.detach(),)
    return found


def differing(a, b):
    """The ops whose results are not equal bit for bit, or for PRODUCTS up to rounding."""

    def same(name, s, t):
        return torch.allclose(s, t, rtol=1e-4, atol=1e-4) if name in PRODUCTS else torch.equal(s, t)

    return [name for name in a if not all(same(name, s, t) for s, t in zip(a[name], b[name], strict=True))]
