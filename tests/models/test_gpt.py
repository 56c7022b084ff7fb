"""The GPT: shapes, causality, cached sampling, counts, errors."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastlm.models import GPT, Cache, GPTConfig

SMALL = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 3, "n_embd": 24}


def make(**changes) -> GPT:
    """A small GPT with random weights everywhere: fresh ones are zero where each branch ends."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **changes}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def test_fresh_model_knows_nothing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    logits, none = model(tokens(4, 16))
    assert logits.shape == (4, 16, 61) and logits.dtype == torch.float32 and none is None
    none, loss = model(tokens(4, 16), tokens(4, 16, seed=2))
    assert none is None and loss.shape == ()
    assert loss.item() == pytest.approx(math.log(61), rel=0.05)


def test_loss_is_the_mean_over_targets_that_count():
    model, idx, targets = make(), tokens(3, 16), tokens(3, 16, seed=2)
    targets[0, 5:] = -1
    log_p = model(idx)[0].log_softmax(-1)
    expected = -log_p[targets >= 0].gather(1, targets[targets >= 0][:, None]).mean()
    torch.testing.assert_close(model(idx, targets)[1], expected)


def test_logits_do_not_see_the_future():
    model, idx = make(), tokens(2, 16)
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(dim=-1).any()


def test_angles_stay_exact_in_a_model_of_lower_precision():
    model, exact = make(), make()
    model.to(torch.bfloat16)
    assert model.embed.weight.dtype == torch.bfloat16 and model.blocks[0].mlp.up.weight.dtype == torch.bfloat16
    assert torch.equal(model.rope_cos, exact.rope_cos) and torch.equal(model.rope_sin, exact.rope_sin)
    logits, wanted = model(tokens(2, 16))[0], exact(tokens(2, 16))[0]
    assert (logits - wanted).norm() < 0.1 * wanted.norm()
    empty = GPT(GPTConfig(**SMALL)).to("meta").to_empty(device="cpu")
    assert torch.equal(empty.rope_cos, exact.rope_cos)


def test_positions_matter():
    model = make()
    same = torch.full((1, 16), 7)  # attention over equal values cannot tell positions; values differ by order only
    swapped = tokens(1, 16)
    swapped[:, [2, 3]] = swapped[:, [3, 2]]
    assert not torch.allclose(model(tokens(1, 16))[0][:, -1], model(swapped)[0][:, -1])
    torch.testing.assert_close(model(same)[0][:, 0], model(same)[0][:, 15], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ["relu_squared", "relu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_weight_learns(act, bias):
    model = make(act=act, bias=bias)
    model(tokens(4, 16), tokens(4, 16, seed=2))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert any("bias" in name for name, _ in model.named_parameters()) == bias


def test_weights_live_in_stock_modules():
    model = make(bias=True)
    stock = {
        id(p) for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm)) for p in m.parameters()
    }
    assert {id(p) for p in model.parameters()} == stock
    assert model.head.weight is model.embed.weight


def test_dropout_acts_in_training_and_repeats_with_the_generator():
    model, idx = make(dropout=0.3), tokens(2, 16)
    torch.manual_seed(3)
    first = model(idx)[0]
    torch.manual_seed(3)
    again = model(idx)[0]
    assert torch.equal(first, again)
    assert not torch.allclose(first, model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], make()(idx)[0])


@pytest.mark.parametrize("pieces", [[16], [1] * 16, [5, 1, 1, 9], [7, 8, 1]])
def test_cached_logits_equal_uncached_ones(pieces):
    model, idx = make().eval(), tokens(3, 16)
    cache = Cache(model.config, 3)
    with torch.no_grad():
        cached = torch.cat([model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(cached, model(idx)[0], rtol=1e-4, atol=1e-4)
    assert cache.length == 16


@pytest.mark.parametrize("prompt", [1, 5, 16, 20])
def test_cached_sampling_equals_uncached_sampling_also_past_the_window(prompt):
    model, idx = make(), tokens(2, prompt)

    def draw(use_cache):
        generator = torch.Generator().manual_seed(5)
        return torch.stack(list(model.generate(idx, 40, top_k=20, generator=generator, use_cache=use_cache)), dim=1)

    cached = draw(True)
    assert cached.shape == (2, 40)
    assert torch.equal(cached, draw(False))
    assert model.training  # as it was


def test_sampling_arguments():
    model, idx = make(), tokens(2, 4)
    greedy = torch.stack(list(model.generate(idx, 6, temperature=0)), dim=1)
    assert torch.equal(greedy, torch.stack(list(model.generate(idx, 6, top_k=1)), dim=1))
    assert torch.equal(greedy[:, 0], model(idx)[0][:, -1].argmax(-1))
    hot = torch.stack(list(model.generate(idx, 200, temperature=50.0, top_k=3)), dim=1)
    assert len(hot.unique()) > 3
    for tiny in (1e-300, 1e-40, 1e-20):
        assert torch.equal(greedy, torch.stack(list(model.generate(idx, 6, temperature=tiny, top_k=5)), dim=1))
    hottest = torch.cat(list(model.generate(idx[:1, -1:], 200, temperature=1e300, top_k=3, use_cache=False)))
    assert len(hottest.unique()) > 3


def test_counts():
    model = make()
    assert model.num_parameters() == sum(p.numel() for p in set(model.parameters()))
    with FlopCounterMode(display=False) as counter:
        model(tokens(2, 16))
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    linear = 2 * 24 * (2 * (4 + 8) * 24 + 61)  # by hand: qkv and proj 4 C², MLP 8 C², head C V
    assert model.flops_per_token() == linear + 2 * 4 * 24 * (16 + 1) / 2
    assert products == linear * 2 * 16  # attention is no plain product and stands apart


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, "GPTConfig: n_layer must be a positive integer, got 0"),
        ({"vocab_size": 2.0}, "GPTConfig: vocab_size must be a positive integer, got 2.0"),
        ({"n_embd": 21}, "GPTConfig: n_embd must be a multiple of 2 . n_head = 6 .*, got 21"),
        ({"act": "tanh"}, "GPTConfig: act must be one of relu_squared, relu, gelu, got 'tanh'"),
        ({"dropout": 1.0}, r"GPTConfig: dropout must be in \[0, 1\), got 1.0"),
        ({"rope_base": 1.0}, "GPTConfig: rope_base must be above 1, got 1.0"),
    ],
)
def test_shapes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **changes})


def test_config_round_trip():
    config = GPTConfig(**SMALL, act="gelu", bias=True)
    assert GPTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="GPTConfig: unknown heads"):
        GPTConfig.from_dict({**SMALL, "heads": 2})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(tokens(16)), r"GPT: idx must be \(B, T\), got \(16,\)"),
        (lambda m: m(tokens(1, 17)), "GPT: idx may hold at most 16 tokens a row, got 17"),
        (lambda m: m(tokens(1, 4), tokens(1, 3)), r"GPT: targets must be \(1, 4\) as idx is, got \(1, 3\)"),
        (lambda m: m(tokens(2, 0), tokens(2, 0)), r"GPT: with targets idx must hold at least one token, got \(2, 0\)"),
        (lambda m: m(tokens(2, 4), cache=Cache(m.config, 3)), "GPT: idx must have the cache's 3 rows, got 2"),
        (lambda m: next(m.generate(tokens(1, 0), 1)), r"GPT.generate: idx must be \(B, T\) with T >= 1, got \(1, 0\)"),
        (lambda m: next(m.generate(tokens(1, 1), 1, temperature=-1)), "must be at least 0 and finite, got -1"),
        (lambda m: next(m.generate(tokens(1, 1), 1, temperature=math.inf)), "must be at least 0 and finite, got inf"),
        (lambda m: next(m.generate(tokens(1, 1), 1, temperature=math.nan)), "must be at least 0 and finite, got nan"),
        (lambda m: next(m.generate(tokens(1, 1), 1, top_k=0)), "top_k must be at least 1, got 0"),
    ],
)
def test_calls_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())


def test_a_full_cache_says_so():
    model, cache = make(), Cache(GPTConfig(**SMALL), 1)
    model(tokens(1, 16), cache=cache)
    with pytest.raises(ValueError, match="at most 0 tokens a row after the 16 in the cache, got 1"):
        model(tokens(1, 1), cache=cache)


def test_compiles_whole_and_gives_the_same_loss():
    model, idx, targets = make(), tokens(2, 16), tokens(2, 16, seed=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(idx, targets)[1], model(idx, targets)[1])


def test_many_logits_are_not_held(monkeypatch):
    """The same loss and gradients; and a changed head is called."""
    from fastlm.models import gpt

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=16))
    idx = torch.randint(64, (3, 16))
    targets = torch.where(torch.rand(3, 16) < 0.2, -1, idx.flip(1))
    results = []
    for many in (1 << 60, 1):
        monkeypatch.setattr(gpt, "_MANY_LOGITS", many)
        loss = model(idx, targets)[1]
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*results)
    handle = model.head.register_forward_hook(lambda module, args, out: out * 0)
    assert model(idx, targets)[1].item() == pytest.approx(math.log(64))
    handle.remove()
