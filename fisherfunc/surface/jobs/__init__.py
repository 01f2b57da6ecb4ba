"""What a command runs: from texts and a model to a folder of results."""
