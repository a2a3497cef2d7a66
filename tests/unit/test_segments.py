"""`notify segments`: what a text costs, without a running system."""

from __future__ import annotations

import json

from typer.testing import CliRunner, Result

from streams.cli import build


def segments(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(build(), ["segments", *arguments], env={"COLUMNS": "200"}, input=stdin)


def test_a_text_is_shown_with_what_its_segments_hold() -> None:
    result = segments("Your code is 123456.")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("GSM-7, 1 segment ")
    assert "20/160" in result.stdout
    assert "Your code is 123456." in result.stdout


def test_each_of_several_segments_has_a_row() -> None:
    document = json.loads(segments("a" * 150 + "€" * 10, "--json").stdout)
    assert (document["encoding"], document["segments"]) == ("GSM-7", 2)
    assert [(part["used"], part["room"]) for part in document["parts"]] == [(152, 153), (18, 153)]
    assert "".join(part["text"] for part in document["parts"]) == "a" * 150 + "€" * 10


def test_what_makes_it_dear_is_named() -> None:
    result = segments("Łódź \N{GRINNING FACE} 日", "--transliterate", "all")
    assert "UCS-2, 1 segment" in result.stdout
    assert result.stderr.strip().endswith("\N{GRINNING FACE} 日")
    assert json.loads(segments("日本", "--json").stdout)["blockers"] == ["日", "本"]


def test_it_is_told_when_characters_were_replaced() -> None:
    assert "replaced" in segments("Łódź").stderr
    assert "replaced" not in segments("Grüße").stderr
    assert "UCS-2" in segments("Łódź", "--transliterate", "none").stdout


def test_stdin_is_read_and_its_last_line_end_is_none_of_the_text() -> None:
    document = json.loads(segments("-", "--json", stdin="one\ntwo\n").stdout)
    assert document["parts"] == [{"used": 7, "room": 160, "text": "one\ntwo"}]


def test_more_segments_than_providers_take_are_shown_with_a_warning() -> None:
    result = segments("a" * 1000)
    assert (result.exit_code, "cut" in result.stderr) == (0, True)
    assert "GSM-7, 7 segments" in result.stdout
    assert segments("a" * 153 * 256).exit_code == 1


def test_nothing_steers_the_terminal() -> None:
    assert "\x1b" not in segments("a\x1b[31mb [bold]c[/bold]").stdout
    assert "[bold]c[/bold]" in segments("a [bold]c[/bold]").stdout
