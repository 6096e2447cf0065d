"""Files survive what happens to them: kills, full disks, errors in the middle, other settings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import folder_atomic, require_writable, write_atomic, write_through
from slipstream.data.journal import Journal

if TYPE_CHECKING:
    from pathlib import Path

UNITS: list[list[dict[str, Any]]] = [
    [{"text": "a"}, {"text": "ö\n\u2028\u0085\r"}],
    [{"text": ""}],
    [{"text": "b"}, {"text": "c"}, {"text": "d"}],
]
SETTINGS = {"target": "tiny", "temperatures": [0.0, 0.7], "seed": 1}


def fill(path: Path) -> set[int]:
    """Append the units that are not there yet; returns those that were."""
    with Journal(path, SETTINGS) as journal:
        there = journal.units
        for unit, rows in enumerate(UNITS):
            if unit not in there:
                journal.append(unit, rows)
    return there


def rows_in(path: Path) -> list[dict[str, Any]]:
    with Journal(path, SETTINGS) as journal:
        return journal.rows()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The journal of an uninterrupted run."""
    path = tmp_path / "whole.jsonl"
    fill(path)
    return path


def test_a_journal_holds_its_units_in_order_and_goes_on_behind_the_highest(tmp_path):
    with Journal(tmp_path / "j.jsonl", SETTINGS) as journal:
        assert (journal.units, journal.next_unit, journal.rows()) == (set(), 0, [])
        journal.append(4, UNITS[0])
        journal.append(1, UNITS[1])
        assert (journal.units, journal.next_unit) == ({1, 4}, 5)
    texts = [row["text"] for row in rows_in(tmp_path / "j.jsonl")]
    assert texts == [row["text"] for row in [*UNITS[1], *UNITS[0]]]


def test_torn_at_any_byte_a_journal_resumes_to_the_rows_of_an_uninterrupted_run(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the disk is not what is tested, and slow
    content = whole.read_bytes()
    for size in range(len(content)):
        torn = tmp_path / "torn.jsonl"
        fill(torn)
        torn.write_bytes(content[:size])
        kept = fill(torn)
        assert torn.read_bytes() == content, f"torn behind byte {size}"
        whole_units = sum(content[:size].count(b'"unit": [%d,' % unit) == len(rows) for unit, rows in enumerate(UNITS))
        assert len(kept) >= whole_units - 1, f"torn behind byte {size}"


def test_a_unit_without_one_of_its_rows_is_dropped_whole(whole):
    lines = whole.read_text().split("\n")
    whole.write_text("\n".join([*lines[:1], *lines[2:]]))
    assert [row["unit"][0] for row in rows_in(whole)] == [1, 2, 2, 2]
    assert fill(whole) == {1, 2}
    assert [row["unit"][:2] for row in rows_in(whole)] == [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2]]


def test_opening_a_whole_journal_changes_nothing(whole):
    before = whole.stat()
    assert fill(whole) == {0, 1, 2}
    assert whole.stat() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({**SETTINGS, "seed": 2}, "seed=1, not 2"),
        ({**SETTINGS, "temperatures": [0.0]}, r"temperatures=\[0.0, 0.7\], not \[0.0\]"),
        ({"target": "tiny", "seed": 1}, "temperatures="),
    ],
)
def test_other_settings_are_an_error_that_names_one_and_the_file_stays(whole, changed, message):
    before = whole.read_bytes()
    with pytest.raises(SlipstreamError, match=message) as caught:
        Journal(whole, changed)
    assert str(whole) in str(caught.value)
    assert whole.read_bytes() == before
    assert fill(whole) == {0, 1, 2}


@pytest.mark.parametrize("content", ['{"text": "mine"}\n', "mine\n", "[1]\n"])
def test_a_file_that_is_no_journal_is_an_error_and_stays(tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(SlipstreamError, match="was not begun by slipstream"):
        Journal(path, SETTINGS)
    assert path.read_text() == content
    assert names(tmp_path) == ["mine.jsonl"]


@pytest.mark.parametrize("content", ["{", "", "[1]"])
def test_settings_that_cannot_be_read_are_an_error_that_names_them(whole, content):
    beside = whole.with_name("whole.jsonl.settings.json")
    beside.write_text(content)
    with pytest.raises(SlipstreamError, match=f"{beside} is damaged, and {whole} cannot go on; give another --out"):
        Journal(whole, SETTINGS)


@pytest.mark.parametrize("line", ['{"text": "mine"}', "[1]", '{"unit": 3}', '{"unit": [0, "1", 1]}'])
def test_a_row_of_somebody_elses_is_an_error_with_its_line_and_the_file_stays(whole, line):
    lines = whole.read_text().split("\n")
    whole.write_text("\n".join([lines[0], line, *lines[1:]]))
    before = whole.read_bytes()
    with pytest.raises(SlipstreamError, match=f"{whole}:2 is no row of slipstream's"):
        Journal(whole, SETTINGS)
    assert whole.read_bytes() == before


def test_a_file_without_rows_goes_on_with_any_settings(tmp_path):
    (tmp_path / "whole.jsonl").touch()  # as a kill right at the beginning leaves it
    for seed in (1, 2):
        with Journal(tmp_path / "whole.jsonl", {"seed": seed}) as journal:
            assert journal.rows() == []


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path, whole):
    lines = whole.read_text().split("\n")
    whole.write_text("\n".join([*lines[:1], *lines[2:]]))  # is written anew on opening
    for path in (whole, tmp_path / "new.jsonl"):
        with Journal(path, SETTINGS) as first:
            with pytest.raises(SlipstreamError, match=f"{path} is being written by another process"):
                Journal(path, SETTINGS)
            first.append(7, [{"text": "e"}])
        with Journal(path, SETTINGS) as second:
            assert 7 in second.units


def test_a_killed_process_loses_no_unit_it_had_written(tmp_path):
    path = tmp_path / "killed.jsonl"
    code = (
        "import sys; from pathlib import Path; from slipstream.data.journal import Journal\n"
        "with Journal(Path(sys.argv[1]), {}) as journal:\n"
        "    for unit in range(10**9):\n"
        "        journal.append(unit, [{'text': 'x' * 5000}] * 3); print(unit, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 20:
                process.send_signal(signal.SIGKILL)
                break
        written = max([20, *map(int, process.stdout.read().split())])
    assert process.returncode == -signal.SIGKILL
    with Journal(path, {}) as journal:
        assert journal.units in (set(range(written + 1)), set(range(written + 2)))
        assert len(journal.rows()) == 3 * len(journal.units)


def test_a_write_that_fails_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")

    def full(*_):
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(OSError, match="No space left"):
                write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.json"]
    write_atomic(path, b"new")
    assert path.read_text() == "new"


def test_what_a_killed_writer_left_is_deleted_and_what_a_living_one_holds_is_not(tmp_path):
    path = tmp_path / "f[0].json"
    for name in (".f[0].json.ab_12xyz", ".f[0].json.swp", ".f0.json.ab_12xyz"):
        (tmp_path / name).write_text("half of it")
    with write_through(path) as mine:
        assert len(names(tmp_path)) == 3
        mine.write(b"mine")
        write_atomic(path, "another's, in the meantime")
    assert path.read_text() == "mine"
    assert names(tmp_path) == [".f0.json.ab_12xyz", ".f[0].json.swp", "f[0].json"]


def test_many_may_write_one_file_at_once(tmp_path):
    path = tmp_path / "file.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write_atomic(path, "x" * 1000), range(1000)))
    assert names(tmp_path) == ["file.json"]
    assert path.read_text() == "x" * 1000


def test_a_folder_that_fails_in_the_middle_leaves_nothing_or_the_old_one(tmp_path):
    def fail() -> None:
        with folder_atomic(tmp_path / "deep" / "head") as folder:
            (folder / "config.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path / "deep") == []
    (tmp_path / "deep" / "head").mkdir()
    (tmp_path / "deep" / "head" / "config.json").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path / "deep") == ["head"]
    assert (tmp_path / "deep" / "head" / "config.json").read_text() == "old"


def test_a_folder_replaces_the_one_before_whole(tmp_path):
    for name in ("old.json", "new.json"):
        with folder_atomic(tmp_path / "head") as folder:
            (folder / name).write_text(json.dumps(name))
    assert names(tmp_path) == ["head"]
    assert names(tmp_path / "head") == ["new.json"]
    assert os.stat(tmp_path / "head").st_mode & 0o777 == 0o755


def test_a_place_that_can_be_written_passes_and_stays_empty(tmp_path):
    require_writable(tmp_path / "new" / "run", needed_mb=1)
    assert names(tmp_path / "new" / "run") == []


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_file_in_the_way_is_an_error_that_names_the_place(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SlipstreamError, match=f"cannot write to {tmp_path / place}: .*another --out"):
        require_writable(tmp_path / place, needed_mb=1)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_an_error_that_says_what_is_free_and_needed(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**40, 2**40 - 2**23, 2**23)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    require_writable(tmp_path, needed_mb=8)
    with pytest.raises(SlipstreamError, match="8 MB free, 9 MB are needed"):
        require_writable(tmp_path, needed_mb=9)
