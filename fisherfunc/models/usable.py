"""What is found out of a loaded language model before any pass: finite weights, and a decoder that knows its start."""

from collections.abc import Iterator
from typing import Any

import torch


def check_finite(model: Any, name: str) -> None:
    """Raise where a weight is not finite. Cost: every weight is read once.

    Raises:
        ValueError: It names the first tensor, and how many of its values are not finite.
    """
    wrong = list(_not_finite(model))
    if wrong:
        others = f", and so do {len(wrong) - 1} other tensor(s)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{name}: {wrong[0]}{others}; the training diverged, or the file is damaged: give an earlier checkpoint"
        )


def _not_finite(model: Any) -> Iterator[str]:
    for name, tensor in model.named_parameters():
        finite = tensor.detach().isfinite()
        if not finite.all():
            kinds = " and ".join(
                kind
                for kind, found in (("NaN", tensor.detach().isnan()), ("infinity", tensor.detach().isinf()))
                if found.any()
            )
            yield f"{name} holds {kinds} ({int((~finite).sum())} of {tensor.numel()} values)"


def check_decoder_start(model: Any, name: str) -> None:
    """Raise where a sequence-to-sequence model cannot make the inputs of its decoder from targets.

    Raises:
        ValueError: It says what its config.json lacks.
    """
    shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shifted is None:
        return
    try:
        shifted(labels=torch.zeros((1, 2), dtype=torch.long, device=model.device))
    except (
        AttributeError,
        TypeError,
        ValueError,
        AssertionError,
        RuntimeError,
    ) as error:  # as Transformers' models say it
        settings = {key: getattr(model.config, key, None) for key in ("decoder_start_token_id", "pad_token_id")}
        lacking = " and ".join(key for key, value in settings.items() if value is None) or "what it needs for that"
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name}: its decoder has nothing to start from, as its config.json lacks {lacking} ({reason}); add it "
            "there (T5 starts with pad_token_id, 0)"
        ) from error
