"""What dtypes are called in results."""

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """The name without its module.

    Example:
        >>> dtype_name(torch.float64)
        'float64'
    """
    return str(dtype).removeprefix("torch.")
