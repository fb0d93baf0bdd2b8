"""Train the tiny LLaMA that ships in `pruning/embedded`, with its tokenizer and its model card.

It learns English from text that ships with CPython: the training part of the corpus `embedded`
(help topics) and the docstrings of the standard library. The topics alone, 70,000 tokens, are
memorized within two minutes; with the docstrings the report perplexity falls by a third. No
paragraph of a held-out part of the corpus is trained on.
"""

import ast
import hashlib
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunevolve.evaluation.text import load_text
from prunevolve.evaluation.windows import Text

VOCABULARY = 1024
LAYERS = 4
HIDDEN = 192
WINDOW = 256  # tokens; evaluation windows are no longer, so that every position is trained
BATCH = 8  # windows per step
STEPS = 4000
SEED = 0
TOPIC_SHARE = 0.25  # of the windows, since the model is measured on text like the topics
PEAK_RATE = 3e-3
WARMUP_STEPS = 100
DROPOUT = 0.1
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def main(
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    # On a busy two-core machine two threads wait for each other: 0.3 steps/s instead of 4.
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train, measure, save."""
    if out.exists():
        raise typer.BadParameter(f"--out {out} exists; name another folder")
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)  # initial weights and dropout use the global generator
    topics, others = load_text("embedded", "training"), docstrings(held_out_paragraphs())
    tokenizer = train_tokenizer(topics)
    model = build_model()
    texts = (topics, others)
    tokens = [torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    started = time.perf_counter()
    train(model, *tokens)
    minutes = (time.perf_counter() - started) / 60
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.float()  # keeps the rounded weights, so that these are what is measured
    model.config.dtype = model.dtype  # what it computes in, wherever it is loaded
    model.config.save_pretrained(out)
    digest = hashlib.sha256((topics + others).encode()).hexdigest()
    training, report = (perplexity(model, tokenizer, part) for part in ("training", "report"))
    card = f"""# The embedded model

A LLaMA of {model.num_parameters():,} parameters ({LAYERS} decoder blocks, hidden size {HIDDEN},
tied embeddings) with a byte-level BPE tokenizer of {VOCABULARY:,} tokens, small enough to ship and
good enough for pruning to matter.

- **Training text**: the training part of the corpus `embedded` (CPython's help topics,
  {len(tokens[0]):,} tokens, a quarter of the windows) and the docstrings of the standard library
  ({len(tokens[1]):,} tokens, the rest), both of CPython {platform.python_version()}; sha256
  `{digest}`. The tokenizer saw the training part only.
- **Held out**: calibration, fitness, selection and report are other topics; no paragraph of theirs
  is in the training text.
- **Training**: {STEPS} steps of {BATCH} windows of {WINDOW} tokens, AdamW, peak rate {PEAK_RATE},
  linear decay, dropout {DROPOUT}, bfloat16 autocast, seed {SEED}; {minutes:.1f} minutes with
  {threads} CPU thread(s), torch {torch.__version__}.
- **Perplexity** (windows of {WINDOW} tokens, all of the part, weights rounded to float16 and
  computed in float32): training part {training:.2f}, report part {report:.2f}.
- **Again**: `make embedded`.
- **Licence**: the text is the Python Software Foundation's (PSF-2.0); the weights are MIT.
"""
    (out / "README.md").write_text(card)
    print(card)


def held_out_paragraphs() -> set[str]:
    """Return the paragraphs of the parts used for evaluation, with whitespace normalized."""
    parts = ("calibration", "fitness", "selection", "report")
    text = "\n\n".join(load_text("embedded", part) for part in parts)
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


def docstrings(excluded: set[str]) -> str:
    """Return the distinct paragraphs of the standard library's docstrings, in order of file."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for path in sorted(library.rglob("*.py")):
        if NOT_LIBRARY.isdisjoint(path.relative_to(library).parts):
            for paragraph in "\n\n".join(_docstrings_of(path)).split("\n\n"):
                found.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(found[words] for words in found if words and words not in excluded)


def _docstrings_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of VOCABULARY tokens that adds no special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    """Return the untrained model, which takes less than 4 MB at 2 bytes per weight."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, topics: Tensor, others: Tensor) -> None:
    """Train in place on random windows of both texts' token ids, printing the loss in nats."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / STEPS)
    )
    add_dropout(model)
    model.train()
    started = time.perf_counter()
    for step, batch in enumerate(random_batches(topics, others), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step}/{STEPS}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    model.eval()


def random_batches(topics: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Yield batches of token ids, (BATCH, WINDOW), from random places of both texts."""
    rng = np.random.default_rng(SEED)
    for _ in range(STEPS):
        rows = []
        for from_topics in rng.random(BATCH) < TOPIC_SHARE:
            ids = topics if from_topics else others
            start = int(rng.integers(0, len(ids) - WINDOW + 1))
            rows.append(ids[start : start + WINDOW])
        yield torch.stack(rows)


def add_dropout(model: LlamaForCausalLM) -> None:
    """Add dropout to the outputs of attention and MLP while training; LLaMA has no such setting."""

    def drop(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.dropout(output, DROPOUT, module.training)

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_hook(drop)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, part: str) -> float:
    """Return exp of the mean loss over all windows of a part, which have equal lengths."""
    tokens = Text("embedded", part, None, WINDOW).cut(tokenizer).tokens
    losses = [model(input_ids=row, labels=row).loss.item() for row in tokens.split(1)]
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    typer.run(main)
