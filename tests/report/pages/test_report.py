"""The report of runs: what is on it, that nothing is loaded, and that it stays small.

Run: pytest tests/report/pages/test_report.py
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic import EVIL, completion_rows, gold_text, make_run, write, write_eval, write_lines
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config import DataConfig, EvalConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.evaluation.statistics.summary import paired_gain
from medvqa_rl.report.comparisons import compare
from medvqa_rl.report.figures.charts import charts, nice_ticks, thin
from medvqa_rl.report.pages.rendering import policy_hash, script_json, thumbnail_uri
from medvqa_rl.report.pages.report import MAX_BYTES, Story, write_report
from medvqa_rl.report.pages.viewer import build_viewer, evenly
from medvqa_rl.report.runs import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return write_report([run], run.parent / "deep" / "report.html").read_text(encoding="utf-8")


def data_of(html: str) -> dict[str, Any]:
    """What the page's script gets."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def test_the_policy_allows_what_is_inside_and_nothing_else(html: str) -> None:
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert policy.replace("&#39;", "'") == (
        f"default-src 'none'; img-src data:; style-src {policy_hash(style)}; script-src {policy_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not re.findall(r'\s(?:style|on\w+)="', html)
    assert "innerHTML" not in script and "eval(" not in script and "insertAdjacentHTML" not in script
    rest = html.replace(script, "")
    assert all(url.startswith(("data:image/", "#")) for url in re.findall(r'(?:src|href|srcset)="([^"]*)"', rest))
    assert re.findall(r"https?://[^\s\"']+", html) == ["http://www.w3.org/2000/svg"] * 2  # a namespace, never loaded
    assert "url(" not in style and "@import" not in style


def test_no_text_ends_the_data(html: str) -> None:
    assert html.count("<script") == 2 and html.count("</script>") == 2
    texts = [item["text"] for group in data_of(html)["groups"] for item in group["completions"]]
    assert f"<think>It is {EVIL}</think><answer>Z</answer>" in texts


@settings(max_examples=50)
@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_data_survives_the_script_element(value: Any) -> None:
    text = script_json(value)
    assert json.loads(text) == value and not set("<>&") & set(text) and text.isascii()


def test_numbers_that_json_has_not_become_null() -> None:
    assert script_json({"a": [math.inf, -math.inf, math.nan, 1.5]}) == '{"a":[null,null,null,1.5]}'


def test_groups_have_their_images_and_tags_from_the_data_set(run: Path, html: str) -> None:
    found, data = data_of(html), load_dataset(DataConfig(), "train")
    assert len(found["groups"]) == 8
    by_id = {data[index].id: data[index] for step in (20, 40) for index in range((step - 1) * 4, step * 4)}
    for group in found["groups"]:
        sample = by_id[group["id"]]
        assert group["gold"] == gold_text(sample)
        assert group["tags"] == {"answer_type": sample.answer_type, **sample.groups}
        (name,) = group["images"]
        with Image.open(io.BytesIO(base64.b64decode(found["images"][name].partition(",")[2]))) as shown:
            one, other = (np.asarray(image.convert("RGB"), float) for image in (shown, sample.images[0].load()))
            assert one.shape == other.shape and np.abs(one - other).mean() < 8  # grainy ones are JPEG
        assert [item["outcome"] for item in group["completions"]] == ["right", "wrong", "none"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("data.json", {"train": {"fingerprint": "0"}}, "another fingerprint"),
        ("data.json", {}, "another fingerprint"),
        (
            "config.resolved.json",
            {"data": {"name": "a later one"}},
            "the settings are missing or have another",
        ),
        (
            "config.resolved.json",
            {"data": {"name": "vqa_rad", "path": "/nowhere"}},
            "the data set vqa_rad is not available here",
        ),
    ],
)
def test_images_that_cannot_be_found_again_are_said(tmp_path: Path, name: str, value: Any, expected: str) -> None:
    folder = make_run(tmp_path / "run")
    write(folder / name, value)
    viewer = build_viewer([read_run(folder)])
    assert viewer.images == {} and len(viewer.groups) == 8
    assert len(viewer.notes) == 1 and expected in viewer.notes[0]
    assert viewer.groups[0]["tags"]["modality"]


def test_a_page_without_images_has_none_and_opens_none(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build_viewer([read_run(run)])
    assert whole.images
    monkeypatch.setattr("medvqa_rl.report.pages.images.load_training_set", None)
    page = write_report([run], run.parent / "plain" / "report.html", images=False).read_text(encoding="utf-8")
    assert "data:image" not in page and "The page was written without images." in page
    assert len(build_viewer([read_run(run)], images=False).groups) == len(whole.groups)


def test_numbers_are_those_of_the_evaluations(run: Path, html: str) -> None:
    before, after = (evaluation.records() for evaluation in read_run(run).evaluations)
    gain = paired_gain(before, after, EvalConfig())
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html))
    assert "50.0 → 70.0 % correct" in text
    low, high = (f"{100 * gain[name]:+.1f}".replace("-", "−") for name in ("gain_low", "gain_high"))
    assert f"+20.0 points, 95 % interval {low} to {high}" in text
    assert f"20 questions about 10 images · {gain['improved']} improved, {gain['worsened']} worsened" in text
    assert "By modality" in text and "train finished, step 40 of 40" in text
    assert f"fingerprint {load_dataset(DataConfig(), 'train').fingerprint}" in text
    assert "Research software, not for clinical use" in text


def test_a_story_and_its_comparisons_come_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for scanner in ("home", "unseen"):
        write_eval(folder / "eval" / f"before_{scanner}", [index % 2 == 0 for index in range(20)])
        write_eval(folder / "eval" / f"after_{scanner}", [index % 10 < 7 for index in range(20)])
    story = Story(f"Demo {EVIL}", [f"It adapts. {EVIL}"], {"unseen": ("New", f"Far. {EVIL}")}, ["Only a demo."])
    page = write_report([folder], tmp_path / "page.html", story=story).read_text(encoding="utf-8")
    top, _, rest = page.partition('<section id="accuracy"')
    assert all(f"{text} &lt;/script&gt;" in top for text in ("Demo", "It adapts.", "Far."))
    assert "<h3>New</h3>" in top and "<h3>unseen</h3>" not in page and "<h3>home</h3>" in rest
    assert "<li>Only a demo.</li>" in rest
    assert page.count("<script") == 2 and "<img" not in page


def test_several_runs_are_compared_and_overlaid(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "two", steps=60, data={"scanner": "unseen"})
    runs = [read_run(run), read_run(other)]
    names = [comparison.name for comparison in compare(runs)[0]]
    assert names == ["one: phantom/home/val", "two: phantom/home/val", "two against one"]
    lengths = next(chart for chart in charts(runs) if chart.title == "Length in tokens")
    assert [(curve.label, curve.color, curve.is_dashed) for curve in lengths.curves] == [
        ("one correct", 0, False),
        ("one wrong", 0, True),
        ("two correct", 1, False),
        ("two wrong", 1, True),
    ]
    page = write_report([run, other], tmp_path / "page.html").read_text(encoding="utf-8")
    differing = re.findall(r'<tr class="differs"><td>([^<]*)', page)
    assert differing == ["output_dir", "data.scanner", "train.steps"]
    with pytest.raises(ValueError, match="have the same name"):
        write_report([run, run], tmp_path / "page.html")


def test_curves_are_drawn_where_their_values_are(run: Path) -> None:
    drawn = {chart.title: chart for chart in charts([read_run(run)])}
    assert list(drawn)[:3] == ["Reward parts", "Accuracy", "Length in tokens"] and "Loss" not in drawn
    kl = drawn["KL to the initial model"]
    label = "KL to the initial model: KL to the initial model from 0.001 at step 1 to 0.04 at step 40"
    assert f'aria-label="{label}"' in kl.svg
    points = np.array(
        [pair.split() for pair in re.findall(r'class="c2 raw" d="M([^"]*)"', kl.svg)[0].split("L")], float
    )
    assert np.allclose(np.diff(points[:, 0]), np.diff(points[:, 0])[0], atol=0.11)
    slope = np.diff(points[:, 1])
    assert (slope < 0).all() and np.allclose(slope, slope[0], atol=0.11)  # a line that rises; y points down
    accuracy = drawn["Accuracy"].svg
    assert accuracy.count("<circle") == 2 and accuracy.count("bound") == 2 and "50 %" in accuracy


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_inside(low: float, width: float) -> None:
    high = low + width
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 6 or width < 1e-9 * abs(low)
    slack = 1e-6 * width + 1e-9 * abs(low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.integers(1, 20))
def test_thinned_curves_keep_their_mean(values: list[float], limit: int) -> None:
    steps, means = thin(np.arange(len(values), dtype=float), np.array(values), limit)
    assert len(steps) == len(means) == min(limit, len(values))
    assert min(values) - 1e-12 <= means.min() and means.max() <= max(values) + 1e-12


@given(st.lists(st.integers(), max_size=50), st.integers(1, 20))
def test_choosing_evenly(items: list[int], limit: int) -> None:
    kept = evenly(list(range(len(items))), limit)
    assert len(kept) == min(len(items), limit) and kept == sorted(set(kept))
    assert not items or kept[-1] == len(items) - 1


def test_the_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 groups of 8 completions of 100 words: 500 are shown, all with their images."""
    folder = make_run(tmp_path / "run", data={"num_train": 600})
    for path in folder.glob("samples/*"):
        path.unlink()
    data = load_dataset(DataConfig(num_train=600), "train")
    described = {"name": data.name, "fingerprint": data.fingerprint, "samples": 600, "notes": {}}
    write(folder / "data.json", {"train": described})
    texts = [("The costophrenic angle is <blunted> & the heart is not enlarged. " * 8, "right")] * 8
    for step in range(1, 151):
        rows = [row for place in range(4) for row in completion_rows(step, data[4 * step - 4 + place], texts)]
        write_lines(folder / "samples" / f"step_{step:06d}.jsonl", rows)
    out = write_report([folder], tmp_path / "page.html")
    html = out.read_text(encoding="utf-8")
    assert out.stat().st_size < MAX_BYTES
    assert [len(group["images"]) for group in data_of(html)["groups"]] == [1] * 500
    assert "500 of 600 stored groups are shown" in html and "images are left out" not in html
    monkeypatch.setattr("medvqa_rl.report.pages.viewer.MAX_TEXT_BYTES", 1_000_000)
    viewer = build_viewer([read_run(folder)])
    assert 900_000 * 0.8 < len(json.dumps(viewer.groups)) < 1_000_000 and viewer.groups[-1]["step"] == 150


def test_images_beyond_the_budget_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medvqa_rl.report.pages.viewer.MAX_IMAGE_BYTES", 1)
    viewer = build_viewer([read_run(make_run(tmp_path / "run"))])
    assert len(viewer.images) == 1 and viewer.notes == ["7 images are left out to keep the page small."]


def test_thumbnails_of_noise_are_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    uri = thumbnail_uri(Image.fromarray(noise), 224)
    assert uri.startswith("data:image/jpeg") and len(uri) < 40_000


def luminance(color: str) -> float:
    """Relative luminance by WCAG 2.2."""
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast(html: str, theme: int) -> None:
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    colors: dict[str, str] = {}
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)[theme::2]:
        colors |= dict(re.findall(r"--([\w-]+): (#\w{6})", block))
    plain, soft = ["background", "panel"], ["right-soft", "wrong-soft"]
    pairs = [(name, ground) for name in ("text", "muted", "after", "right", "look") for ground in plain]
    pairs += [(name, ground) for name in ("text", "muted") for ground in soft]
    pairs += [("right", "right-soft"), ("wrong", "wrong-soft")]
    for name, ground in pairs:
        light, dark = sorted((luminance(colors[name]), luminance(colors[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)
    for number in range(6):  # lines of charts: 3 is asked of graphics
        light, dark = sorted((luminance(colors[f"c{number}"]), luminance(colors["background"])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, number


def test_the_command(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "page.html"
    result = CliRunner().invoke(app, ["report", str(run), "--output", str(out)])
    assert result.exit_code == 0 and str(out) in result.output and out.is_file()
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    result = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "There is no folder" in result.output


def standalone(folder: Path, correct: list[bool], model: str, weights: str) -> Path:
    """An evaluation as ``medvqa-rl eval`` writes it."""
    results = write_eval(folder, correct)
    results["dataset"] = {"name": "phantom/home/test", "questions": "abc"}
    results["settings"] = {"template": "think_answer"}
    results["model"] = {"path": model, "adapter": None, "weights": weights}
    write(folder / "results.json", results)
    return folder


def test_evaluations_outside_the_run_give_before_and_after(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    model = json.loads((run / "config.resolved.json").read_text())["model"]["path"]
    before = standalone(tmp_path / "before", [True] * 5 + [False] * 15, model, "old")
    after = standalone(tmp_path / "evals" / "after", [True] * 15 + [False] * 5, str(run / "best"), "new")
    out = tmp_path / "page.html"
    arguments = ["report", str(run), "--output", str(out), "--evals", str(before), "--evals", str(after.parent)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (made,) = [item for item in compare([read_run(run, [before, after])])[0] if "test" in item.name]
    assert (made.before["accuracy"], made.after["accuracy"], made.gain["gain"]) == (0.25, 0.75, 0.5)
    assert made.name == "phantom/home/test, after" and "+50.0 points" in out.read_text()
    (home,) = compare([read_run(run)])[0]
    assert "val" in home.name
    standalone(before, [True] * 5 + [False] * 15, model, "new")
    (made,) = [item for item in compare([read_run(run, [before, after])])[0] if "test" in item.name]
    assert made.note == "Both are evaluations of the same weights."
    standalone(before, [True] * 5 + [False] * 15, model, "old")
    results = json.loads((after / "results.json").read_text())
    results["model"] |= {"average_with": "/secret/start", "average_weight": 0.6}
    write(after / "results.json", results)
    (made,) = [item for item in compare([read_run(run, [before, after])])[0] if "test" in item.name]
    assert made.note == "After: 0.6 of the trained weights, the rest of start."


def test_evals_need_one_run_and_an_evaluation(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no evaluation in .*nothing"):
        read_run(run, [tmp_path / "nothing"])
    with pytest.raises(ValueError, match="--evals is given with 2 runs"):
        write_report([run, run], tmp_path / "page.html", evals=[tmp_path])


def test_the_report_is_written_without_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from medvqa_rl.report.pages.report import write_report; "
        f"write_report([Path({str(run)!r})], Path({str(tmp_path / 'x.html')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
