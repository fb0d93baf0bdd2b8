"""Name the two commands: `python -m prunevolve`."""

from prunevolve.command_line import version

print(f"""prunevolve {version()}
prunevolve-search   evolve a pruning metric: launch or resume a search (run_search.py)
prunevolve-prune    prune a model with a metric, verify or measure a result (run_prune.py)
Each explains itself with --help.""")
