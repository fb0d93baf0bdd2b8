"""Inputs and gradients of layers by torch's own means, against which statistics are compared."""

import torch
from torch.nn import functional


@torch.no_grad()
def own_inputs(model, layers, windows):
    """Return each layer's inputs, one (tokens, in_features) for each window."""
    kept = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: kept[name].append(inputs[0].flatten(0, -2).clone())
        )
        for name, layer in layers.items()
    ]
    for window in windows:
        model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return kept


def own_gradients(model, layers, windows):
    """Return each layer's gradients of its weight and its output, a pair for each window."""
    pairs, outputs = {name: [] for name in layers}, {}
    handles = [
        layer.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
        for name, layer in layers.items()
    ]
    for window in windows:
        logits = model(input_ids=window[None]).logits[0]
        loss = functional.cross_entropy(logits[:-1], window[1:])
        asked = [one for name, layer in layers.items() for one in (layer.weight, outputs[name])]
        gradients = iter(torch.autograd.grad(loss, asked))
        for kept in pairs.values():
            kept.append((next(gradients), next(gradients).flatten(0, -2)))
    for handle in handles:
        handle.remove()
    return pairs
