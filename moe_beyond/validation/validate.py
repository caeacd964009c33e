"""Comparing a recording with its replay, on a device that is fitted to one half of its tokens."""

from dataclasses import dataclass, replace
from pathlib import Path

from moe_beyond.errors import UserError
from moe_beyond.runtime.options import RUN_FILE
from moe_beyond.runtime.records.as_run import ReplayAsRun, replay_as_run
from moe_beyond.runtime.records.recording import read_recording
from moe_beyond.simulator.devices import Device
from moe_beyond.traces.reader import TraceSet
from moe_beyond.validation.comparison import Validation, compare_counts, compare_times
from moe_beyond.validation.fit import fit_device, halves
from moe_beyond.validation.forecast import forecast
from moe_beyond.validation.measured import Measured
from moe_beyond.validation.measured_engine import EngineOptions, measured_engine
from moe_beyond.validation.measured_run import measured_run

ENGINE_POLICY = "lru"


@dataclass(frozen=True)
class ValidationOptions:
    """Options of a validation.

    Attributes:
        policy: Policy of a foreign engine (default: ``"lru"``); None for a run, which names its own.
        budget: Budget of a foreign engine (default: that of its log); None for a run.
        predictor: Predictor of a run, if its name is not found (default: None).
        profile: Usage profile of a run, if its name is not found (default: None).
        device: Device to judge (default: None, one that is fitted to the first half of the generated tokens).
    """

    policy: str | None = None
    budget: str | None = None
    predictor: str | None = None
    profile: str | None = None
    device: Device | None = None


def validate(folder: str | Path, options: ValidationOptions) -> Validation:
    """Compare a recording with its replay.

    Args:
        folder: Folder of ``moe-beyond run --trace``, or of ``moe-beyond import route-trace`` with metrics.
        options: Options of the validation.

    Returns:
        Comparison, whose times are those of the second half of the generated tokens.

    Raises:
        UserError: The folder has no telemetry and no log of an engine, they belong to other traces, an option does not
            go with it, or there are too few tokens.
    """
    as_run = None
    if (Path(folder) / RUN_FILE).is_file():
        if given := [name for name in ("policy", "budget") if getattr(options, name) is not None]:
            raise UserError(f"--{given[0]}: {folder} is a run, which names its own; leave the option out")
        recording = read_recording(folder)
        named = {name: text for name in ("predictor", "profile") if (text := getattr(options, name)) is not None}
        recording = replace(recording, options=replace(recording.options, **named))
        measured = measured_run(recording)
        as_run = replay_as_run(recording)
    else:
        engine = EngineOptions(options.policy or ENGINE_POLICY, options.budget)
        measured = measured_engine(TraceSet(str(folder)), engine)
    return compare(measured, options.device, as_run)


def compare(measured: Measured, device: Device | None = None, as_run: ReplayAsRun | None = None) -> Validation:
    """Compare measurements with their replay.

    Args:
        measured: Measurements of a recording.
        device: Device to judge (default: None, one that is fitted to the first half of the generated tokens).
        as_run: Comparison of a run's events (default: None).

    Raises:
        UserError: There are too few tokens.
    """
    fitted_on, judged = halves(measured)
    upkeep, tokens = dict[str, float](), 0
    if device is None:
        fit = fit_device(measured, fitted_on)
        device, upkeep, tokens = fit.device, dict(fit.upkeep), fit.tokens
    found = forecast(measured, device, upkeep)
    return Validation(
        measured, found, device, tokens, as_run, compare_counts(measured, found),
        compare_times(measured, found, judged), judged,
    )  # fmt: skip
