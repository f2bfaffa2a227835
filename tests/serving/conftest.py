"""What tests of serving share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of real files, real_package.write's of seed 1. Copy it to change it."""
    import real_package

    folder = tmp_path_factory.mktemp("package") / "p"
    real_package.write(folder)
    return folder
