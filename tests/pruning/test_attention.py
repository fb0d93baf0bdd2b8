"""Blocked attention against torch's: values, gradients, and who takes it."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from toy_models import FAMILIES, toy_model, toy_windows

from prunevolve.pruning import attention
from prunevolve.pruning.attention import NAME, blocked_attention, use_blocked_attention


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
@pytest.mark.parametrize(("count", "key_count"), [(4, 4), (6, 2), (3, 1)])
def test_blocked_attention_and_its_gradients_are_torchs(tokens, count, key_count, window):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, tokens, 8) for heads in (count, key_count, key_count)]
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    mask, how = None, {"is_causal": True}
    if window:
        ones = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
        mask = ones.tril() & ones.triu(1 - window)
        mask[1] |= ones[1].tril()  # each sequence of a batch has its own
        how = {"attn_mask": mask}
    found = blocked_attention(*tensors, 0.3, mask)
    expected = scaled_dot_product_attention(*tensors, **how, scale=0.3, enable_gqa=True)
    assert_close(found, expected)
    gradients = [torch.autograd.grad(x.square().sum(), tensors) for x in (found, expected)]
    assert_close(*gradients)


def eager_logits(model, windows):
    """Of attention as the model's own code writes it; torch's may leave out a cap on scores."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(input_ids=windows).logits
    model.set_attn_implementation(usual)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_models_give_the_same_logits_with_blocked_attention(family):
    model, windows = toy_model(family), toy_windows()
    with torch.no_grad():
        expected = eager_logits(model, windows)
        use_blocked_attention(model)
        assert_close(model(input_ids=windows).logits, expected)


def test_only_torchs_attention_is_replaced_and_a_saved_model_does_not_name_ours(tmp_path):
    model = toy_model("llama")
    use_blocked_attention(model)
    assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
    model.set_attn_implementation("eager")
    use_blocked_attention(model)
    assert model.config._attn_implementation == "eager"


def test_a_cap_on_scores_is_not_left_out(monkeypatch):
    model, windows = toy_model("gemma2"), toy_windows()
    with torch.no_grad():
        expected = eager_logits(model, windows)
        monkeypatch.setattr(type(model), "_supports_sdpa", True)  # as in transformers 5.6
        model.set_attn_implementation("sdpa")
        use_blocked_attention(model)
        assert_close(model(input_ids=windows).logits, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_gradients_on_another_device_are_taken_in_blocks(monkeypatch, asked, masked):
    calls = []
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *_, **__: calls.append(1) or (1, 2)
    )
    heads = [torch.empty(1, 2, 8, 4, device="meta", requires_grad=asked) for _ in range(3)]
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device="meta") if masked else None
    attention._attention_forward(torch.nn.Module(), *heads, mask)
    assert len(calls) == (not asked)
