"""Steps outside of runs survive whatever ends the process."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from loops.events import Event, Note, StepDone
from loops.pass1.journal import journaling, read_journal
from loops.pass1.steps import Steps
from state.files import StateUnwritable


def test_a_step_done_is_not_done_again(tmp_path: Path) -> None:
    file, told = tmp_path / "journals" / "m.jsonl", list[Event]()
    first = Steps(journaling(file, told.append), read_journal(file))
    assert first.run("count", "", lambda: {"n": 1}, of="sheep") == {"n": 1}
    again = Steps(journaling(file, told.append), read_journal(file))
    assert again.run("count", "", lambda: {"n": 2}, of="sheep") == {"n": 1}
    assert again.run("count", "", lambda: {"n": 3}, of="goats") == {"n": 3}
    assert told == []


def test_what_is_no_step_is_told(tmp_path: Path) -> None:
    told = list[Event]()
    journaling(tmp_path / "m.jsonl", told.append)(Note("Hm."))
    assert told == [Note("Hm.")]
    assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_line_cut_short_costs_that_step_only(cut: int, tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    emit = journaling(file, lambda _event: None)
    emit(StepDone("a", "count", "", {"n": 1}))
    emit(StepDone("b", "count", "", {"n": 2}))
    file.write_bytes(file.read_bytes()[:-cut])
    assert read_journal(file).keys() == ({"a", "b"} if cut == 1 else {"a"})
    emit(StepDone("c", "count", "", {"n": 3}))
    assert read_journal(file)["c"] == {"n": 3}
    assert read_journal(file)["a"] == {"n": 1}


def test_several_write_at_once(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    emit = journaling(file, lambda _event: None)
    threads = [threading.Thread(target=lambda number=number: [
        emit(StepDone(f"{number}-{count}", "count", "", {"text": "x" * 5000})) for count in range(5)])
        for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_journal(file)) == 20


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StateUnwritable):
        journaling(tmp_path / "taken" / "m.jsonl", lambda _event: None)(StepDone("a", "count", "", {}))
