"""`python -m headforcing.cli`."""

from headforcing.cli import app

app(prog_name="headforcing")
