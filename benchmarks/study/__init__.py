"""Where the curriculum helps, against what one would use instead: runner and report."""
