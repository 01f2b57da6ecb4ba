"""The spectrum along training: a result every so many steps on one probe batch, which training does not notice.

    record = SpectrumRecorder(batch, every=100, folder="run")
    for step in range(num_steps):
        record(model, step)
        ...

The folder then holds `step-00000000/spectrum.json`, `step-00000100/spectrum.json` …; `fisherfunc compare` reads them.
"""

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fisherfunc.gradients.planning.made_for import PlanMismatchError
from fisherfunc.gradients.planning.run_plan import RunPlan
from fisherfunc.models.unwrap import unwrapped
from fisherfunc.pipeline.fisher import fisher_spectrum
from fisherfunc.pipeline.plan import plan
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.records.axes import Batch
from fisherfunc.runtime.undisturbed import undisturbed
from fisherfunc.surface.files import JSON_NAME, check_writable, read_spectrum, to_json, write_files
from fisherfunc.surface.jobs.run_file import RUN_NAME, run_toml

EXPECTED = (ValueError, TypeError, KeyError, RuntimeError, OSError)
FOLDER_OF_A_STEP = re.compile(r"step-(\d+)")


class SpectrumRecorder:
    """`record(model, step)`: the spectrum on a probe batch at every `every`-th step, kept in `record.results`.

    Training goes on to the same bits as without it: random generators, weights, `.grad`, mode and `requires_grad` are
    after a call what they were before, anywhere in a step. Data parallelism and `torch.compile` are seen through, and
    mixed precision is off: gradients are taken in the dtype of the weights, in evaluation mode. In a run of several
    processes, call it in one. Cost: `fisher_spectrum`, each time; what it discovers of the model is discovered at the
    first step (`ff.plan`), and again where the model has changed its shapes, or a check has failed.

    Args:
        batch: The probe: the same tokens each time, so that results compare.
        every: The distance of recorded steps; step 0 is one of them.
        folder: Where each result is written as soon as it is there, as `step-…/spectrum.json`; nowhere where None.
        on_error: Called as `on_error(step, error)` where a spectrum fails, and training goes on without it; where None
            the error is raised, with the step.
        **options: Of `fisher_spectrum`.

    Raises:
        ValueError: If `every` is not positive, or an option makes no sense along training.
        TypeError: If `fisher_spectrum` has no such option.
        OSError: If the folder cannot be written.

    Example:
        >>> import torch
        >>> model, probe = nn.Linear(2, 3), (torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]))
        >>> record = SpectrumRecorder(probe, every=2)
        >>> [record(model, step) is None for step in range(3)], list(record.results)
        ([False, True, False], [0, 2])
    """

    def __init__(
        self,
        batch: Batch,
        *,
        every: int = 1,
        folder: str | os.PathLike[str] | None = None,
        on_error: Callable[[int, Exception], None] | None = None,
        **options: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"every expected a number of steps of at least 1, got every={every}")
        if options.get("checkpoint") is not None:
            raise ValueError("checkpoint= is the folder of one pass, and each step is another; leave it out")
        inspect.signature(fisher_spectrum).bind(None, batch, **options)
        if folder is not None:
            check_writable(folder)
        self.batch, self.every, self.options, self.on_error = batch, every, options, on_error
        self.folder = None if folder is None else Path(folder)
        self.results: dict[int, FisherSpectrum] = {}
        self._plan: RunPlan | None = None

    def __call__(self, model: nn.Module, step: int) -> FisherSpectrum | None:
        """The spectrum where the step is to be recorded, else None. A step recorded again replaces its result.

        Args:
            model: As the training loop has it; it is left as it was.
            step: The number of optimiser steps done.

        Raises:
            ValueError: If the step is no count.
            RuntimeError: If the spectrum, or its file, fails and there is no `on_error`; it says at which step and why.
        """
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step expected a count of optimiser steps, got {step!r}")
        if step % self.every:
            return None
        try:
            result = self._spectrum(model, step)
            if self.folder is not None:
                folder = self.folder / f"step-{step:08d}"
                run = run_toml(None, {}, result.provenance, out=str(folder), eigenvalues=None)
                write_files(folder, {JSON_NAME: to_json(result), RUN_NAME: run})
        except EXPECTED as error:
            if self.on_error is None:
                raise RuntimeError(f"the spectrum at step {step} failed: {error}") from error
            self.on_error(step, error)
            return None
        self.results[step] = result
        return result

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> dict[int, FisherSpectrum]:
        """The results {step: spectrum} that a recorder wrote into a folder, in the order of steps.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If a file is damaged.
        """
        found = {
            int(match[1]): path
            for path in Path(folder).glob("step-*")
            if (match := FOLDER_OF_A_STEP.fullmatch(path.name))
        }
        if not found:
            raise FileNotFoundError(f"no step-…/{JSON_NAME} in {folder}; give the folder of a SpectrumRecorder")
        return {step: read_spectrum(found[step]) for step in sorted(found)}

    def _spectrum(self, model: nn.Module, step: int) -> FisherSpectrum:
        inner = unwrapped(model)
        device = next((p.device for p in inner.parameters()), None)
        if device is None:
            raise ValueError(f"{type(inner).__name__} has no parameter to differentiate by")
        with undisturbed(device):
            result = self._passed(inner)
        return replace(result, provenance=replace(result.provenance, step=step))

    def _passed(self, model: nn.Module) -> FisherSpectrum:
        if self.options.get("plan") is not None:
            return fisher_spectrum(model, self.batch, **self.options)
        options = {name: value for name, value in self.options.items() if name != "plan"}
        self._plan = self._plan or plan(model, self.batch, calibrate=False, **options)
        try:
            result = fisher_spectrum(model, self.batch, plan=self._plan, **options)
        except PlanMismatchError:  # a layer that was added, say
            self._plan = plan(model, self.batch, calibrate=False, **options)
            result = fisher_spectrum(model, self.batch, plan=self._plan, **options)
        facts = result.provenance
        if (facts.route, facts.given_up or {}) != (self._plan.route, self._plan.given_up):
            self._plan = None  # what it exploits is not what the model is now: another look at the next step
        return result
