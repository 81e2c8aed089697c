"""Builds the native ops with the package where torch is importable; everything else stands in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))

from training.build_ops import BuildError, build_ops


class BuildWithOps(build_py):
    """`build_py` after the native ops, which may be built later: an installation never fails for want of them."""

    def run(self) -> None:
        """Build the ops, or say why not, then the package."""
        try:
            self.announce(f"native ops: {build_ops()}", level=3)
        except BuildError as error:
            self.announce(f"native ops are not built: {error}", level=3)
        super().run()


setup(cmdclass={"build_py": BuildWithOps})
