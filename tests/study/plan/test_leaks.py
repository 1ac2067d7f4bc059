"""Shared training and test images are found under other names and in bounded time; tests on other data sets.

Run: pytest tests/study/plan/test_leaks.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cells import write
from PIL import Image

from medvqa_rl.config import DataConfig
from medvqa_rl.core.types import Sample
from medvqa_rl.study.plan import leaks
from medvqa_rl.study.plan.leaks import Pair, check_names, compare_pixels
from medvqa_rl.study.plan.recipe import find_recipe, read_recipe

OWN, OTHER = DataConfig(name="own", path="a"), DataConfig(name="vqa_rad", path="b")
PAIR = Pair("grpo", OWN, "rad", OTHER)


@dataclass(frozen=True)
class Shade:
    """A small image with one grey level; None cannot be decoded."""

    key: str
    level: int | None

    def load(self) -> Image.Image:
        if self.level is None:
            raise ValueError(f"{self.key} is damaged.")
        return Image.new("RGB", (8, 8), (self.level, 0, 0))

    def header_pixels(self) -> None:
        return None


@dataclass
class Shades:
    """A data set with one question per image."""

    name: str
    images: list[Shade]
    is_endless: bool = False
    fingerprint: str = ""
    notes: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(str(index), "Is it?", "yes", "closed", (self.images[index],))


def both(monkeypatch: pytest.MonkeyPatch, trained: list[Shade], tested: list[Shade], **changes: Any) -> None:
    sets = {("own", "train"): Shades("own/train", trained, **changes), ("vqa_rad", "test"): Shades("rad/test", tested)}
    sets["own", "test"] = Shades("own/test", tested)
    monkeypatch.setattr(leaks, "load_dataset", lambda config, split: sets[config.name, split])


def test_equal_pixels_under_other_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = [Shade("a", 1), Shade("b", 2), Shade("c", 3), Shade("d", None)]
    both(monkeypatch, trained, [Shade("x", 9), Shade("y", 2), Shade("z", 3), Shade("w", None)])
    check_names([PAIR])  # no name is in both
    message = (
        r"The test set rad \(rad/test\) shares 2 images with the training set of grpo \(own/train\), such as [yz] ="
    )
    with pytest.raises(ValueError, match=message):
        list(compare_pixels([PAIR]))


def test_equal_names_count_within_one_data_set_only(monkeypatch: pytest.MonkeyPatch) -> None:
    both(monkeypatch, [Shade("a", 1)], [Shade("a", 2)])
    check_names([PAIR])
    (line,) = compare_pixels([PAIR, PAIR._replace(arm="sft")])
    assert line == (
        "rad (rad/test): 1 of its 1 images and 1 of the 1 training images of grpo (own/train) compared by pixels, "
        "none is in both."
    )
    with pytest.raises(ValueError, match=r"shares 1 images with the training set of grpo .* such as a,"):
        check_names([PAIR._replace(tested=OWN)])
    assert list(compare_pixels([PAIR._replace(tested=OWN)])) == []  # one data set: names tell


def test_phantom_images_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    both(monkeypatch, [Shade("a", 1)], [Shade("a", 1)], is_endless=True)
    check_names([PAIR._replace(tested=OWN)])
    assert list(compare_pixels([PAIR._replace(trained=DataConfig())])) == []


def test_the_comparison_ends_at_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    both(monkeypatch, [Shade(f"a{n}", n) for n in range(50)], [Shade(f"b{n}", 100 + n) for n in range(40)])
    (line,) = compare_pixels([PAIR], seconds=0.0)
    assert "1 of its 40 images and 1 of the 50 training images" in line
    assert "Stopped after 0 s: `medvqa-rl data check --data` compares all." in line


# --- tests on other data sets --------------------------------------------------------------------------------------


def test_overrides_of_one_test(given: dict[str, Any], tmp_path: Path) -> None:
    given["tests"] = {"home": {"data": {"num_test": 6}}, "far": {"data": {"scanner": "unseen", "num_test": 6}}}
    path = write(tmp_path / "tiny.yaml", given)
    recipe = read_recipe(path, tmp_path, overrides=["tests.far.data.num_test=9", "train.steps=3"])
    assert [test.config.data.num_test for test in recipe.cells[0].tests] == [6, 9]
    assert recipe.cells[0].config.train.steps == 3 and recipe.cells[0].config.data.num_test != 9
    assert read_recipe(path, tmp_path, overrides=["tests.far=null"]).tests == ("home",)
    assert read_recipe(path, tmp_path, overrides=["tests.home=null"]).primary == "far"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tests.fra.data.num_test=9"], "has the unknown test 'fra': use one of home, far: did you mean far"),
        (["tests.far=9"], r"The override 'tests\.far=9' is neither a setting .* nor tests\.far=null"),
        (["tests.far.data.num_tests=9"], r"test far: data\.num_tests .* did you mean data\.num_test"),
        (["tests.far=null", "tests.home=null"], "has no test left"),
        (
            ["tests.far.data.name=vqa_rad"],
            r"tests on far \(data\.name vqa_rad\), whose folder is not given: add tests\.far\.data\.path=FOLDER, or "
            r"leave the test out with tests\.far=null",
        ),
    ],
)
def test_invalid_overrides_of_a_test_are_refused(
    given: dict[str, Any], tmp_path: Path, overrides: list[str], message: str
) -> None:
    given["tests"] = {"home": {}, "far": {"data": {"scanner": "home"}}}
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path, overrides=overrides)
    assert "\n" not in str(error.value)


def test_the_recipe_for_real_images_names_the_missing_path(tmp_path: Path) -> None:
    path = find_recipe("four_factors_pmc_vqa")
    given = [f"data.path={tmp_path}"]
    for name, data in (("vqa_rad", "vqa_rad"), ("slake", "slake_en")):
        with pytest.raises(ValueError, match=rf"tests on {name} \(data\.name {data}\), whose folder is not given"):
            read_recipe(path, tmp_path, overrides=given)
        given.append(f"tests.{name}.data.path={tmp_path}")
    with pytest.raises(ValueError, match="There is no folder 'images'"):
        read_recipe(path, tmp_path, overrides=given)
