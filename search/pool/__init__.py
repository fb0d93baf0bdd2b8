"""The pool of workers that evaluates candidates, here or on a Ray cluster."""
