"""Divergences of a pruned model from the dense one, against torch's own on all logits."""

import copy

import pytest
import torch
from torch.nn import functional
from toy_models import FAMILIES, TOKENS, toy_model, toy_windows

from evaluation.divergence import final_hidden, window_divergences
from pruning import ends
from pruning.masks import Row, Target
from pruning.metric import Metric
from pruning.pruner import prune
from pruning.recipe import Recipe
from pruning.store import ResidentStore
from pruning.walk import Texts


def stored(family, **settings):
    return ResidentStore(toy_model(family, **settings))


def pruned(dense):
    copied = ResidentStore(copy.deepcopy(dense.model))
    prune(copied, Recipe(Metric.parse("W"), Target(0.5, Row())), Texts(toy_windows()))
    return copied


@torch.no_grad()
def own_divergences(dense, model, windows):
    """Return each window's mean divergence, (N,), from whole logits."""
    logits = [one.model(input_ids=windows).logits[:, :-1] for one in (dense, model)]
    theirs, own = (values.log_softmax(-1) for values in logits)
    by_token = functional.kl_div(own, theirs, reduction="none", log_target=True).sum(-1)
    return by_token.mean(1).double()


@pytest.mark.parametrize("chunk", [1, 4, TOKENS - 1, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_window_divergences_are_torchs_whatever_the_chunk(family, chunk, monkeypatch):
    monkeypatch.setattr(ends, "HEAD_TOKENS", chunk)
    dense, windows = stored(family), toy_windows(count=3)
    model = pruned(dense)
    found = window_divergences(model, windows, final_hidden(dense, windows))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, own_divergences(dense, model, windows), rtol=1e-4, atol=1e-6)


def test_window_divergences_heed_the_soft_cap_of_logits():
    windows, found = toy_windows(), []
    for cap in (3.0, None):
        dense = stored("gemma3_text", final_logit_softcapping=cap)
        model = pruned(dense)
        found.append(window_divergences(model, windows, final_hidden(dense, windows)))
        expected = own_divergences(dense, model, windows)
        torch.testing.assert_close(found[-1], expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(*found, rtol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_has_none_and_a_pruned_one_has_some(family):
    dense, windows = stored(family), toy_windows()
    hidden = final_hidden(dense, windows)
    assert torch.equal(window_divergences(dense, windows, hidden), torch.zeros(3).double())
    assert (window_divergences(pruned(dense), windows, hidden) > 0.01).all()


def test_divergence_is_of_the_dense_distribution_to_the_models_not_the_other_way_round():
    dense, windows = stored("llama"), toy_windows()
    model = pruned(dense)
    there = window_divergences(model, windows, final_hidden(dense, windows))
    back = window_divergences(dense, windows, final_hidden(model, windows))
    torch.testing.assert_close(there, own_divergences(dense, model, windows), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(there, back, rtol=0.01)


def test_each_window_is_compared_alone():
    dense, windows = stored("gemma3_text"), toy_windows(count=4)
    model, hidden = pruned(dense), final_hidden(dense, windows)
    alone = [window_divergences(model, windows[i : i + 1], hidden[i : i + 1]) for i in range(4)]
    assert torch.equal(window_divergences(model, windows, hidden), torch.cat(alone))


def test_final_hidden_is_one_state_for_each_prediction_in_the_models_dtype():
    model, windows = ResidentStore(toy_model("llama").to(torch.bfloat16)), toy_windows(count=2)
    hidden = final_hidden(model, windows)
    assert hidden.shape == (2, TOKENS - 1, 16)
    assert hidden.dtype == torch.bfloat16


def test_windows_and_dense_states_must_be_as_many():
    model, windows = stored("llama"), toy_windows(count=3)
    with pytest.raises(ValueError, match="shorter"):
        window_divergences(model, windows, final_hidden(model, windows)[:2])
