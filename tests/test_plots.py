"""The studies' figures: files that draw and say every number, inside their box, light or dark."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import CHROMIUM, Browser

from slipstream.decode.drawing import DARK, INK, PAPER

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"
RULES = {"exact": (1.5, [1.4, 1.61]), "mars ratio 0.9": (2.125, [1.9, 2.3]), "q <:= 1> & on": (1.75, None)}
CURVES = {
    "ratio": [(0.0, 2.0), (0.01, 2.125), (0.05, 2.25)],
    "odds": [(0.0, 2.0), (0.02, 2.15625)],
    "one": [(0.03, 2.1)],
}


@pytest.fixture(scope="module")
def studies():
    """What draws, and the study that has most of its figure itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield {name: import_module(name) for name in ("plots", "objectives")}


@pytest.fixture(scope="module")
def figures(studies) -> dict[str, str]:
    plots = studies["plots"]
    tasks = {f"tree, {name}": dict.fromkeys(("all (4)", "code (4)"), RULES["exact"]) for name in "abc"}
    parts = [plots.Part("tau", {name: {"": stated} for name, stated in RULES.items()}), plots.Part("x", tasks, 1.0)]
    return {
        "points": plots.draw_points("Points & <intervals>", parts[:1]),
        "groups": plots.draw_points("Groups", parts),
        "curves": plots.draw_curves("Curves", [plots.Panel("T = 0", CURVES), plots.Panel("", CURVES)], "regret", "tau"),
    }


def _root(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def _marks(svg: str, colour: str) -> np.ndarray:
    """Places of all marks of a colour, [n, 2]."""
    uses = [use for use in _root(svg).iter(f"{SVG}use") if re.search(rf"fill: [^;]*{colour}", use.attrib["style"])]
    return np.array([[float(use.attrib[axis]) for axis in "xy"] for use in uses])


def _drawn(root: ElementTree.Element) -> np.ndarray:
    """Every place that is drawn at, [n, 2]; shapes of marks are kept apart, among the definitions."""
    apart = {id(node) for define in root.iter(f"{SVG}defs") for node in define.iter()}
    lines = [node.attrib["d"] for node in root.iter(f"{SVG}path") if id(node) not in apart]
    pairs = [pair for line in lines for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", line)]
    pairs += [(node.attrib["x"], node.attrib["y"]) for node in root.iter(f"{SVG}use")]
    pairs += [(node.attrib["x"], node.attrib["y"]) for node in root.iter(f"{SVG}text") if "x" in node.attrib]
    return np.array(pairs, float)


@pytest.mark.parametrize("name", ["points", "groups", "curves"])
def test_a_figure_is_one_described_image_inside_its_box(figures, name):
    root = _root(figures[name])
    words = {node.attrib["id"]: node.text for node in root if node.tag in (f"{SVG}title", f"{SVG}desc")}
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"].split() == list(words) == ["title", "words"]
    ids = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', figures[name])) <= set(ids)
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    assert float(root.attrib["width"]) / float(root.attrib["height"]) == pytest.approx(width / height, rel=0.01)
    places = _drawn(root)
    assert len(places) > 20
    assert (places >= (left, top)).all()
    assert (places <= (left + width, top + height)).all()


def test_points_and_intervals_stand_at_their_values(figures):
    svg = figures["points"]
    marks, ink = _marks(svg, "#0072b2"), _marks(svg, INK)
    ends = ink[np.isin(ink[:, 1], marks[:, 1])].reshape(len(RULES), 2, 2)
    assert (np.diff(marks[:, 1]) > 8).all()  # in their order, from the top
    for (_, bounds), mark, pair in zip(RULES.values(), marks, ends, strict=True):
        assert pair[:, 1].tolist() == [mark[1]] * 2
        assert (pair[0, 0] < mark[0] < pair[1, 0]) if bounds else (pair[:, 0] == mark[0]).all()
    values = [x for value, bounds in RULES.values() for x in (value, *(bounds or (value, value)))]
    places = np.concatenate([marks[:, None, 0], ends[:, :, 0]], 1).ravel()
    slope, start = np.polyfit(values, places, 1)
    assert places == pytest.approx(slope * np.array(values) + start, abs=1e-3)
    for words in ("exact 1.500, interval 1.400–1.610", "q <:= 1> & on 1.750, interval –"):
        assert f"tau, {words}" in _root(svg).findtext(f"{SVG}desc", "")


def test_each_kind_has_marks_of_its_own_and_a_legend(figures):
    svg = figures["groups"]
    texts = {node.text for node in _root(svg).iter(f"{SVG}text")}
    assert {"all (4)", "code (4)", "tree, a", "exact"} <= texts
    several, single = _root(svg).findtext(f"{SVG}desc", ""), _root(figures["points"]).findtext(f"{SVG}desc", "")
    assert several.count("tree, ") == 6
    assert several.startswith(single)
    colours = [_marks(svg, colour) for colour in ("#0072b2", "#d55e00", "#009e73")]
    assert [len(marks) for marks in colours] == [3, 3 + 1, 3 + 1]  # what has a name is in the legend too
    assert (np.diff(np.stack(colours[1:])[:, :3, 1], axis=0) > 4).all()  # apart from each other, line by line


def test_curves_go_through_their_points(figures):
    svg = figures["curves"]
    said = _root(svg).findtext(f"{SVG}desc", "")
    assert said.startswith("Curves, tau against regret: T = 0, ratio 2.000 at 0, 2.125 at 0.01, 2.250 at 0.05; ")
    assert said.endswith("one 2.100 at 0.03")
    colours = ("#0072b2", "#d55e00", "#009e73")
    first = np.concatenate([_marks(svg, c)[: len(CURVES[k])] for c, k in zip(colours, CURVES, strict=True)])
    for axis, values in enumerate(zip(*(point for points in CURVES.values() for point in points), strict=True)):
        slope, start = np.polyfit(values, first[:, axis], 1)
        assert (slope > 0) == (axis == 0)  # y goes down in SVG
        assert first[:, axis] == pytest.approx(slope * np.array(values) + start, abs=1e-3)


def _light(colour: str) -> float:
    """Relative luminance (WCAG 2)."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(colour: str, ground: str) -> float:
    dark, light = sorted((_light(colour), _light(ground)))
    return (light + 0.05) / (dark + 0.05)


def test_colours_suit_light_and_dark(figures, studies):
    assert _contrast(INK, PAPER) > 7
    assert _contrast(DARK[INK], DARK[PAPER]) > 7
    for colour in studies["plots"].PALETTE:
        assert _contrast(colour, PAPER) > 2
        assert _contrast(DARK.get(colour, colour), DARK[PAPER]) > 3
    for svg in figures.values():
        body = svg.split("</style>")[1]
        for light, dark in DARK.items():
            assert body.count(light) == body.count(f"var(--{light[1:]}, {light})")
            assert f"--{light[1:]}: {dark};" in svg
        assert "#000000" not in body


def test_seeds_and_the_difference_to_the_first_stand_around_the_first(studies):
    rounds = np.full((4, 2), 10.0)  # prompts, seeds
    taken = {"forward_kl": np.array([[14.0, 16], [15, 17], [13, 15], [16, 14]]), "lk_margin": np.full((4, 2), 18.0)}
    counts = {name: np.stack([x, rounds, 0 * x, x], -1) for name, x in taken.items()}
    part = studies["objectives"].drawn("exact, T=0", counts, [0, 7])
    assert part.reference == pytest.approx(1.5)
    assert part.lines["forward_kl"] == {"all seeds": (1.5, None), "seed 0": (1.45, None), "seed 7": (1.55, None)}
    value, (low, high) = part.lines["lk_margin"]["all seeds"]
    assert 1.5 < low <= value == 1.8 <= high
    assert set(
        studies["objectives"].drawn("one", {k: v[:, :1] for k, v in counts.items()}, [3]).lines["lk_margin"]
    ) == {"all seeds"}
    line = studies["objectives"].compared({"exact, T=0": counts}).splitlines()[-1]
    assert line.startswith(
        f"| exact, T=0 | lk_margin | 1.800 | 1.800, 1.800 | +0.300 [{low - 1.5:+.3f}, {high - 1.5:+.3f}]"
    )


def test_what_seeds_differ_by_widens_the_interval(studies):
    """Two variants that differ by one round's token; once their seeds agree, once they are far apart."""
    rounds, zero = np.full((6, 3), 10.0), np.zeros((6, 3))

    def counts(*emitted: float) -> np.ndarray:
        taken = np.array(emitted)[None] + np.arange(6.0)[:, None] / 10
        return np.stack([taken, rounds, zero, taken], -1)

    value, low, high = studies["objectives"].difference(counts(18, 18, 18), counts(17, 17, 17))
    assert value == pytest.approx(0.1)
    assert low == pytest.approx(high)  # the same prompts, and nothing else that differs
    apart = counts(16, 18, 20), counts(15, 17, 19)
    value, low, high = studies["objectives"].difference(*apart)
    assert value == pytest.approx(0.1)
    half = 2.776 * np.sqrt(
        2 * 0.2**2 / 3
    )  # t of 4 degrees of freedom; the seeds' variance is 0.2 squared on either side
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), rel=1e-3)


SEEN = """[...document.querySelectorAll("svg")].map(figure => [figure.getBoundingClientRect().width,
    getComputedStyle(figure.querySelector("rect")).fill,
    [...figure.querySelectorAll("text, use")].filter(mark => {
        const box = mark.getBoundingClientRect(), all = figure.getBoundingClientRect();
        return box.left < all.left || box.right > all.right || box.top < all.top || box.bottom > all.bottom }).length])"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_figures_fit_a_phone_and_turn_dark(figures, tmp_path):
    head = '<meta name="viewport" content="width=device-width"><style>svg { max-width: 100%; height: auto }</style>'
    (tmp_path / "page.html").write_text(head + "".join(figures.values()), encoding="utf-8")
    browser = Browser(tmp_path / "profile")
    grounds = []
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.open(tmp_path / "page.html", 390)
        seen = browser.evaluate(SEEN)
        assert [cut for _, _, cut in seen] == [0] * len(figures)
        assert all(300 < width <= 390 for width, _, _ in seen)
        grounds.append({ground for _, ground, _ in seen})
    browser.close()
    assert grounds == [{"rgb(255, 255, 255)"}, {"rgb(21, 24, 28)"}]
    assert browser.complaints == []
