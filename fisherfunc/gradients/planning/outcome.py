"""What a run took: seconds, and the peak of memory as far as it can be had without changing anything.

The peak of a process only grows, and resetting it would be felt by others. So it is known where this run raised it:
then the peak is the run's own. Where it did not, an earlier run of the process needed more, and this one's is unknown.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fisherfunc.runtime.clock import clock

_STATUS = Path("/proc/self/status")


def watched(device: torch.device) -> Callable[[], dict[str, Any]]:
    """Start to watch; what is returned gives the outcome so far.

    `{"seconds", "peak_bytes"}`: the peak beyond what was in use at the start, of the process (on Linux) or of the CUDA
    device's allocator; None where it is unknown.
    """
    begin, (used, peak) = clock(device), _memory(device)

    def outcome() -> dict[str, Any]:
        _, highest = _memory(device)
        grew = None not in (used, peak, highest) and highest > peak
        return {"seconds": clock(device) - begin, "peak_bytes": highest - used if grew else None}

    return outcome


def _memory(device: torch.device) -> tuple[Any, Any]:
    """Bytes in use, and the most that ever were."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return None, None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return tuple(int(lines[key].split()[0]) * 1024 if key in lines else None for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
