"""What pyproject.toml cannot say: the packages, and the description without what only a repository has."""

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

# The adapters are in the top-level folder `integrations/` and are installed as `headforcing.integrations`. An
# editable installation does without the mapping, which requires an import hook that no type checker follows:
# it adds this folder to the path, and headforcing/__init__.py finds the adapters.
MAPPED = {} if "editable_wheel" in sys.argv else {"headforcing.integrations": "integrations"}
PACKAGES = [*find_packages(str(Path(__file__).parent), include=["headforcing", "headforcing.*"]), *MAPPED]


def description(readme: str) -> str:
    """A README without its relative links and pictures, which lead nowhere on a package index."""
    picture = r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n\n(?:\*[^*\n]+\*\n\n)?"  # with its caption
    readme = re.sub(picture, "", readme, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"\1", readme)


if __name__ == "__main__":
    setup(
        packages=PACKAGES,
        package_dir={"": ".", **MAPPED},
        long_description=description(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
