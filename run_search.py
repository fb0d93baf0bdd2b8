"""Search for a pruning metric: the process that the user starts, which guards the search."""

from prunevolve.search.pool import guard


def main() -> None:
    """Console entry."""
    guard.around(_drive)


def _drive() -> None:
    # Imported in the guarded process, whose signals the guard holds meanwhile.
    from prunevolve import command_line
    from prunevolve.search.command import app

    command_line.run_to_end(app, guarded=True)


if __name__ == "__main__":
    main()
