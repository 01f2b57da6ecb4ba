"""What touches the process or a device: threads, precision, memory, sizes that suit it, random numbers."""
