"""The time on a device: a GPU goes on with what it was given to do after the call that gave it."""

from time import perf_counter

import torch


def clock(device: torch.device) -> float:
    """Seconds since some moment, read once the device has done all that it was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
