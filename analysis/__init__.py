"""Look at it: evaluation, memory, figures and the report."""
