"""Builds the native libraries with the package, the ops where torch is; everything else stands in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))

from tokenization.build_pixels import build_pixels
from tokenization.compiler import BuildError
from training.build_ops import build_ops


class BuildWithOps(build_py):
    """`build_py` after the native libraries; `tensorar build-ops` builds later what fails."""

    def run(self) -> None:
        """Build the libraries, or say why not, then the package."""
        for name, build in (("pixels", build_pixels), ("ops", build_ops)):
            try:
                print(f"native {name}: {build()}")
            except BuildError as error:
                print(f"native {name} are not built now: {error}")
        super().run()


class OpsDistribution(Distribution):
    """A distribution whose wheel is for one platform, as the libraries in it are."""

    def has_ext_modules(self) -> bool:
        """Tell so."""
        return True


setup(cmdclass={"build_py": BuildWithOps}, distclass=OpsDistribution)
