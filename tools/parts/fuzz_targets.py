"""Part of `fuzz.py`: options, devices, pins and strategy files, as targets."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from moe_beyond.cache.misses import MISSES
from moe_beyond.cache.policies import POLICIES
from moe_beyond.cache.pools import pool_capacities
from moe_beyond.cache.prefetchers.registry import PREFETCHERS, SYNTAX, parse_prefetch
from moe_beyond.download import parse_hub_name
from moe_beyond.evaluation.named_strategies import STRATEGIES, strategy_names
from moe_beyond.evaluation.options import SCOPES
from moe_beyond.evaluation.pin_formats import whole_layers
from moe_beyond.evaluation.pins import read_pins
from moe_beyond.evaluation.strategy_file import read_strategy
from moe_beyond.geometry import Geometry, parse_budget
from moe_beyond.lookahead import NAMED_LOOKAHEADS, parse_lookahead
from moe_beyond.safe_text import UNPRINTABLE
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.computing import resident_seconds
from moe_beyond.simulator.devices import DEVICES, Device, device_slots, flash_seconds, load_device, transfer_seconds
from moe_beyond.traces.splits import held_out_numbers, parse_blocks
from parts.fuzz_mutations import edited_bytes, edited_json, edited_text, json_bytes, several
from parts.fuzz_seeds import DEVICE_FILES, LARGE, MIXED, PIN_FILES, SETTINGS, SMALL, STRATEGY_FILES

OPTION_WORDS = (
    "policy", "prefetch", "lookahead", "scope", "quotas", "miss", "budget", "device", "strategy", "--", "slots",
)  # fmt: skip
"""Words of which an error about an option of a replay has one."""


@dataclass(frozen=True)
class Target:
    """A reader of user input.

    Attributes:
        make: Function that returns an input: a text, or the path of a file in an empty folder that it is given.
        read: Function that reads an input with the package; returns a description of nonsense that was accepted, or
            None.
        names: Texts of which an error must have one (default: the name of the folder).
        weight: Share of the cases, compared with other targets (default: 1).
    """

    make: Callable[[Random, Path], Any]
    read: Callable[[Any], str | None]
    names: tuple[str, ...] = ()
    weight: float = 1.0


def texts(seeds: tuple[str, ...], words: tuple[str, ...] = ()) -> Callable[[Random, Path], str]:
    """Return a function that makes changed texts."""
    return lambda chance, folder: several(
        lambda text, _: edited_text(text, chance, words), chance.choice(seeds), chance
    )


def json_files(seeds: tuple[Any, ...]) -> Callable[[Random, Path], Path]:
    """Return a function that writes changed JSON values into a file."""

    def make(chance: Random, folder: Path) -> Path:
        path = folder / "input.json"
        path.write_bytes(json_bytes(chance.choice(seeds), chance))
        return path

    return make


# Options.


def make_budget(chance: Random, folder: Path) -> tuple[str, Geometry]:
    """Return a changed budget, and a model."""
    geometry, seeds = chance.choice(
        (
            (LARGE, ("10%", "166", "2.9GB", "2.7GiB", "50 %", "0.1", "100%")),
            (MIXED, ("8", "50%", "999B", "1KiB", "100%")),
            (SMALL, ("24", "5KB", "30%", "20000B")),
        )
    )
    return texts(seeds, ("%", "GB", "KiB", "B", "MB"))(chance, folder), geometry


def read_budget(given: tuple[str, Geometry]) -> str | None:
    """Parse a budget of a model."""
    text, geometry = given
    budget = parse_budget(text, geometry)
    sane = 1 <= budget.slots <= geometry.total_experts and (budget.bytes is None or budget.bytes > 0)
    return None if sane else f"{budget} for {geometry.model}"


def device_fault(device: Device) -> str | None:
    """Return a description of a device whose times or sizes are no numbers."""
    times = [transfer_seconds(device, 1e6), flash_seconds(device, 1e6), resident_seconds(device, LARGE, 16.0, 100)]
    if not all(math.isfinite(time) and time >= 0 for time in times):
        return f"times {times}"
    json.dumps(device.to_json(), allow_nan=False)
    return None if device_slots(device, LARGE, 16.0) >= 0 else "negative slots"


def make_device_file(chance: Random, folder: Path) -> str:
    """Write a device file; return its path, sometimes with changed fields."""
    path = folder / "box.json"
    path.write_bytes(json_bytes(chance.choice(DEVICE_FILES), chance))
    if chance.random() < 0.8:
        return str(path)
    change = several(edited_text, chance.choice(("link_gb_per_s=12", "name=box", "tflops=3,overlap=0")), chance)
    return f"{path},{change}"


def make_settings(chance: Random, folder: Path) -> dict[str, str]:
    """Return the options of a replay as texts, one of which is changed."""
    options = {
        "policy": chance.choice(tuple(POLICIES)),
        "scope": chance.choice(SCOPES),
        "budget": chance.choice(("50%", "8", "100%", "30KB")),
        "strategy": chance.choice(tuple(STRATEGIES)),
        **chance.choice(SETTINGS),
    }
    words = tuple(chance.choice(values) for values in (tuple(POLICIES), SYNTAX, tuple(STRATEGIES), tuple(MISSES)))

    def edit(options: dict[str, str], _: Random) -> dict[str, str]:
        name = chance.choice(tuple(options))
        return {**options, name: edited_text(options[name], chance, words)}

    return several(edit, options, chance)


def read_settings(options: dict[str, str]) -> str | None:
    """Build the settings of a replay, its pools and its prefetcher."""
    strategy_names([options["strategy"]])
    lookaheads = tuple(parse_lookahead(text) for text in options["lookaheads"].split(",") if text)
    settings = ReplaySettings(
        parse_budget(options["budget"], SMALL).slots,
        policy=options["policy"],
        prefetch=options["prefetch"],
        lookahead=parse_lookahead(options["lookahead"]) if lookaheads else None,
        lookaheads=lookaheads,
        misses=options["misses"],
        scope=options["scope"],
        device=load_device(options["device"]) if options["device"] else None,
    )
    settings.check_sizes(SMALL)
    prefetch = settings.prefetch_settings(SMALL)
    pools = pool_capacities(SMALL, settings.slots, settings.scope)
    if not 0 <= prefetch.max_experts <= SMALL.num_experts or pools.sum() > settings.slots or prefetch.distance < -1:
        return f"{prefetch}, pools {pools}"
    return None


def read_prefetch(text: str) -> str | None:
    """Parse a prefetcher."""
    prefetch = parse_prefetch(text)
    return None if prefetch.threshold <= 1 and prefetch.prefetcher in PREFETCHERS.values() else str(prefetch)


def read_lookahead(text: str) -> str | None:
    """Parse a lookahead."""
    lookahead = parse_lookahead(text)
    return None if lookahead in NAMED_LOOKAHEADS or (isinstance(lookahead, int) and lookahead >= 0) else "no lookahead"


def read_blocks(text: str) -> str | None:
    """Parse blocks of validation, and choose from ten sequences."""
    chosen = held_out_numbers(dict.fromkeys(range(10), 7), *parse_blocks(text))
    return None if 0 < len(chosen) < 10 else f"{len(chosen)} of 10 sequences"


def read_hub_name(text: str) -> str | None:
    """Parse a name on the Hub."""
    name = parse_hub_name(text)
    return "unprintable" if UNPRINTABLE.search(f"{name.repository}{name.revision}") else None


def make_strategy_file(chance: Random, folder: Path) -> Path:
    """Write a strategy file."""
    content = yaml.safe_dump(several(edited_json, chance.choice(STRATEGY_FILES), chance), allow_unicode=True)
    path = folder / "strategy.yaml"
    written = content.encode("utf-8", "replace")
    path.write_bytes(edited_bytes(written, chance) if chance.random() < 0.3 else written)
    return path


def read_strategy_file(path: Path) -> str | None:
    """Read a strategy file and build the settings that it gives."""
    choice = read_strategy(path)
    if choice.lookahead is not None:
        parse_lookahead(choice.lookahead)
    parse_prefetch(choice.prefetch)
    slots = parse_budget(choice.budget, SMALL).slots
    ReplaySettings(slots, policy=choice.policy, scope=choice.scope, misses=choice.misses, device=DEVICES["rtx3060"])
    return None


def make_pin_file(chance: Random, folder: Path) -> Path:
    """Write a file of experts to pin."""
    path = folder / "pins.json"
    path.write_bytes(json_bytes(chance.choice(PIN_FILES), chance))
    return path


def read_pin_file(path: Path) -> str | None:
    """Read experts to pin, and choose whole layers."""
    pins = read_pins(path)
    sizes = dict(zip(map(int, pins.layers), pins.expert_bytes or [1] * len(pins.layers), strict=True))
    pinned = sum(size * len(experts) for size, experts in zip(sizes.values(), pins.layers.values(), strict=True))
    taken = sum(sizes[layer] * pins.num_experts for layer in whole_layers(pins))
    return None if taken <= pinned and pins.experts <= pins.num_experts * len(pins.layers) else f"{taken} of {pinned}"


TARGETS: dict[str, Target] = {
    "budgets": Target(make_budget, read_budget, ("budget",), 3),
    "devices": Target(
        texts((*DEVICES, "rtx3060,link_gb_per_s=12.5", "m4-max,tflops=3,name=mine", "rtx4090,overlap=0.5,layer_us=3"),
              (*Device.__dataclass_fields__, ",", "=")),
        lambda text: device_fault(load_device(text)), ("device",), 3,
    ),
    "device files": Target(make_device_file, lambda text: device_fault(load_device(text)), ("box.json", "device"), 2),
    "prefetchers": Target(texts(SYNTAX, ("top", "p>", "@2", "adaptive", ",")), read_prefetch, ("prefetch",), 3),
    "lookaheads": Target(texts((*NAMED_LOOKAHEADS, "1", "0", "12")), read_lookahead, ("lookahead",), 2),
    "blocks of validation": Target(texts(("1:2", "2:3", "3:2")), read_blocks, ("--val-blocks",), 2),
    "names on the Hub": Target(texts(("hf:org/repo", "hf:org/repo@v1", "hf:a-b/c.d@1f")), read_hub_name, ("hf:",), 2),
    "settings": Target(make_settings, read_settings, OPTION_WORDS, 3),
    "pins": Target(make_pin_file, read_pin_file, ("pins.json",), 1),
    "strategy files": Target(make_strategy_file, read_strategy_file, ("strategy.yaml", *OPTION_WORDS), 1),
}  # fmt: skip
