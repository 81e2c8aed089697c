"""The demo's corpus: three open emoji sets as WebDataset tars and as a class-per-folder tree, with captions.

Nothing downstream knows about emoji: what lies on disk is an ordinary image-text corpus. The split is by base concept
(skin-tone variants follow their base), so no held-out emoji has a skin-tone twin in training; look-alikes such as clock
faces still cross. The bytes depend on the pinned packages alone; the whole directory is committed at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
import shutil
import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py

from jobs.npm import NpmPackage, fetch_packages, read_members
from pipeline.local_storage import STAGED_PREFIX, stage, write_json

log = logging.getLogger(__name__)

CORPUS_VERSION = 1
IMAGE_SIZE_PX = 64
SAMPLES_PER_TAR = 1000
SKIN_TONE_FRACTION = 0.3
VALIDATION_ONE_IN = 20
NUM_PROCESSES = 2
SPLITS = ("train", "validation")

EMOJIBASE = NpmPackage(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
STYLES: dict[str, NpmPackage] = {
    "noto": NpmPackage(
        name="@iconify-json/noto",
        version="1.2.9",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "twemoji": NpmPackage(
        name="@iconify-json/twemoji",
        version="1.2.5",
        sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "fluent": NpmPackage(
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
}

NOTICE = """\
The images of this corpus were rendered from these works; the captions and classes come from emojibase.

noto     Noto Emoji, Copyright Google Inc., https://github.com/googlefonts/noto-emoji
         Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0 (npm: @iconify-json/noto 1.2.9)
twemoji  Twemoji, Copyright Twitter, Inc and other contributors, https://github.com/jdecked/twemoji
         CC BY 4.0, https://creativecommons.org/licenses/by/4.0/ (npm: @iconify-json/twemoji 1.2.5)
         Changes: rendered to 64 px PNG on white.
fluent   Fluent UI Emoji, Copyright Microsoft Corporation, https://github.com/microsoft/fluentui-emoji
         MIT License, https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE
         (npm: @iconify-json/fluent-emoji-flat 1.2.6)
captions emojibase, Copyright Miles Johnson, https://emojibase.dev
         MIT License, text below (npm: emojibase-data 17.0.0)

"""


@dataclass(frozen=True)
class Concept:
    """One emoji of emojibase, or one skin-tone variant of it."""

    hexcode: str
    base_hexcode: str
    text: str
    tags: tuple[str, ...]
    group: str
    class_name: str

    @property
    def is_skin_tone(self) -> bool:
        """Whether this is a skin-tone variant of another concept."""
        return self.hexcode != self.base_hexcode

    @property
    def split(self) -> str:
        """`train` or `validation`, the same for a concept and all its variants."""
        return split_of(self.base_hexcode)


@dataclass(frozen=True)
class Drawing:
    """One concept in one style: the SVG that becomes one sample."""

    style: str
    concept: Concept
    svg: str

    @property
    def key(self) -> str:
        """Unique name of the sample: code points and style, no dots."""
        return f"{self.concept.hexcode.lower()}-{self.style}"


def split_of(base_hexcode: str) -> str:
    """`validation` for one base concept in twenty, `train` for the others.

    Args:
        base_hexcode: emojibase's hexcode of the emoji without skin tone, upper case.
    """
    return "validation" if _hash(base_hexcode) % VALIDATION_ONE_IN == 0 else "train"


def keeps(*, style: str, concept: Concept) -> bool:
    """Whether a drawing enters the corpus: all without skin tone, and a fixed share of the skin-tone variants."""
    if not concept.is_skin_tone:
        return True
    return _hash(f"{style}/{concept.hexcode}") % 1000 < 1000 * SKIN_TONE_FRACTION


def read_concepts(data: list[dict[str, Any]], groups: dict[str, Any]) -> list[Concept]:
    """Concepts and their skin-tone variants, in emojibase's order; components and letters have none.

    Args:
        data: `en/data.json` of emojibase.
        groups: `meta/groups.json` of emojibase.
    """
    concepts: list[Concept] = []
    for base in data:
        if "subgroup" not in base or groups["groups"][str(base["group"])] == "component":
            continue
        for entry in (base, *base.get("skins", ())):
            concepts.append(
                Concept(
                    hexcode=entry["hexcode"],
                    base_hexcode=base["hexcode"],
                    text=entry["label"],
                    tags=tuple(base.get("tags", ())),
                    group=groups["groups"][str(base["group"])],
                    class_name=groups["subgroups"][str(base["subgroup"])],
                )
            )
    return concepts


def draw(concepts: list[Concept], *, style: str, icons: dict[str, Any], chars: dict[str, str]) -> list[Drawing]:
    """Drawings of one style that the corpus keeps, in the order of the concepts.

    Args:
        concepts: What may be drawn.
        style: Name of the style.
        icons: `icons.json` of an Iconify package.
        chars: `chars.json` of the same package: code points to icon name.
    """
    name_of_code = {_plain(code): name for code, name in chars.items()}
    drawings: list[Drawing] = []
    for concept in concepts:
        name = name_of_code.get(_plain(concept.hexcode))
        if name is not None and name in icons["icons"] and keeps(style=style, concept=concept):
            drawings.append(Drawing(style=style, concept=concept, svg=_svg(icons, name=name)))
    return drawings


def metadata_of(drawing: Drawing, *, class_names: list[str]) -> dict[str, Any]:
    """The JSON member of a sample: caption, label (position of its class) and what else is known."""
    concept = drawing.concept
    return {
        "caption": f"{concept.text}, {drawing.style} style",
        "label": class_names.index(concept.class_name),
        "class": concept.class_name,
        "group": concept.group,
        "style": drawing.style,
        "concept": concept.text,
        "tags": list(concept.tags),
        "hexcode": concept.hexcode,
    }


def build_open_emoji(root: Path, *, download_dir: Path) -> dict[str, Any]:
    """Record of the corpus under `root`; built first where it is not there yet.

    Args:
        root: The corpus: `tars/`, `folders/`, `classes.txt`, `NOTICE.txt` and `corpus.json`.
        download_dir: Where the npm tarballs lie and stay.

    Returns:
        The contents of `corpus.json`: version, counts by split and style, class names.

    Raises:
        FetchError: the packages cannot be had.
        ValueError: `root` holds something else, or a corpus of another version.
    """
    if (existing := _existing_record(root)) is not None:
        return existing
    tarballs = fetch_packages((EMOJIBASE, *STYLES.values()), download_dir=download_dir)
    drawings = _read_drawings(tarballs)
    class_names = sorted({drawing.concept.class_name for drawing in drawings})
    log.info("rendering images=%d classes=%d", len(drawings), len(class_names))
    pngs = _render_all(drawings)
    record = _record(drawings, class_names=class_names)
    license_text = read_members(tarballs[EMOJIBASE.name], ("LICENSE",))["LICENSE"].decode()
    for leftover in root.parent.glob(f"{STAGED_PREFIX}{root.name}-*"):
        shutil.rmtree(leftover)
    with stage(root) as staged:
        for split in SPLITS:
            members = [(d, png) for d, png in zip(drawings, pngs, strict=True) if d.concept.split == split]
            _write_tars(staged / "tars" / split, members, class_names=class_names)
            _write_folders(staged / "folders" / split, members, class_names=class_names)
        (staged / "classes.txt").write_text("\n".join(class_names) + "\n")
        (staged / "NOTICE.txt").write_text(NOTICE + license_text)
        write_json(staged / "corpus.json", record)
    return record


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _plain(code: str) -> str:
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def _svg(icons: dict[str, Any], *, name: str) -> str:
    icon = icons["icons"][name]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{IMAGE_SIZE_PX}" height="{IMAGE_SIZE_PX}">{icon["body"]}</svg>'
    )


def _existing_record(root: Path) -> dict[str, Any] | None:
    if not root.exists():
        return None
    path = root / "corpus.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if record.get("version") != CORPUS_VERSION:
        raise ValueError(
            f"building corpus {root}: the directory must be absent or hold version {CORPUS_VERSION} of the corpus, "
            f"got version {record.get('version')!r}; remove the directory or name another one"
        )
    return record


def _read_drawings(tarballs: dict[str, Path]) -> list[Drawing]:
    names = ("en/data.json", "meta/groups.json")
    contents = read_members(tarballs[EMOJIBASE.name], names)
    concepts = read_concepts(*(json.loads(contents[name]) for name in names))
    drawings: list[Drawing] = []
    for style, package in STYLES.items():
        contents = read_members(tarballs[package.name], ("icons.json", "chars.json"))
        icons, chars = json.loads(contents["icons.json"]), json.loads(contents["chars.json"])
        drawings += draw(concepts, style=style, icons=icons, chars=chars)
    # The order of the tars: a hash of the key mixes classes and styles, the same way every time.
    return sorted(drawings, key=lambda drawing: _hash(drawing.key))


def _render_all(drawings: list[Drawing]) -> list[bytes]:
    # spawn: this process may hold threads (Ray, torch) that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=context) as pool:
        return list(pool.map(_render, (drawing.svg for drawing in drawings), chunksize=100))


def _render(svg: str) -> bytes:
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True))


def _write_tars(directory: Path, members: list[tuple[Drawing, bytes]], *, class_names: list[str]) -> None:
    directory.mkdir(parents=True)
    num_tars = -(-len(members) // SAMPLES_PER_TAR)
    for tar_index in range(num_tars):
        begin, end = (len(members) * edge // num_tars for edge in (tar_index, tar_index + 1))
        with tarfile.open(directory / f"{tar_index:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for drawing, png in members[begin:end]:
                text = json.dumps(metadata_of(drawing, class_names=class_names), sort_keys=True)
                _add(archive, name=f"{drawing.key}.png", data=png)
                _add(archive, name=f"{drawing.key}.json", data=text.encode())


def _add(archive: tarfile.TarFile, *, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    archive.addfile(info, io.BytesIO(data))


def _write_folders(directory: Path, members: list[tuple[Drawing, bytes]], *, class_names: list[str]) -> None:
    # Every class gets its folder, even without images, so that the sorted folders number the labels in every split.
    for name in class_names:
        (directory / name).mkdir(parents=True)
    for drawing, png in members:
        (directory / drawing.concept.class_name / f"{drawing.key}.png").write_bytes(png)


def _record(drawings: list[Drawing], *, class_names: list[str]) -> dict[str, Any]:
    by_split = Counter(drawing.concept.split for drawing in drawings)
    by_style = Counter(drawing.style for drawing in drawings)
    return {
        "version": CORPUS_VERSION,
        "num_samples": {split: by_split[split] for split in SPLITS},
        "num_samples_of_style": dict(sorted(by_style.items())),
        "num_concepts": len({drawing.concept.base_hexcode for drawing in drawings}),
        "image_size_px": IMAGE_SIZE_PX,
        "class_names": class_names,
        "packages": [package.spec for package in (EMOJIBASE, *STYLES.values())],
    }
