"""The search: breeding, evaluating and recording candidate metrics."""
