"""Calls of the MRI command line."""

from typer.testing import CliRunner

from applications.mri.commands.app import app


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def succeed(*arguments):
    found = call(*arguments)
    assert found.exit_code == 0, found.output
    assert found.stderr == ""
    return found.stdout


def refused(*arguments):
    """The message of a call that must fail: one line, exit code 2."""
    found = call(*arguments)
    assert found.exit_code == 2, found.output
    assert "Traceback" not in found.output
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    return found.stderr
