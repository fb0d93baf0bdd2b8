"""What a person looks at: tables of perplexities, and report.html with its charts."""
