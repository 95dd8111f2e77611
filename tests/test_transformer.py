"""The Transformer looks back only, and its gradients under a rule are those of the layers the rule acts on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repro.errors import ReproError
from repro.gradients import TopK, threshold_linears
from repro.models.transformer import Block, Transformer


def made(**changes) -> Transformer:
    torch.manual_seed(0)
    sizes = {"symbols": 11, "width": 12, "layers": 2, "heads": 3, "longest": 9} | changes
    return Transformer(**sizes).double()


def tokens(steps: int, batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(11, (steps, batch), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(2, 9), batch=st.integers(1, 3), seed=st.integers(0, 1000), data=st.data())
def test_later_tokens_do_not_change_earlier_logits(steps, batch, seed, data):
    """Causality: another token at place t changes logits from t on, and none before."""
    t = data.draw(st.integers(1, steps - 1))
    model, first = made(), tokens(steps, batch, seed)
    second = first.clone()
    second[t] = (first[t] + 1) % 11
    before, after = model(first), model(second)
    torch.testing.assert_close(after[:t], before[:t], rtol=0, atol=1e-12)
    assert (after[t] != before[t]).any()


def test_every_earlier_token_matters():
    """The last logits depend on all tokens: none is masked too much."""
    model = made()
    vectors = model.embedding(tokens(9, 1)).detach().requires_grad_()
    x = vectors.transpose(0, 1) + model.positions.weight
    for block in model.blocks:
        x = block(x)
    model.decoder(model.norm(x))[0, -1, 0].backward()
    assert (vectors.grad.abs().sum(2) > 0).all()


def test_sequences_of_a_batch_do_not_meet():
    model, batch = made(), tokens(9, 3)
    alone = torch.cat([model(batch[:, i : i + 1]) for i in range(3)], 1)
    torch.testing.assert_close(model(batch), alone)


def test_places_are_told_apart():
    """The same symbol over and over has other logits at every place, through the positions alone."""
    logits = made()(torch.zeros(9, 1, dtype=torch.long))
    assert len(torch.unique(logits[:, 0, 0])) == 9


def test_a_block_is_its_equations():
    """One head, written out: softmax(q k / sqrt(width)) over the past, residual sums around both halves."""
    torch.manual_seed(1)
    block, x = Block(6, 1).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    q, k, v = block.queries_keys_values(nn.functional.layer_norm(x, (6,))).split(6, 2)
    scores = q @ k.transpose(1, 2) / 6**0.5
    weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(2)
    y = x + block.gather(weights @ v)
    y = y + block.narrow(nn.functional.gelu(block.widen(nn.functional.layer_norm(y, (6,)))))
    torch.testing.assert_close(block(x), y)


def test_a_threshold_of_0_changes_no_gradient():
    dense, model, batch = made(), made(), tokens(9, 2)
    threshold_linears(model.blocks, 0.0)
    for each in (dense, model):
        each(batch).logsumexp(2).sum().backward()
    for expected, found in zip(dense.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0)


def test_a_threshold_turns_the_gradient_of_what_is_normalised():
    """Behind a LayerNorm only the direction of a vector matters: the gradient has no share along it. The largest fifth of its
    entries has one, so that updates may let the vector grow, which a Transformer's stream does.
    """
    torch.manual_seed(0)
    stream = torch.randn(200, 64, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(64, 10, dtype=torch.float64)
    loss = nn.functional.cross_entropy(nn.functional.layer_norm(stream, (64,)) @ weights, torch.arange(200) % 10)
    (gradient,) = torch.autograd.grad(loss, stream)
    along = (gradient * stream.detach()).sum(1) / gradient.norm(dim=1) / stream.norm(dim=1)
    assert along.abs().max() < 1e-4  # the epsilon of the norm
    kept = TopK(0.8)(gradient.clone())
    along = (kept * stream.detach()).sum(1) / kept.norm(dim=1).clamp_min(1e-30) / stream.norm(dim=1)
    assert along.abs().max() > 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 10}, "divide the width"), ({"layers": 0}, "layers of the Transformer is 0"), ({"symbols": 0}, "symbols")],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ReproError, match=message):
        made(**changes)


def test_a_longer_sequence_is_refused():
    with pytest.raises(ReproError, match="10 symbols"):
        made()(tokens(10, 1))
