"""Parts of the project whose libraries are not in a plain installation."""

from importlib.util import find_spec

SEARCH = ("deap", "ray", "matplotlib", "jinja2")


def require(extra: str, *modules: str) -> None:
    """Check that the modules of an extra of this package are installed.

    Raises:
        ModuleNotFoundError: If one is missing; one line that names the way out.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} must be installed for this: pip install 'prunevolve[{extra}]'",
            name=missing[0],
        )
