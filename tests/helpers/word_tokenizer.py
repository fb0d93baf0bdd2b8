"""A tokenizer that a test can read: each number is its own token."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS = 1000


def word_tokenizer(bos=None, adds_bos=False, **settings) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words 0 to 999, which may have a bos and put it first."""
    words = {str(number): number for number in range(BOS)} | ({bos: BOS} if bos else {})
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, **settings)
