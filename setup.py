"""Builds the native ops with the package where torch is importable; everything else stands in pyproject.toml."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))

from training.build_ops import BuildError, build_ops


class BuildWithOps(build_py):
    """`build_py` after the native ops; `tensorar build-ops` builds them later where that fails."""

    def run(self) -> None:
        """Build the ops, or say why not, then the package."""
        try:
            print(f"native ops: {build_ops()}")
        except BuildError as error:
            print(f"native ops are not built now: {error}")
        super().run()


class OpsDistribution(Distribution):
    """A distribution whose wheel, where it holds the library, is for one platform."""

    def has_ext_modules(self) -> bool:
        """Tell whether the wheel will hold it."""
        return importlib.util.find_spec("torch") is not None


setup(cmdclass={"build_py": BuildWithOps}, distclass=OpsDistribution)
