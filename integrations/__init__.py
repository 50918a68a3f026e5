"""Adapters, one file per base model, imported as `headforcing.integrations.<name>`."""

if __name__ != "headforcing.integrations":
    raise ImportError("import headforcing.integrations instead; from a clone: pip install -e .")
