"""Recipes: YAML files that define a study by arms, seeds and tests, and the cells they expand to. Imports no torch.

```yaml
baseline: grpo                     # the arm that all others are compared to
seeds: [0, 1, 2]                   # train.seed; every arm is run once per seed, or with its first seeds only
settings: {...}                    # for every run, as in configs/
arms:
  zero_shot: {verb: none}          # evaluate the model without training
  grpo: {verb: train, settings: {...}, published: 58.04}
  warm_up: {verb: sft, once: true} # trained with the first seed only; a start for other arms
  staged: {verb: train, from: warm_up}
  small: {verb: build, size: small}  # a phantom model of another size, which medvqa-rl phantom build trains; a start
tests:
  home: {data: {scanner: home}}    # settings applied when the test split is evaluated
primary: home                      # the test whose table shows the published figures; defaults to the first
contrasts: [...]                   # two tests of the same questions, or two arms, compared; see contrasts.py
tables: [...]                      # the paper's tables, see factors.py
trends: [...]                      # measures against a number that arms differ in, see trends.py
quick: {seeds: [0], settings: {...}, arms: {...}, tests: {...}}
forecast: {seconds_per_step: {train: 0.6, sft: 0.5}, seconds_per_question: 0.05, seconds_per_start: 10}
```

A cell is one arm with one seed: an ordinary run directory. Its name ends in a hash of its settings (names.py), so a
changed recipe gets new folders for the cells that changed and keeps those of the rest. The hash excludes evaluation
settings if nothing is evaluated during training, and includes the name of the cell that this one starts from, hence
all settings behind it. An arm's own ``data`` settings apply to its training only; tests use the recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from medvqa_rl.config import Config, ConfigError, EvalConfig, ModelConfig, Purpose
from medvqa_rl.config.schema import did_you_mean
from medvqa_rl.config.yaml import build_config, merge, parse_override, read_file
from medvqa_rl.core.embedded import SIZES
from medvqa_rl.core.files import checkpoint_folder
from medvqa_rl.core.text import shown
from medvqa_rl.study.plan.arms import Arm, Verb, read_arms, with_starts
from medvqa_rl.study.plan.checks import check_folder_name, check_keys, check_name, overlay, section
from medvqa_rl.study.plan.contrasts import Contrast, read_contrasts
from medvqa_rl.study.plan.factors import FactorTable, read_tables
from medvqa_rl.study.plan.leaks import Pair, check_names
from medvqa_rl.study.plan.names import check_made, settings_hash
from medvqa_rl.study.plan.traces import check_traces
from medvqa_rl.study.plan.trends import Trend, read_trends

_PURPOSES: dict[Verb, Purpose] = {"none": "eval", "build": "eval", "train": "train", "sft": "sft"}
_KEYS = (
    *("baseline", "seeds", "settings", "arms", "tests", "primary", "contrasts", "tables"),
    *("trends", "quick", "forecast", "title", "note"),
)
_FORECAST_KEYS = ("seconds_per_step", "seconds_per_question", "seconds_per_start", "seconds_per_build")


@dataclass(frozen=True)
class Test:
    """One evaluation of a cell."""

    __test__ = False  # for pytest, which takes the name for a test

    name: str
    config: Config
    folder: Path


@dataclass(frozen=True, eq=False)
class Cell:
    """One arm with one seed."""

    arm: Arm
    seed: int
    config: Config
    folder: Path
    tests: tuple[Test, ...]
    start: Cell | None
    """The cell whose last checkpoint it starts from, or evaluates if untrained; None uses the configured model."""

    @property
    def label(self) -> str:
        return self.arm.name if self.arm.once else f"{self.arm.name}, seed {self.seed}"

    @property
    def starts(self) -> list[Cell]:
        """All cells that have to be trained before this one, nearest first."""
        return [] if self.start is None else [self.start, *self.start.starts]

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint of its training, whose choice no evaluation influenced. An untrained cell has that of
        its start; None is the configured model."""
        if self.arm.verb == "none":
            return None if self.start is None else self.start.checkpoint
        if self.arm.verb == "build":
            return self.folder / "instruct"
        return checkpoint_folder(self.folder, self.config.train.steps)


@dataclass(frozen=True)
class Forecast:
    """Durations to assume until finished cells provide measured ones."""

    seconds_per_step: Mapping[str, float]
    """By verb, or by arm."""
    seconds_per_question: float
    seconds_per_start: float
    seconds_per_build: Mapping[str, float]
    """By size."""


@dataclass(frozen=True)
class Recipe:
    """A validated recipe."""

    name: str
    title: str
    note: str
    """Remark on the published figures."""
    baseline: str
    seeds: tuple[int, ...]
    tests: tuple[str, ...]
    primary: str
    """The test that the paper's tables show."""
    contrasts: tuple[Contrast, ...]
    tables: tuple[FactorTable, ...]
    trends: tuple[Trend, ...]
    forecast: Forecast
    cells: tuple[Cell, ...]

    @property
    def arms(self) -> tuple[Arm, ...]:
        """In the order of the recipe."""
        return tuple({cell.arm.name: cell.arm for cell in self.cells}.values())

    @property
    def pairs(self) -> list[Pair]:
        """The training and test data of every trained cell. All cells have the same tests, so the training data of a
        start, itself a cell, is compared with the tests of every cell that starts from it."""
        return [
            Pair(cell.arm.name, cell.config.data, test.name, test.config.data)
            for cell in self.cells
            if cell.arm.is_run
            for test in cell.tests
        ]


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, given its path or the name of a shipped one.

    Raises:
        ValueError: there is no such recipe.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = Path(str(files("medvqa_rl.study"))) / "recipes"
    known = sorted(path.stem for path in shipped.glob("*.yaml"))
    if name in known:
        return shipped / f"{name}.yaml"
    raise ValueError(
        f"There is no recipe {name}: give the path of a YAML file or one of {', '.join(known)}"
        + (did_you_mean(name, known) or ".")
    )


def read_recipe(
    path: Path, output: Path, *, quick: bool = False, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> Recipe:
    """Read a recipe and check every cell of it before anything starts.

    Args:
        path: the YAML file.
        output: folder of the study, which holds the cells.
        quick: apply the seeds, settings, arms and tests under ``quick``.
        overrides: ``key=value`` settings of every run; ``tests.NAME.key=value`` of one test, ``tests.NAME=null``
            leaves it out.
        only: names of arms, to which the baseline and the arms that they start from are added; defaults to all.

    Raises:
        ValueError: the recipe is invalid; the message is one sentence.
    """
    given = read_file(path)
    where = f"The recipe {path}"
    check_keys(where, given, _KEYS)
    small = section(where, "quick", given.get("quick")) if quick else {}
    check_keys(f"{where} under quick", small, ("seeds", "settings", "arms", "tests"))
    named = section(where, "arms", given.get("arms"))
    small_arms = section(where, "quick.arms", small.get("arms"))
    for name in small_arms:
        check_name(f"{where} under quick", "arm", name, named)
    arms = read_arms(where, overlay(named, small_arms))
    for name in only:
        check_name("--arms", "arm", name, arms)
    baseline = given.get("baseline")
    if not isinstance(baseline, str) or baseline not in arms:
        raise ValueError(f"{where} has baseline {shown(baseline)}, but must name one of its arms: {', '.join(arms)}.")
    seeds = _seeds(where, small.get("seeds", given.get("seeds")))

    of_tests = [text for text in overrides if _key(text).startswith("tests.")]
    base = overlay(
        section(where, "settings", given.get("settings")), section(where, "quick.settings", small.get("settings"))
    )
    base = merge(base, [parse_override(text) for text in overrides if text not in of_tests])
    tests = section(where, "tests", given.get("tests"))
    if not tests:
        raise ValueError(f"{where} has no tests: name at least one, such as tests: {{home: {{}}}}.")
    for name in tests:
        check_folder_name(where, "a test", name)
    small_tests = section(where, "quick.tests", small.get("tests"))
    tests = {name: overlay(section(where, f"tests.{name}", settings), small_tests) for name, settings in tests.items()}
    contrasts = read_contrasts(where, given.get("contrasts"), tests, arms)
    trends = read_trends(
        where, given.get("trends"), list(arms), list(tests), str(given.get("primary", next(iter(tests))))
    )
    tests = _override_tests(where, tests, of_tests)
    for name, test in tests.items():
        _check_path(where, name, base, test)
    primary = given.get("primary", next(iter(tests)))
    if not isinstance(primary, str) or primary not in tests:
        raise ValueError(f"{where} has primary {shown(primary)}, but must name one of its tests: {', '.join(tests)}.")

    made: dict[tuple[str, int], Cell] = {}

    def cell(arm: Arm, seed: int) -> Cell:
        seed = seeds[0] if arm.once else seed
        if (arm.name, seed) not in made:
            start = None if arm.start is None else cell(arms[arm.start], seed)
            made[arm.name, seed] = _cell(where, output, arm, seed, base, tests, start)
        return made[arm.name, seed]

    chosen = with_starts([*only, baseline], arms) if only else set(arms)
    recipe = Recipe(
        name=path.stem,
        title=str(given.get("title", path.stem)),
        note=str(given.get("note", "")),
        baseline=baseline,
        seeds=seeds,
        tests=tuple(tests),
        primary=primary,
        contrasts=tuple(one for one in contrasts if {one.of, one.minus} <= (chosen if one.of_arms else tests.keys())),
        tables=read_tables(where, given.get("tables"), list(arms)),
        trends=trends,
        forecast=_forecast(where, given.get("forecast")),
        cells=tuple(cell(arm, seed) for arm in arms.values() if arm.name in chosen for seed in arm.own(seeds)),
    )
    for one in recipe.cells:
        _check_results(one)
    for one in {(one.arm.name, one.config.data): one for one in recipe.cells if one.arm.traces}.values():
        check_traces(f"{where}, arm {one.arm.name},", one.arm.traces or 0, one.config)
    check_names(recipe.pairs)
    return recipe


def _seeds(where: str, given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or not given or not all(type(seed) is int for seed in given):
        raise ValueError(
            f"{where} has seeds {shown(given)}, but must have a list of whole numbers, such as [0, 1, 2]."
        )
    if len(set(given)) < len(given):
        raise ValueError(f"{where} names a seed twice in {given}, but each seed is one run: name it once.")
    return tuple(given)


def _check_results(cell: Cell) -> None:
    """Raise ValueError if the cell's folders hold results of other settings."""
    unused = () if cell.config.train.eval_steps else ("eval", "eval_judge")
    # The start is part of the name already; its path may be spelled differently from another working directory.
    origin = ("model.path", "model.adapter") if cell.start else ()
    run = cell.folder / "config.resolved.json"
    check_made(cell.label, cell.folder, run, (), cell.config, ignore=(*unused, *origin))
    for test in cell.tests:
        what = f"{cell.label}, test {test.name}"
        check_made(what, test.folder, test.folder / "results.json", ("config",), test.config, ignore=origin)


def _key(override: str) -> str:
    return override.partition("=")[0].strip().removeprefix("--")


def _override_tests(
    where: str, tests: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]
) -> dict[str, Mapping[str, Any]]:
    """Apply ``tests.NAME.key=value``, and remove the tests given as ``tests.NAME=null``."""
    result = dict(tests)
    for text in overrides:
        name, _, key = _key(text).removeprefix("tests.").partition(".")
        check_name(f"The override '{text}'", "test", name, tests)
        value = text.partition("=")[2]
        if key:
            result[name] = merge(result.get(name, tests[name]), [parse_override(f"{key}={value}")])
        elif value.strip() != "null":
            raise ValueError(
                f"The override '{text}' is neither a setting of the test, such as tests.{name}.data.path=FOLDER, nor "
                f"tests.{name}=null, which leaves it out."
            )
        else:
            result.pop(name, None)
    if not result:
        raise ValueError(f"{where} has no test left: leave at least one of {', '.join(tests)} in.")
    return result


def _check_path(where: str, name: str, base: Mapping[str, Any], test: Mapping[str, Any]) -> None:
    """Raise ValueError if a test's own data set has no path; the message names the override that sets it."""
    own = test.get("data")
    if not isinstance(own, dict) or own.get("name", "phantom") == "phantom":
        return
    data = overlay(base, test)["data"]
    if data.get("path") is None and data.get("hub") is None:
        raise ValueError(
            f"{where} tests on {name} (data.name {own['name']}), whose folder is not given: add "
            f"tests.{name}.data.path=FOLDER, or leave the test out with tests.{name}=null."
        )


def _forecast(where: str, given: Any) -> Forecast:
    stated = section(where, "forecast", given)
    check_keys(f"{where} under forecast", stated, _FORECAST_KEYS)
    rates = {"train": 1.0, "sft": 1.0} | section(where, "forecast.seconds_per_step", stated.get("seconds_per_step"))
    question, start = stated.get("seconds_per_question", 0.1), stated.get("seconds_per_start", 10.0)
    builds = dict.fromkeys(SIZES, 0.0) | section(where, "forecast.seconds_per_build", stated.get("seconds_per_build"))
    check_keys(f"{where} under forecast.seconds_per_build", builds, SIZES)
    for rate in (*rates.values(), question, start, *builds.values()):
        if type(rate) not in (int, float) or rate < 0:
            raise ValueError(f"{where} forecasts {shown(rate)} seconds, but must forecast a number of at least 0.")
    return Forecast(rates, question, start, builds)


def _build(where: str, settings: Mapping[str, Any], purpose: Purpose) -> Config:
    try:
        return build_config(settings, purpose=purpose)
    except ConfigError as error:
        raise ConfigError([f"{where}: {problem}" for problem in error.problems]) from None


def _cell(
    where: str,
    output: Path,
    arm: Arm,
    seed: int,
    base: Mapping[str, Any],
    tests: Mapping[str, Mapping[str, Any]],
    start: Cell | None,
) -> Cell:
    settings = arm.settings_of(base, seed)
    config = _build(f"{where}, arm {arm.name}", settings, _PURPOSES[arm.verb])
    if not config.train.eval_steps:
        # Tests do not affect training, so changing their settings must not rename the cell and train it again.
        config = config.model_copy(update={"eval": EvalConfig(), "eval_judge": None})
    after = "" if start is None else f"{start.arm.name}/{start.folder.name}"
    # What is built depends on the size only, and takes too long to be repeated when other settings change.
    folder = output / arm.name / (arm.size or f"seed{seed}-{settings_hash(config, after)}")

    def with_folder(config: Config) -> Config:
        model = config.model if start is None else _starting(config.model, start)
        return config.model_copy(update={"output_dir": str(folder), "model": model})

    made = []
    test_settings = settings | {"data": base.get("data") or {}}
    for name, change in tests.items():
        test = _build(f"{where}, arm {arm.name}, test {name}", overlay(test_settings, change), "eval")
        made.append(Test(name, with_folder(test), folder / "eval" / f"{name}-{settings_hash(test, after)}"))
    return Cell(arm, seed, with_folder(config), folder, tuple(made), start)


def _starting(model: ModelConfig, start: Cell) -> ModelConfig:
    """Model settings that load a cell's last checkpoint: a whole model, or an adapter on that cell's base model."""
    before = start.config.model
    if before.lora is None and before.adapter is None:
        return model.model_copy(update={"path": str(start.checkpoint), "revision": None, "adapter": None})
    origin = {"path": before.path, "revision": before.revision}
    return model.model_copy(update={**origin, "adapter": str(start.checkpoint)})
