"""Two-sided intervals, regret and gaps."""
