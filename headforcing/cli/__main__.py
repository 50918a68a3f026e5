"""`python -m headforcing.cli`."""

from headforcing.cli import app

if __name__ == "__main__":
    app(prog_name="headforcing")
