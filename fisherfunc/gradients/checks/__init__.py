"""What a finished pass is held against."""
