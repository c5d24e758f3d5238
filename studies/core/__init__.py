"""What every study shares: sizes, methods, runs, results and the command."""
