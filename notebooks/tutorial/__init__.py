"""What the notebooks import: plain functions, tested without a notebook."""
