"""A recorder in a Transformers `Trainer`."""

from typing import Any

from fisherfunc.surface.recorder import SpectrumRecorder


def trainer_callback(recorder: SpectrumRecorder) -> Any:
    """A `TrainerCallback` that records before the first step and after every `recorder.every`-th optimiser step.

    Gradient accumulation counts as one step. In a run of several processes the first alone records.

    Args:
        recorder: What records, and keeps the results.

    Returns:
        What `Trainer(callbacks=[…])` takes.

    Raises:
        ImportError: If Transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(
            f'trainer_callback needs Transformers ({error}); install it with pip install "fisherfunc[train]"'
        ) from error

    class Recording(TrainerCallback):
        """The recorder at the events of training."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Before the first step, of a new run or of one that goes on."""
            _record(state, kwargs["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """After an optimiser step."""
            _record(state, kwargs["model"])

    def _record(state: Any, model: Any) -> None:
        if state.is_world_process_zero:
            recorder(model, state.global_step)

    return Recording()
