"""What a study is: a YAML recipe of arms, seeds and test sets, and the cells that follow from it. Imports no torch.

```yaml
baseline: grpo                     # the arm that all others are compared with
seeds: [0, 1, 2]                   # each is train.seed of one run of every arm
settings: {...}                    # of every run, as in configs/
arms:
  zero_shot: {verb: none}          # the model as it is
  grpo: {verb: train, settings: {...}, published: 58.04}
  warm_up: {verb: sft, once: true} # trained with the first seed only, for others to start from
  staged: {verb: train, from: warm_up}
tests:
  home: {data: {scanner: home}}    # settings put on top when the test split is evaluated
primary: home                      # the test whose table shows the published figures; without it, the first
contrasts: [...]                   # two tests of the same questions against each other, see contrasts.py
tables: [...]                      # the paper's own tables, see factors.py
quick: {seeds: [0], settings: {...}, tests: {...}}
forecast: {seconds_per_step: {train: 0.6, sft: 0.5}, seconds_per_question: 0.05, seconds_per_start: 10}
```

A cell is one arm with one seed: an ordinary folder of a run. Its name ends in a hash of its settings (names.py), so
that a changed recipe leads to other folders for what changed and to the same ones for the rest. Where nothing is
evaluated while training, the settings of evaluation are not among them. The name of a cell that starts from another
depends on the other's name, and so on all settings that led to it. What an arm is trained on is its own affair; tests
ask what the recipe and the test say.
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
from medvqa_rl.core.files import checkpoint_folder
from medvqa_rl.study.plan.arms import Arm, Verb, check_keys, read_arms, section, with_starts
from medvqa_rl.study.plan.contrasts import Contrast, read_contrasts
from medvqa_rl.study.plan.factors import FactorTable, read_tables
from medvqa_rl.study.plan.leaks import Pair, check_names
from medvqa_rl.study.plan.names import check_made, settings_hash

_PURPOSES: dict[Verb, Purpose] = {"none": "eval", "train": "train", "sft": "sft"}
_KEYS = (
    *("baseline", "seeds", "settings", "arms", "tests", "primary", "contrasts", "tables", "quick", "forecast"),
    *("title", "note"),
)
_FORECAST_KEYS = ("seconds_per_step", "seconds_per_question", "seconds_per_start")


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
    """Whose last checkpoint it starts from, and evaluates where it trains nothing; None takes the settings' model."""

    @property
    def label(self) -> str:
        return self.arm.name if self.arm.once else f"{self.arm.name}, seed {self.seed}"

    @property
    def starts(self) -> list[Cell]:
        """All cells that have to be trained before, the nearest first."""
        return [] if self.start is None else [self.start, *self.start.starts]

    @property
    def checkpoint(self) -> Path | None:
        """The weights after the last step of its training, which no evaluation chose; where it trains nothing those
        that it starts from, None being the settings' model."""
        if self.arm.verb == "none":
            return None if self.start is None else self.start.checkpoint
        return checkpoint_folder(self.folder, self.config.train.steps)


@dataclass(frozen=True)
class Forecast:
    """Rates that hold until finished cells tell better ones."""

    seconds_per_step: Mapping[str, float]
    """Of each verb."""
    seconds_per_question: float
    seconds_per_start: float


@dataclass(frozen=True)
class Recipe:
    """A study with everything checked."""

    name: str
    title: str
    note: str
    """What to know about the published figures."""
    baseline: str
    seeds: tuple[int, ...]
    tests: tuple[str, ...]
    primary: str
    """The test set that the paper's tables are about."""
    contrasts: tuple[Contrast, ...]
    tables: tuple[FactorTable, ...]
    forecast: Forecast
    cells: tuple[Cell, ...]

    @property
    def arms(self) -> tuple[Arm, ...]:
        """In the order of the recipe."""
        return tuple({cell.arm.name: cell.arm for cell in self.cells}.values())

    @property
    def pairs(self) -> list[Pair]:
        """What each trained cell is trained and tested on. All tests ask the same, so what a cell starts from, a cell
        too, is compared with all that the cell is tested on."""
        return [
            Pair(cell.arm.name, cell.config.data, test.name, test.config.data)
            for cell in self.cells
            if cell.arm.verb != "none"
            for test in cell.tests
        ]


def find_recipe(name: str) -> Path:
    """The file that a path or the name of a shipped recipe stands for.

    Raises:
        ValueError: there is neither.
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
    """Read a recipe and check every cell of it, so that nothing starts that cannot end.

    Args:
        path: the YAML file.
        output: folder of the study, below which the cells lie.
        quick: take the seeds, settings and tests under ``quick`` on top.
        overrides: ``key=value`` settings of every run; ``tests.NAME.key=value`` of one test, ``tests.NAME=null``
            leaves it out.
        only: names of arms, which bring the baseline and what they start from along; empty takes all.

    Raises:
        ValueError: with a sentence for what is wrong.
    """
    given = read_file(path)
    where = f"The recipe {path}"
    check_keys(where, given, _KEYS)
    hurry = section(where, "quick", given.get("quick", {})) if quick else {}
    check_keys(f"{where} under quick", hurry, ("seeds", "settings", "tests"))
    hurry_settings = section(where, "quick.settings", hurry.get("settings"))
    hurry_tests = section(where, "quick.tests", hurry.get("tests"))
    base = _deep(section(where, "settings", given.get("settings", {})), hurry_settings)
    of_tests = [text for text in overrides if _key(text).startswith("tests.")]
    base = merge(base, [parse_override(text) for text in overrides if text not in of_tests])
    arms = read_arms(where, section(where, "arms", given.get("arms", {})))
    for name in only:
        if name not in arms:
            raise ValueError(
                f"{where} has no arm {name}: choose from {', '.join(arms)}" + (did_you_mean(name, arms) or ".")
            )
    baseline = given.get("baseline")
    if not isinstance(baseline, str) or baseline not in arms:
        raise ValueError(f"{where} has baseline {baseline!r}, but must name one of its arms: {', '.join(arms)}.")
    seeds = hurry.get("seeds", given.get("seeds"))
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{where} has seeds {seeds!r}, but must have a list of whole numbers, such as [0, 1, 2].")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{where} names a seed twice in {seeds}, but each seed is one run: name it once.")
    tests = section(where, "tests", given.get("tests", {}))
    if not tests:
        raise ValueError(f"{where} has no tests: name at least one, such as tests: {{home: {{}}}}.")
    tests = {name: _deep(section(where, f"tests.{name}", settings), hurry_tests) for name, settings in tests.items()}
    contrasts = read_contrasts(where, given.get("contrasts"), tests)
    tests = _override_tests(where, tests, of_tests)
    for name, test in tests.items():
        _check_place(where, name, base, test)
    primary = given.get("primary", next(iter(tests)))
    if primary not in tests:
        raise ValueError(f"{where} has primary {primary!r}, but must name one of its tests: {', '.join(tests)}.")
    made: dict[tuple[str, int], Cell] = {}

    def cell(arm: Arm, seed: int) -> Cell:
        seed = seeds[0] if arm.once else seed
        if (arm.name, seed) not in made:
            start = None if arm.start is None else cell(arms[arm.start], seed)
            made[arm.name, seed] = _cell(where, output, arm, seed, base, tests, start)
        return made[arm.name, seed]

    wanted = with_starts([*only, baseline], arms) if only else set(arms)
    cells = [
        cell(arm, seed) for arm in arms.values() if arm.name in wanted for seed in (seeds[:1] if arm.once else seeds)
    ]
    recipe = Recipe(
        path.stem,
        str(given.get("title", path.stem)),
        str(given.get("note", "")),
        baseline,
        tuple(seeds),
        tuple(tests),
        primary,
        tuple(one for one in contrasts if one.of in tests and one.minus in tests),
        read_tables(where, given.get("tables"), list(arms)),
        _forecast(where, given.get("forecast", {})),
        tuple(cells),
    )
    for one in cells:
        _check_made(one)
    check_names(recipe.pairs)
    return recipe


def _check_made(cell: Cell) -> None:
    """Refuse results under the names of this cell that were made with other settings."""
    untold = () if cell.config.train.eval_steps else ("eval", "eval_judge")
    # The folder of a start is part of the name; spelled otherwise (another working directory), it is the same one.
    origin = ("model.path", "model.adapter") if cell.start else ()
    run = cell.folder / "config.resolved.json"
    check_made(cell.label, cell.folder, run, (), cell.config, but=(*untold, *origin))
    for test in cell.tests:
        what = f"{cell.label}, test {test.name}"
        check_made(what, test.folder, test.folder / "results.json", ("config",), test.config, but=origin)


def _key(override: str) -> str:
    return override.partition("=")[0].strip().removeprefix("--")


def _override_tests(
    where: str, tests: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]
) -> dict[str, Mapping[str, Any]]:
    """The tests with ``tests.NAME.key=value`` put in, and without those given as ``tests.NAME=null``."""
    result = dict(tests)
    for text in overrides:
        name, _, key = _key(text).removeprefix("tests.").partition(".")
        if name not in tests:
            raise ValueError(
                f"{where} has no test {name}: choose from {', '.join(tests)}" + (did_you_mean(name, tests) or ".")
            )
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


def _check_place(where: str, name: str, base: Mapping[str, Any], test: Mapping[str, Any]) -> None:
    """Refuse a test of a data set of its own that lies nowhere, in words that name the override."""
    own = test.get("data")
    if not isinstance(own, dict) or own.get("name", "phantom") == "phantom":
        return
    data = _deep(base, test)["data"]
    if data.get("path") is None and data.get("hub") is None:
        raise ValueError(
            f"{where} tests on {name} (data.name {own['name']}), whose folder is not given: add "
            f"tests.{name}.data.path=FOLDER, or leave the test out with tests.{name}=null."
        )


def _deep(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings put on top of others; a list replaces a list."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _deep(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _forecast(where: str, given: Any) -> Forecast:
    stated = section(where, "forecast", given)
    check_keys(f"{where} under forecast", stated, _FORECAST_KEYS)
    rates = {"train": 1.0, "sft": 1.0} | section(where, "forecast.seconds_per_step", stated.get("seconds_per_step"))
    others = [stated.get("seconds_per_question", 0.1), stated.get("seconds_per_start", 10.0)]
    for rate in (*rates.values(), *others):
        if type(rate) not in (int, float) or rate < 0:
            raise ValueError(f"{where} forecasts {rate!r} seconds, but must forecast a number of at least 0.")
    return Forecast(rates, *others)


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
    settings = _deep(base, arm.settings)
    settings = _deep(settings, {"train": {"seed": seed}})
    config = _build(f"{where}, arm {arm.name}", settings, _PURPOSES[arm.verb])
    if not config.train.eval_steps:
        # How it is tested has no part in its training: another instrument must not ask for the training again.
        config = config.model_copy(update={"eval": EvalConfig(), "eval_judge": None})
    after = "" if start is None else f"{start.arm.name}/{start.folder.name}"
    folder = output / arm.name / f"seed{seed}-{settings_hash(config, after)}"

    def placed(config: Config) -> Config:
        model = config.model if start is None else _starting(config.model, start)
        return config.model_copy(update={"output_dir": str(folder), "model": model})

    made = []
    asked = settings | {"data": base.get("data") or {}}
    for name, change in tests.items():
        test = _build(f"{where}, arm {arm.name}, test {name}", _deep(asked, change), "eval")
        made.append(Test(name, placed(test), folder / "eval" / f"{name}-{settings_hash(test, after)}"))
    return Cell(arm, seed, placed(config), folder, tuple(made), start)


def _starting(model: ModelConfig, start: Cell) -> ModelConfig:
    """The settings of a model whose weights are a cell's last checkpoint: a model, or an adapter on what that cell
    was trained from."""
    below = start.config.model
    if below.lora is None and below.adapter is None:
        return model.model_copy(update={"path": str(start.checkpoint), "revision": None, "adapter": None})
    origin = {"path": below.path, "revision": below.revision}
    return model.model_copy(update={**origin, "adapter": str(start.checkpoint)})
