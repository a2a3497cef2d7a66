"""`notify preview`: what recipients read, without a running system."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner, Result

from agents.triggers import RULES
from schemas.topics import Channel
from streams.cli import build
from streams.cli.preview import example_data, html_as_text
from templates.render import Templates


def preview(*arguments: str) -> Result:
    return CliRunner().invoke(build(), ["preview", *arguments], env={"COLUMNS": "120"})


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_shown_with_what_the_samples_say(rule: str) -> None:
    result = preview(rule)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("╭")] == list(RULES[rule].channels)
    templates = Templates()
    for channel in RULES[rule].channels:
        for part, text in templates.render(RULES[rule].template, channel, example_data(rule)).items():
            first = next(line for line in (html_as_text(text) if part == "html" else text).splitlines() if line)
            assert first[:40] in result.stdout


def test_given_data_go_before_those_of_the_samples() -> None:
    result = preview("password_reset", "--channel", "sms", "--data", "code=77 88 99")
    assert "FlowMart: 778899 is your code" in result.stdout
    assert "email" not in result.stdout
    assert "Hello Ada," in preview("password_reset", "--data", "name=Ada").stdout
    assert preview("password_reset", "--data", "name=Ada").stderr == ""


def test_a_key_that_the_rule_does_not_know_is_warned_about() -> None:
    result = preview("password_reset", "--data", "cod=1")
    assert result.exit_code == 0
    assert "cod is none of what password_reset is told with: name, code," in result.stderr


def test_json_is_all_that_is_printed_when_it_is_asked_for() -> None:
    result = preview("payment_failed", "--json", "--channel", "push", "--channel", "in_app")
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert document["channels"] == {
        each: Templates().render("payment_failed", each, document["data"]) for each in (Channel.PUSH, Channel.IN_APP)
    }
    assert document["templateVersion"] == Templates().version("payment_failed")
    assert document["ruleVersion"] == RULES["payment_failed"].version


def test_a_text_message_is_shown_with_what_it_costs() -> None:
    assert "GSM-7, 1 segment, 151 of 160 characters" in preview("password_reset", "--channel", "sms").stdout
    assert "GSM-7, 2 segments, 165 of 2 x 153 characters" in preview("payment_failed", "--channel", "sms").stdout
    document = json.loads(preview("message", "--channel", "sms", "--data", "message=漢" * 2, "--json").stdout)
    assert (document["channels"]["sms"]["encoding"], document["channels"]["sms"]["segments"]) == ("UCS-2", 1)


def test_html_is_printed_as_a_browser_needs_it() -> None:
    result = preview("payment_failed", "--html")
    assert result.stdout == Templates().render("payment_failed", "email", example_data("payment_failed"))["html"] + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no_such_rule",), "There is no rule no_such_rule. The rules are payment_confirmed,"),
        (("payment_pending", "--channel", "sms"), "payment_pending is not told by sms. Its channels are in_app."),
        (("payment_failed", "--channel", "sms", "--html"), "There is no HTML on the channel sms"),
        (("payment_pending", "--html"), "payment_pending is not told by email"),
        (("message", "--data", "title"), "--data title is not KEY=VALUE."),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(arguments: tuple[str, ...], words: str) -> None:
    result = preview(*arguments)
    assert result.exit_code == 1
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_data_do_not_steer_the_terminal() -> None:
    assert "\x1b" not in preview("message", "--data", "title=a\x1b[31mb", "--data", "message=[red]m\x07").stdout
    assert "[red]m" in preview("message", "--data", "message=[red]m").stdout


def test_html_is_read_as_its_reader_sees_it() -> None:
    page = """<html><head><title>t</title><style>p{}</style></head><body><div style="display: none">hidden <b>too</b></div>
    <p>One
    line<br/>and
    <a href="https://example.com/x?a=1&amp;b=2">a link</a></p><table><tr><td>Amount</td><td>$1 &lt; $2</td></tr></table></i>end"""
    assert html_as_text(page).splitlines() == ["One line", "and a link (https://example.com/x?a=1&b=2)", "Amount $1 < $2", "end"]
