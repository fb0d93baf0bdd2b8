"""Output for people: tables of perplexities, and report.html with its chart."""
