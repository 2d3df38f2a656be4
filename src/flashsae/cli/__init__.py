"""The command line: what each command takes, in flags and in files, and which function does it."""

from flashsae.cli.program import main as main
