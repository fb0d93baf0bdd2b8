"""What a pruned model is measured on, and how: corpora, perplexity, zero-shot tasks."""
