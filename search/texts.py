"""The four texts of a run: checked to be there and disjoint, then cut into token windows."""

from typing import Any

from configs.schema import Config
from evaluation.corpus import Windows, check_available, check_disjoint, token_windows


def check_texts(config: Config) -> list[str]:
    """Check a config's texts without a network; return a line for each that needs the hub.

    Raises:
        ValueError: If a text is unknown, missing or malformed, or two of them overlap.
    """
    overlaps = check_disjoint({role: (t.corpus, t.split) for role, t in config.texts.items()})
    if overlaps and not config.allow_test_selection:
        raise ValueError(f"{overlaps[0]}: give disjoint texts, or set allow_test_selection: true")
    notes = {role: check_available(t.corpus, t.split) for role, t in config.texts.items()}
    return [f"{role}: {note}" for role, note in notes.items() if note]


def load_windows(config: Config, tokenizer: Any) -> dict[str, Windows]:
    """Return the token windows by role; raises ValueError where a text cannot be had."""
    return {
        role: token_windows(
            tokenizer, text.corpus, text.split, text.windows, text.length, text.seed
        )
        for role, text in config.texts.items()
    }
