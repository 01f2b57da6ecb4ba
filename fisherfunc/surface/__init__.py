"""Layer 6: files, report, plots, command line: the only layer that prints or touches the user's files."""
