"""A corpus that no model here has seen and that is too large to be learnt by heart: 390,000 icons of 243 sets, as tars.

`python benchmarks/icon_corpus.py --dir data/icons` fetches the npm package of all sets of Iconify (100 MB) and renders
every icon at 64 px on white, those without colours in one of twelve that its name chooses: two to four minutes on two
cores. The class of an icon is its set; the order is that of hashes. Icons whose names begin with a word of every
hundredth hash are held out, in all sets at once, so that no set shows a held-out subject.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import resvg_py

from jobs.npm import NpmPackage, fetch_packages

PACKAGE = NpmPackage(
    name="@iconify/json",
    version="2.2.535",
    sha256="1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91",
)
SIZE_PX = 64
SAMPLES_PER_TAR = 4000
ONE_HELD_OUT_OF = 100
COLOURS = (
    *(0x000000, 0x3C3C3C, 0xC81E1E, 0xDC6E00, 0xE6B400, 0x3C9628),
    *(0x00826E, 0x0078C8, 0x1E3CAA, 0x6E32AA, 0xC82882, 0x785032),
)


class Icon(NamedTuple):
    """An icon as its set has it; the view box is left, top, width and height."""

    label: int
    set_name: str
    name: str
    view_box: tuple[float, float, float, float]
    body: str


def hash_of(text: str) -> int:
    """Return 48 bits of the text's sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def read_sets(tarball: Path) -> dict[str, dict]:
    """Return the sets of the package by name, in the order of their names."""
    sets = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            path = Path(member.name)
            if path.parent.name == "json" and path.suffix == ".json":
                content = archive.extractfile(member)
                assert content is not None
                sets[path.stem] = json.load(content)
    return dict(sorted(sets.items()))


def icons_of(sets: dict[str, dict]) -> Iterator[Icon]:
    """Yield all icons; what an icon lacks its set says, else 16 px at 0, 0."""
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    for label, (set_name, one) in enumerate(sets.items()):
        for name, icon in one["icons"].items():
            left, top, width, height = (icon.get(key, one.get(key, default)) for key, default in defaults.items())
            yield Icon(label, set_name, name, (left, top, width, height), icon["body"])


def is_held_out(icon: Icon) -> bool:
    """Return whether the icon's first word is one of the held-out ones."""
    return hash_of("g" + icon.name.partition("-")[0]) % ONE_HELD_OUT_OF == 0


def render(icon: Icon) -> bytes:
    """Return the icon as PNG."""
    colour = COLOURS[hash_of(f"{icon.set_name}/{icon.name}") % len(COLOURS)]
    body = icon.body.replace("currentColor", f"#{colour:06x}")
    box = " ".join(map(str, icon.view_box))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{SIZE_PX}" height="{SIZE_PX}">{body}</svg>'
    )
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True))


ICONS: dict[str, list[Icon]] = {}
"""By split. Filled before the processes are forked, so that none is sent half a gigabyte."""


def write_tar(path: Path, split: str, start: int) -> int:
    """Write the samples of one tar and return their number; an icon that cannot be rendered is left out."""
    num_written = 0
    with tarfile.open(path, "w") as archive:
        for index, icon in enumerate(ICONS[split][start : start + SAMPLES_PER_TAR]):
            try:
                png = render(icon)
            except ValueError:
                continue
            caption = f"{icon.name} of {icon.set_name}".encode()
            for extension, data in (("png", png), ("cls", str(icon.label).encode()), ("txt", caption)):
                member = tarfile.TarInfo(f"{index:06d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            num_written += 1
    return num_written


def main() -> None:
    """Fetch, render, and write `tars/train`, `tars/validation` and `classes.txt`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, default=Path("data/icons"))
    root: Path = parser.parse_args().dir
    sets = read_sets(fetch_packages((PACKAGE,), download_dir=root / "downloads")[PACKAGE.name])
    icons = sorted(icons_of(sets), key=lambda icon: hash_of(f"o{icon.set_name}/{icon.name}"))
    ICONS["validation"] = [icon for icon in icons if is_held_out(icon)]
    ICONS["train"] = [icon for icon in icons if not is_held_out(icon)]
    (root / "classes.txt").write_text("\n".join(sets) + "\n")
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        for split, of_split in ICONS.items():
            (root / "tars" / split).mkdir(parents=True, exist_ok=True)
            starts = range(0, len(of_split), SAMPLES_PER_TAR)
            paths = [root / "tars" / split / f"{number:05d}.tar" for number in range(len(starts))]
            num_written = sum(pool.map(write_tar, paths, [split] * len(starts), starts))
            print(json.dumps({"split": split, "icons": len(of_split), "written": num_written, "tars": len(paths)}))


if __name__ == "__main__":
    main()
