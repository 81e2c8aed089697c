"""Compiles csrc into _pixels.so, the library of native pixels: `tensorar build-ops`. Light: setup.py runs it too."""

from __future__ import annotations

from pathlib import Path

from tokenization import compiler

LIBRARY = Path(__file__).parent / "_pixels.so"


def build_pixels() -> Path:
    """Compile the library; returns its path.

    Raises:
        BuildError: no compiler, or an error of it.
    """
    # A product and a sum that are rounded once instead of twice would make other weights than Pillow's.
    flags = ("-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=off", f'-DPIXELS_SOURCES="{sources_mark()}"')
    compiler.compile_library(sorted(compiler.HEADERS.glob("*.cpp")), LIBRARY, flags=flags)
    return LIBRARY


def sources_mark() -> str:
    """Return what is inside a library that was built from the sources as they are now."""
    return compiler.digest_of([Path(__file__), Path(compiler.__file__), *compiler.sources_in(compiler.HEADERS)])
