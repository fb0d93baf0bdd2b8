"""Window losses against the models' own loss, and perplexity against numbers worked by hand."""

import math

import pytest
import torch
from toy_models import FAMILIES, TOKENS, VOCABULARY, toy_model, toy_windows

from evaluation.perplexity import perplexity, window_losses
from pruning import embed_and_head
from pruning.embed_and_head import logits_in_parts
from pruning.store import ResidentStore


@torch.no_grad()
def own_losses(model, windows):
    return torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in windows])


@pytest.mark.parametrize("chunk", [1, 4, TOKENS - 1, TOKENS, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_window_losses_are_the_models_own_whatever_the_chunk(family, chunk, monkeypatch):
    monkeypatch.setattr(embed_and_head, "HEAD_TOKENS", chunk)
    model, windows = toy_model(family), toy_windows(count=3)
    losses = window_losses(ResidentStore(model), windows)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, own_losses(model, windows).double(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_final_states_are_the_models_own(family):
    model, windows = toy_model(family), toy_windows(count=1)
    hidden = model.base_model(input_ids=windows, use_cache=False)[0][0]
    parts = list(logits_in_parts(model, hidden))
    torch.testing.assert_close(torch.cat(parts), model(input_ids=windows).logits[0])


def test_logits_of_a_bf16_model_are_fp32():
    model, windows = toy_model("llama").to(torch.bfloat16), toy_windows(count=1)
    hidden = model.base_model(input_ids=windows, use_cache=False)[0][0]
    assert next(logits_in_parts(model, hidden)).dtype == torch.float32


def test_window_losses_heed_the_soft_cap_of_logits():
    windows = toy_windows()
    found = []
    for cap in (3.0, None):
        model = toy_model("gemma3_text", final_logit_softcapping=cap)
        found.append(window_losses(ResidentStore(model), windows))
        expected = own_losses(model, windows).double()
        torch.testing.assert_close(found[-1], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(*found)


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_the_vocabulary():
    model = toy_model("llama")
    model.lm_head.weight.data.zero_()
    losses = window_losses(ResidentStore(model), toy_windows())
    torch.testing.assert_close(losses, torch.full((3,), math.log(VOCABULARY), dtype=torch.float64))
    assert perplexity(losses) == pytest.approx(VOCABULARY)


def test_each_window_is_measured_alone():
    model, windows = toy_model("gemma3_text"), toy_windows(count=4)
    alone = torch.cat([window_losses(ResidentStore(model), window[None]) for window in windows])
    assert torch.equal(window_losses(ResidentStore(model), windows), alone)


def test_shortest_window_has_one_prediction():
    model, windows = toy_model("llama"), toy_windows(tokens=2)
    with torch.no_grad():
        log_probabilities = model(input_ids=windows).logits[:, 0].log_softmax(-1)
    expected = -log_probabilities.gather(1, windows[:, 1:]).flatten().double()
    torch.testing.assert_close(window_losses(ResidentStore(model), windows), expected)


def test_on_window_counts_the_windows():
    seen = []
    window_losses(ResidentStore(toy_model("llama")), toy_windows(count=3), seen.append)
    assert seen == [1, 2, 3]


def test_perplexity_is_exp_of_the_mean_loss_not_the_mean_of_perplexities():
    # Losses ln 2 and ln 8 have the mean ln 4; the mean of 2 and 8 would be 5.
    assert perplexity(torch.tensor([math.log(2), math.log(8)]).double()) == pytest.approx(4)


@pytest.mark.parametrize("losses", [[1e4], [699.0, 1e9], [math.inf, 1.0]])
def test_perplexity_that_overflows_is_infinite(losses):
    assert perplexity(torch.tensor(losses, dtype=torch.float64)) == math.inf


def test_perplexity_just_below_the_overflow_is_finite():
    assert math.isfinite(perplexity(torch.tensor([699.0], dtype=torch.float64)))
