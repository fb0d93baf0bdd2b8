"""Window losses against the models' own loss, and perplexity against numbers worked by hand."""

import math

import pytest
import torch
from torch.testing import assert_close
from toy_models import FAMILIES, TOKENS, losses_in, toy_model, toy_windows

from prunevolve.evaluation.perplexity import perplexity, perplexity_error
from prunevolve.pruning import store, stream
from prunevolve.pruning.store import ResidentStore


@torch.no_grad()
def own_losses(model, windows):
    return torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in windows])


@pytest.mark.parametrize("chunk", [4, TOKENS - 1, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_window_losses_are_the_models_own_whatever_the_chunk(family, chunk, monkeypatch):
    monkeypatch.setattr(stream, "HEAD_TOKENS", chunk)
    model, windows = toy_model(family), toy_windows(count=3)
    seen = []
    losses = losses_in(ResidentStore(model), windows, seen.append)
    assert losses.dtype == torch.float64
    assert_close(losses, own_losses(model, windows).double(), rtol=1e-5, atol=1e-5)
    assert seen == [1, 2, 3]
    shortest = windows[:, :2]  # with one prediction each
    expected = own_losses(model, shortest).double()
    assert_close(losses_in(ResidentStore(model), shortest), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_windows_pass_at_a_time_as_their_tokens_allow(family, monkeypatch):
    monkeypatch.setattr(store, "BATCH_TOKENS", 2 * TOKENS + 1)
    model, windows, passed = toy_model(family), toy_windows(count=3), []
    expected = own_losses(model, windows).double()
    model.base_model.register_forward_pre_hook(
        lambda module, args, given: passed.append(len(given["input_ids"])), with_kwargs=True
    )
    losses = losses_in(ResidentStore(model), windows)
    assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(store, "BATCH_TOKENS", TOKENS - 1)
    assert_close(losses_in(ResidentStore(model), windows), expected, rtol=1e-5, atol=1e-5)
    assert passed == [2, 1, 1, 1, 1]


def test_error_of_a_perplexity_is_that_of_the_mean_loss_times_the_perplexity():
    # Of 1, 2 and 3 the mean is 2 and the standard deviation 1.
    losses = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert perplexity_error(losses) == pytest.approx(math.exp(2) / math.sqrt(3))
    assert perplexity_error(losses[:1]) is None


def test_perplexity_is_infinite_only_where_it_overflows():
    for losses in ([1e4], [699.0, 1e9], [math.inf, 1.0]):
        assert perplexity(torch.tensor(losses, dtype=torch.float64)) == math.inf
    assert math.isfinite(perplexity(torch.tensor([699.0], dtype=torch.float64)))
