"""Typed configuration and the shipped experiments."""
