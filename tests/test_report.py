"""The report: every section where its data are, none where they are not, and nothing unescaped."""

from __future__ import annotations

import copy
import itertools
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from reported import full_results, row, several_tasks
from rich.console import Console

from slipstream.decode.report import headline, markdown_table, results_table, write_report

if TYPE_CHECKING:
    from pathlib import Path

FIGURES = ("speedup", "acceptance", "time", "frontier", "fidelity", "margins", "regret", "scores", "training")
FIGURES += ("distributions",)
OPTIONAL = ("policy", "frontier", "training", "distributions", "samples", "limits")
OF_ROWS = {"relaxed_margins": "margins", "regret_by_length": "regret", "scores": "scores"}
VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture
def results() -> dict[str, Any]:
    return full_results()


class Page(HTMLParser):
    """Checks that tags are balanced and ids unique, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def written(folder: Path, results: dict[str, Any]) -> tuple[str, Page]:
    path = folder / "report.html"
    write_report(path, results)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_full_page_has_every_section_and_described_figures(tmp_path: Path, results: dict[str, Any]) -> None:
    text, page = written(tmp_path, results)
    sections = [values["id"] for tag, values in page.attributes if tag == "section"]
    assert sections == ["results", *FIGURES, "samples", "glossary", "policy", "versions"]
    assert len(page.ids) == len(set(page.ids))
    figures = [values for tag, values in page.attributes if tag == "svg"]
    assert len(figures) == len(FIGURES)
    assert all(values["role"] == "img" and values["aria-label"] for values in figures)
    assert "1.62, interval 1.55–1.70" in text
    assert "threshold 0.9: 67% on the relaxed side" in text
    assert "1 not finite, not drawn" in text
    assert "depth 4 &lt;b&gt; 32.4 at 0.000, predicted" in text
    assert "exact common prefix with the strict output 1.00, interval 0.90–1.00" in text
    assert "up to 0.25 31, up to 0.50 20, up to 0.75 0, up to 1.00 19" in text
    assert "after 150 tokens mean 1.50, 90 % 3.00, of 3 answers" in text
    assert "chat, T = 0 MARS 0.41, interval 0.31–0.52, 125 tokens" in text
    for expected in ("Memory bandwidth limits it.", "tree.depth", "5.0", "4.0 minutes."):
        assert expected in text


def test_references_inside_figures_resolve_and_nothing_is_fetched(tmp_path: Path, results: dict[str, Any]) -> None:
    text, page = written(tmp_path, results)
    references = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    assert references
    assert references <= set(page.ids)
    fetched = [values.get(key) for _, values in page.attributes for key in ("src", "href", "xlink:href")]
    assert all(address is None or address.startswith(("#", "data:")) for address in fetched)
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.attributes}


def test_text_from_models_is_escaped(tmp_path: Path, results: dict[str, Any]) -> None:
    results["rows"][2]["task"] = 'a "<i>" & $x$ task'
    text, _ = written(tmp_path, results)
    assert "<script" not in text
    assert "<i>" not in text
    assert "<b>" not in text
    assert "<draft>" not in text
    assert 'class="relaxed" title="relaxed, margin 0.30 nats, regret 0.31 nats">&lt;script&gt;</span>' in text
    assert 'class="bonus" title="bonus"> &amp; all\n</span>' in text


@pytest.mark.parametrize("key", OPTIONAL)
def test_an_absent_part_leaves_its_section_out(tmp_path: Path, results: dict[str, Any], key: str) -> None:
    del results[key]
    _, page = written(tmp_path, results)
    assert key not in page.ids
    assert {"results", "speedup", "versions"} <= set(page.ids)


def test_what_rows_do_not_say_is_not_drawn(tmp_path: Path, results: dict[str, Any]) -> None:
    for measured, key in itertools.product(results["rows"], OF_ROWS):
        measured[key] = {} if key == "scores" else None
    _, page = written(tmp_path, results)
    assert set(FIGURES) & set(page.ids) == set(FIGURES) - set(OF_ROWS.values())


def test_rows_alone_make_a_page(tmp_path: Path, results: dict[str, Any]) -> None:
    bare = {key: value for key, value in results.items() if key not in OPTIONAL}
    for measured, key in itertools.product(bare["rows"], ("time_split", "compared_with", *OF_ROWS)):
        del measured[key]
    _, page = written(tmp_path, bare)
    sections = [values["id"] for tag, values in page.attributes if tag == "section"]
    assert sections == ["results", "speedup", "acceptance", "glossary", "versions"]


def test_several_tasks_and_unknown_rules(tmp_path: Path, results: dict[str, Any]) -> None:
    more = [entry | {"task": "code", "temperature": 1.0, "identical_to_target": None} for entry in results["rows"]]
    results["rows"] += [*more, row("typical", 1.3, lossless=False, task="code", temperature=1.0)]
    text, page = written(tmp_path, results)
    assert "code, T = 1" in text
    assert "typical" in text
    assert len(page.ids) == len(set(page.ids))


def test_categories_have_panels_and_scores_of_their_own(tmp_path: Path) -> None:
    text, page = written(tmp_path, several_tasks())
    sections = [values["id"] for tag, values in page.attributes if tag == "section"]
    assert sections[1:4] == ["speedup", "acceptance", "by_task"]
    words = {
        values["aria-label"].split(":")[0]: values["aria-label"] for tag, values in page.attributes if tag == "svg"
    }
    assert "code exact 70%" in text
    scores = words["Points with 95 % intervals, scores from 0 to 1, and mean answer length"]
    assert "mt_bench/writing, T = 1 exact" in scores
    assert "all, T" not in scores
    assert scores.count("tokens") == 2 * 2 * 5


def test_answers_to_one_prompt_stand_side_by_side(tmp_path: Path, results: dict[str, Any]) -> None:
    text, page = written(tmp_path, results)
    assert len([tag for tag, _ in page.attributes if tag == "article"]) == 2
    assert text.count("Say &lt;hello&gt;") == 1
    assert "the first 1 tokens are those of exact" in " ".join(text.split())
    results["samples"][1]["tokens"] = results["samples"][0]["tokens"]
    assert "the same answer as exact" in " ".join(written(tmp_path, results)[0].split())


def test_a_missing_required_key_and_an_unknown_tag_are_errors(tmp_path: Path, results: dict[str, Any]) -> None:
    broken = copy.deepcopy(results)
    del broken["rows"][1]["acceptance_length"]
    with pytest.raises(KeyError, match="acceptance_length"):
        write_report(tmp_path / "report.html", broken)
    results["samples"][0]["tokens"][0]["tag"] = "guess"
    with pytest.raises(ValueError, match="tagged 'guess'"):
        write_report(tmp_path / "report.html", results)
    assert list(tmp_path.iterdir()) == []


def test_headline_says_what_the_rows_say(results: dict[str, Any]) -> None:
    assert headline(results) == (
        "Exact decoding is 1.62× as fast as transformers’ generate (95 % interval 1.55 to 1.70) "
        "and gives the same tokens; MARS is 1.80× as fast (95 % interval 1.73 to 1.88) "
        "at a mean regret of 0.031 nats per token."
    )


def test_headline_hides_no_bad_news(results: dict[str, Any]) -> None:
    results["rows"][2] |= {"speedup": 1.02, "speedup_ci95": [0.95, 1.1], "identical_to_target": False}
    results["rows"][3]["mean_output_tokens"] = 250.0
    text = headline(results)
    assert "0.95 to 1.10, no clear difference) but did not give the same tokens in every answer" in text
    assert text.endswith("with answers 100% longer.")
    assert "Only the baselines" in headline(results | {"rows": results["rows"][:2]})


def test_terminal_table_lists_the_rules_within_80_columns(results: dict[str, Any]) -> None:
    console = Console(width=80, record=True)
    results["rows"][0]["task"] = "[red]chat"
    with console.capture() as capture:
        console.print(results_table(results))
    text = capture.get()
    for expected in ("transformers", "engine", "exact", "MARS", "1.62×", "1.55–1.70", "0.031", "[red]chat"):
        assert expected in text
    assert "…" not in text


def test_markdown_keeps_relaxed_rules_apart(results: dict[str, Any]) -> None:
    results["rows"][0]["task"] = "a|b"
    lossless, relaxed = markdown_table(results).split("**Relaxed")
    assert "| exact |" in lossless
    assert "MARS" not in lossless
    assert "a\\|b" in lossless
    assert "| MARS |" in relaxed
    assert "7.0%" in relaxed
    tables = re.findall(r"(?:^\|.*\|\n?)+", markdown_table(results), flags=re.MULTILINE)
    assert [len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) for table in tables] == [1, 1]
