"""The colours of report.html, each for a light and a dark page.

Charts are drawn in the light colours. The page replaces each by a CSS variable, so that a drawing
follows the reader's colour scheme, and print is always light.
"""

import re

import matplotlib
from matplotlib.colors import Colormap, ListedColormap, to_hex

_PAGE = {
    "paper": ("#ffffff", "#14181d"),
    "ink": ("#1b1f24", "#e4e8ec"),
    "quiet": ("#4a535e", "#a9b4c0"),
    "rule": ("#d5dae0", "#38414b"),
    "link": ("#1f5fa8", "#7db4f0"),
    "inset": ("#f3f5f7", "#20262d"),
    "alarm": ("#c0392b", "#ff8574"),
    "alarm-inset": ("#fdf0ee", "#3a1f1c"),
    "good": ("#1c7a4f", "#5ccf98"),
    "good-inset": ("#ecf7f1", "#16301f"),
}
_CHARTS = {
    "grid": ("#e4e4e4", "#2c343c"),
    "point": ("#6f94c4", "#7ba4d6"),
    "dim": ("#98a3b0", "#76818d"),
    "best": ("#b03a2e", "#ff7d6b"),
    "edge": ("#6b7786", "#7f8b98"),
    "operator": ("#dce9f7", "#24405f"),
    "leaf": ("#e2f2e6", "#1f4a30"),
    # The hues of Okabe and Ito (2008), which colour-blind readers can tell apart.
    "series-0": ("#0072b2", "#4ba3e3"),
    "series-1": ("#d55e00", "#f0894a"),
    "series-2": ("#00875f", "#2fc79a"),
    "series-3": ("#b0588c", "#e08abf"),
    "series-4": ("#9a7d00", "#e0c040"),
    "series-5": ("#3b8fc2", "#8fd0f5"),
    "series-6": ("#5d6470", "#b3bcc8"),
    "evaluated": ("#2a7f62", "#3fae88"),
    "stopped": ("#e3a72f", "#d9a13b"),
    "duplicate": ("#9fb4cc", "#6f87a3"),
    "degenerate": ("#b07aa1", "#a8719a"),
    "failed": ("#c0382a", "#d9604f"),
}
_SHADES = 20  # above 50, matplotlib draws a bitmap


def _shades(light: str, dark: str) -> list[tuple[str, str]]:
    maps = [matplotlib.colormaps[name].resampled(_SHADES) for name in (light, dark)]
    return [(to_hex(maps[0](i)), to_hex(maps[1](i))) for i in range(_SHADES)]


_SHARES = {f"share-{i}": pair for i, pair in enumerate(_shades("Blues", "bone"))}
_ZEROS = {f"zeros-{i}": pair for i, pair in enumerate(_shades("viridis_r", "viridis"))}

COLOURS: dict[str, tuple[str, str]] = _PAGE | _CHARTS | _SHARES | _ZEROS
"""Each name's colour on a light page, which identifies it in a drawing, and on a dark page."""

LIGHT = {name: light for name, (light, _) in COLOURS.items()}
"""The colours that charts are drawn in."""

_NAMES = {light: name for name, light in LIGHT.items()}


def shades(kind: str) -> Colormap:
    """Return the colour map, from low to high, of a kind: `share` or `zeros`."""
    return ListedColormap([LIGHT[f"{kind}-{i}"] for i in range(_SHADES)])


def themed(svg: str) -> str:
    """Return a drawing with the page's variables in place of its colours; others are kept."""

    def variable(match: re.Match[str]) -> str:
        name = _NAMES.get(match[0])
        return f"var(--{name})" if name else match[0]

    return re.sub(r"#[0-9a-f]{6}\b", variable, svg)


def stylesheet() -> str:
    """Return the CSS that sets every variable to its colour."""
    light, dark = (
        "".join(f"--{name}:{pair[scheme]};" for name, pair in COLOURS.items()) for scheme in (0, 1)
    )
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
