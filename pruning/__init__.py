"""The pruning engine: metric language, statistics, masks and the walk over decoder blocks."""
