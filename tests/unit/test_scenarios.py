"""A scenario file is read as its author meant it, or refused with the line that is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loops.evaluation.scenarios import ScenariosRefused, fingerprint_of, read_scenarios

GOOD: dict[str, Any] = {
    "id": "a", "prompt": "I lost my key.", "emotion": "fear", "valence": "negative", "intensity": 0.5,
    "empathic": "That is hard.", "dismissive": "Buy another."}


def line(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def write(folder: Path, *lines: str) -> Path:
    file = folder / "mine.jsonl"
    file.write_bytes("\n".join(lines).encode())
    return file


def test_the_built_in_scenarios_are_read() -> None:
    found = read_scenarios()
    assert len(found) >= 160
    assert len({scenario.id for scenario in found}) == len(found)
    assert any("crisis" in scenario.traits for scenario in found)


def test_scenarios_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = read_scenarios(write(tmp_path, line(id="b"), line(id="a"), line(id="c")))
    assert [scenario.id for scenario in found] == ["b", "a", "c"]
    assert found[0].intensity == 0.5
    assert (found[0].topic, found[0].register, found[0].traits) == ("", "", ())


def test_traits_topic_and_register_are_kept(tmp_path: Path) -> None:
    text = line(traits=["crisis", "child"], topic="a key", register="blunt")
    found, = read_scenarios(write(tmp_path, text))
    assert (found.traits, found.topic, found.register) == (("crisis", "child"), "a key", "blunt")


def test_the_original_name_of_the_emotion_is_read_too(tmp_path: Path) -> None:
    old = {"expected_emotion" if name == "emotion" else name: value for name, value in GOOD.items()}
    assert read_scenarios(write(tmp_path, json.dumps(old)))[0].emotion == "fear"


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    plain = read_scenarios(write(tmp_path, line(id="a"), line(id="b")))
    file = tmp_path / "windows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([line(id="a"), "", line(id="b"), ""]).encode())
    assert read_scenarios(file) == plain


def test_a_separator_inside_a_text_is_no_line_end(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    assert read_scenarios(write(tmp_path, json.dumps({**GOOD, "prompt": text}, ensure_ascii=False)))[0].prompt == text


def test_blank_lines_count_when_a_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenariosRefused, match="line 4 "):
        read_scenarios(write(tmp_path, line(), "", "  ", "{"))


BAD = {
    "not JSON": ("{'id': 1}", "is not JSON"),
    "cut off": (line()[:-9], "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "a list": ("[1]", "is not a JSON object"),
    "a name twice": (line()[:-1] + ', "prompt": "Again."}', "says 'prompt' twice"),
    "no id": (json.dumps({k: v for k, v in GOOD.items() if k != "id"}), "has no 'id'"),
    "no prompt": (json.dumps({k: v for k, v in GOOD.items() if k != "prompt"}), "has no 'prompt'"),
    "no emotion": (json.dumps({k: v for k, v in GOOD.items() if k != "emotion"}), "has no 'emotion'"),
    "empty reply": (line(empathic=" \n"), "has no 'empathic'"),
    "number as text": (line(prompt=7), "has no 'prompt'"),
    "half a character": (line(prompt="\ud83d"), "half a character in 'prompt'"),
    "no intensity": (json.dumps({k: v for k, v in GOOD.items() if k != "intensity"}), "intensity None"),
    "unknown valence": (line(valence="sad"), "valence 'sad'"),
    "valence in capitals": (line(valence="Negative"), "valence 'Negative'"),
    "NaN": (line(intensity=float("nan")), "intensity nan"),
    "infinite": (line(intensity=float("inf")), "intensity inf"),
    "too strong": (line(intensity=1.01), "intensity 1.01"),
    "negative": (line(intensity=-0.1), "intensity -0.1"),
    "huge": (line().replace("0.5", "9" * 400), "intensity 999"),
    "text as number": (line(intensity="0.5"), "intensity '0.5'"),
    "truth as number": (line(intensity=True), "intensity True"),
    "traits in one text": (line(traits="crisis"), "traits 'crisis': a list of texts"),
    "traits as an object": (line(traits={"crisis": True}), "traits {'crisis': True}"),
    "a number among the traits": (line(traits=["crisis", 3]), "traits ['crisis', 3]"),
    "a list among the traits": (line(traits=[["crisis"]]), "traits [['crisis']]"),
    "no traits at all": (line(traits=None), "traits None"),
}


@pytest.mark.parametrize(("bad", "why"), BAD.values(), ids=BAD.keys())
def test_a_bad_line_is_named_by_its_number(bad: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ScenariosRefused, match=r"^mine\.jsonl, line 2 ") as refused:
        read_scenarios(write(tmp_path, line(), bad, line(id="c")))
    assert why in str(refused.value)


def test_the_second_use_of_an_id_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenariosRefused, match="line 3 repeats the id 'a'"):
        read_scenarios(write(tmp_path, line(), line(id="b"), line()))


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_scenarios_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(ScenariosRefused, match="holds no scenarios"):
        read_scenarios(tmp_path / "mine.jsonl")


def test_a_file_that_is_no_utf8_is_refused_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(line().encode() + b"\n\xff")
    with pytest.raises(ScenariosRefused, match=f"not UTF-8 text .byte {len(line()) + 1}"):
        read_scenarios(tmp_path / "mine.jsonl")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ScenariosRefused, match=r"cannot be read|is not a file"):
            read_scenarios(path)


def test_a_file_far_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.jsonl").open("wb") as handle:
        handle.truncate(65 << 20)
    with pytest.raises(ScenariosRefused, match="larger than 64 MB"):
        read_scenarios(tmp_path / "huge.jsonl")


def test_the_fingerprint_changes_with_any_scenario_and_their_order(tmp_path: Path) -> None:
    lines = [line(id="a"), line(id="b")]
    same = fingerprint_of(read_scenarios(write(tmp_path, *lines)))
    assert fingerprint_of(read_scenarios(write(tmp_path, *lines, ""))) == same
    assert fingerprint_of(read_scenarios(write(tmp_path, *lines[::-1]))) != same
    assert fingerprint_of(read_scenarios(write(tmp_path, lines[0], line(id="b", intensity=0.6)))) != same
    assert fingerprint_of(read_scenarios(write(tmp_path, lines[0], line(id="b", traits=["crisis"])))) != same


def test_a_pipe_is_refused_instead_of_read_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ScenariosRefused, match="is not a file"):
        read_scenarios(tmp_path / "pipe")
