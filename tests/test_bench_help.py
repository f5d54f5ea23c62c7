"""Help of the measuring commands: every command and every option says what it is."""

from __future__ import annotations

import argparse

import pytest

from llava_uhd.bench.__main__ import COMMANDS, make_parser

NAMES = [module.__name__.rpartition(".")[2] for module in COMMANDS]


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_a_command_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args([name, "--help"])
    assert ended.value.code == 0
    usage, about, *_ = capsys.readouterr().out.split("\n\n")
    assert usage.startswith("usage: ") and about.endswith(".") and len(about.split()) > 5
    assert "`" not in about and "%%" not in about


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_explained(name: str) -> None:
    (commands,) = (
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    silent = [action.dest for action in commands.choices[name]._actions if not action.help]
    assert not silent
