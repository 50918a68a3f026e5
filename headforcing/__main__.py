"""`python -m headforcing`: the command line."""

from headforcing.cli import app

if __name__ == "__main__":
    app(prog_name="headforcing")
