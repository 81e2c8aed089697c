"""A tree of image files: one folder a class, or a caption file beside each image; a fixed run of files is a work unit.

The invariant: the order is torchvision's ImageFolder's (folders sorted, then names), and labels follow the sorted class
folders. A plan holds the names of its files compressed, about 5 bytes a sample; only the listing of one class folder
(on S3, or with captions, of the tree) is ever held whole.
"""

from __future__ import annotations

import logging
import posixpath
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from pipeline.config import ImageFolderConfig, S3Config
from pipeline.local_storage import LocalStorage
from pipeline.sources.fields import checked_caption, checked_label, parse_caption, parse_json, printable
from pipeline.sources.plan import Plan, Source, WorkUnit, fingerprint_of, make_plan, mark_of
from pipeline.sources.sample import InputSample, UnusableSampleError
from pipeline.sources.unreadable import read_images
from pipeline.storage import ArtifactError, FileInfo, Storage, open_storage
from tokenization.decoding import IMAGE_SUFFIXES

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision's list, so that the order of a tree is ImageFolder's."""
SIDECARS = (".txt", ".json")
NUM_S3_READS = 16
"""Files of one unit that are under way at once on S3, where each costs a round trip."""
MAX_NAMED_EXTENSIONS = 8
MAX_EXTENSION_CHARS = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """What a unit's `details` are.

    Attributes:
        packed_names: the images' names below the root, NUL between them, compressed.
        label_runs: (label, number of images) in their order; empty where there are no classes.
        packed_sidecars: for each image a byte whose bit i says that it has `SIDECARS[i]`, compressed.
    """

    packed_names: bytes
    label_runs: tuple[tuple[int, int], ...]
    packed_sidecars: bytes


@dataclass(frozen=True, slots=True)
class _ListedImage:
    """One image of a listing: its files (itself first, then its sidecars) with their infos, and its class."""

    files: tuple[tuple[str, FileInfo], ...]
    label: int | None
    sidecar_bits: int


class ImageFolderSource(Source):
    """Image files below a root, in class folders or with captions beside them."""

    def __init__(self, config: ImageFolderConfig, *, s3: S3Config) -> None:
        """Keep the config; touches no file."""
        self._config = config
        self._storage = open_storage(config.root, s3=s3)

    def plan(self) -> Plan:
        """See `Source.plan`."""
        if isinstance(self._storage, LocalStorage) and not self._storage.root.is_dir():
            raise ArtifactError(f"plan source: root must be a folder, got {self._config.root!r}; check source.root")
        class_names: list[str] | None = None
        unseen = Counter[str]()
        if self._config.layout == "class_per_folder":
            folders = _class_folders(self._storage)
            class_names, images = [*map(printable, folders)], _images_of_classes(self._storage, folders, unseen=unseen)
        else:
            images = _captioned_images(self._storage, unseen=unseen)
        units: list[WorkUnit] = []
        while run := list(islice(images, self._config.samples_per_unit)):
            units.append(_make_unit(run, unit_index=len(units), start=len(units) * self._config.samples_per_unit))
        if not units:
            found = "class folders of images" if class_names is not None else "images with captions beside them"
            raise ArtifactError(f"plan source: {self._storage} must hold {found}, got none; check source.root")
        _tell_of_unseen(unseen, where=str(self._storage))
        return make_plan(units, max_samples_per_unit=self._config.samples_per_unit, class_names=class_names)

    def read(self, unit: WorkUnit) -> Iterator[InputSample]:
        """See `Source.read`."""
        files: FolderFiles = unit.details
        names = zlib.decompress(files.packed_names).decode("utf-8", "surrogateescape").split("\0")
        labels = [label for label, number in files.label_runs for _ in range(number)]
        sidecars = zlib.decompress(files.packed_sidecars)
        wanted = [_with_sidecars(name, bits) for name, bits in zip(names, sidecars, strict=True)]
        for position, (name, contents) in enumerate(zip(names, self._contents(wanted), strict=True)):
            source, label = printable(name), labels[position] if labels else None
            try:
                yield self._make_sample(contents, position=position, source=source, label=label)
            except UnusableSampleError as error:
                yield InputSample(position=position, source=source, extra={}, problem=error.problem)

    def _make_sample(
        self, contents: dict[str, bytes] | OSError, *, position: int, source: str, label: int | None
    ) -> InputSample:
        if isinstance(contents, OSError):
            raise UnusableSampleError("unreadable", str(contents.strerror or contents))
        if self._config.layout == "class_per_folder":
            return InputSample(position=position, source=source, data=contents[""], label=label, extra={})
        fields = parse_json(contents[".json"]) if ".json" in contents else {}
        caption, label = fields.pop("caption", None), fields.pop("label", None)
        if ".txt" in contents:
            caption = parse_caption(contents[".txt"])
        if caption is None:
            raise UnusableSampleError("no_caption", "there is no .txt, and no .json with a caption, beside it")
        return InputSample(
            position=position,
            source=source,
            data=contents[""],
            caption=checked_caption(caption),
            label=checked_label(label, num_classes=None),
            extra=fields,
        )

    def _contents(self, wanted: Sequence[dict[str, str]]) -> Iterator[dict[str, bytes] | OSError]:
        """Yield what is in the files of each image, in order; on S3 several are fetched ahead."""
        if isinstance(self._storage, LocalStorage):
            yield from read_images(self._storage.root, wanted)
            return
        waiting: deque[Future[dict[str, bytes] | OSError]] = deque()
        with ThreadPoolExecutor(NUM_S3_READS, thread_name_prefix="fetch") as pool:
            for names in wanted:
                waiting.append(pool.submit(self._read_files, names))
                if len(waiting) == NUM_S3_READS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _read_files(self, names: dict[str, str]) -> dict[str, bytes] | OSError:
        try:
            return {part: self._storage.read_bytes(name) for part, name in names.items()}
        except OSError as error:
            return error


def _with_sidecars(name: str, bits: int) -> dict[str, str]:
    """Return the files of an image: itself under "", its sidecars under their extensions."""
    stem, _ = posixpath.splitext(name)
    return {"": name} | {suffix: stem + suffix for bit, suffix in enumerate(SIDECARS) if bits >> bit & 1}


def _make_unit(images: list[_ListedImage], *, unit_index: int, start: int) -> WorkUnit:
    files = [file for image in images for file in image.files]
    names = "\0".join(image.files[0][0] for image in images)
    return WorkUnit(
        unit_index=unit_index,
        name=f"files {start}..{start + len(images) - 1}",
        fingerprint=fingerprint_of((name, info.num_bytes) for name, info in files),
        mark=mark_of(info for _, info in files),
        details=FolderFiles(
            packed_names=zlib.compress(names.encode("utf-8", "surrogateescape")),
            label_runs=_runs(image.label for image in images),
            packed_sidecars=zlib.compress(bytes(image.sidecar_bits for image in images)),
        ),
    )


def _runs(labels: Iterable[int | None]) -> tuple[tuple[int, int], ...]:
    counts: dict[int, int] = defaultdict(int)  # labels come in ascending runs
    for label in labels:
        if label is not None:
            counts[label] += 1
    return tuple(counts.items())


def _class_folders(storage: Storage) -> dict[str, dict[str, FileInfo] | None]:
    """Return the class folders, sorted, each with its listing where one listing of the tree had to be made anyway."""
    if isinstance(storage, LocalStorage):  # also sees folders that hold nothing
        return dict.fromkeys(storage.folders())
    folders: defaultdict[str, dict[str, FileInfo]] = defaultdict(dict)
    for name, info in storage.list().items():
        folder, slash, _ = name.partition("/")
        if slash:
            folders[folder][name] = info
    return dict(sorted(folders.items()))


def _images_of_classes(
    storage: Storage, folders: dict[str, dict[str, FileInfo] | None], *, unseen: Counter[str]
) -> Iterator[_ListedImage]:
    """Yield the images class by class and count other files; an empty class is an error here as in torchvision."""
    for label, folder in enumerate(folders):
        listing = folders[folder] or storage.list(f"{folder}/")
        names = _sorted_images(listing, extensions=EXTENSIONS)
        unseen.update(_unseen_extensions(listing, images=names))
        if not names:
            raise ArtifactError(
                f"plan source: every class folder must hold images, got none in {storage.url_of(folder)}; remove it"
            )
        yield from (_ListedImage(((name, listing[name]),), label, 0) for name in names)


def _captioned_images(storage: Storage, *, unseen: Counter[str]) -> Iterator[_ListedImage]:
    listing = storage.list()
    names = _sorted_images(listing, extensions=IMAGE_SUFFIXES)
    others = [name for name in listing if not name.endswith(SIDECARS)]
    unseen.update(_unseen_extensions(others, images=names))
    if names and not any(name.endswith(SIDECARS) for name in listing):
        raise ArtifactError(
            f"plan source: images of {storage} must have captions beside them (NAME.txt or NAME.json), got none; "
            "use layout: class_per_folder or check source.root"
        )
    for name in names:
        stem, _ = posixpath.splitext(name)
        sidecars = [stem + suffix for suffix in SIDECARS]
        files = [(name, listing[name]), *((side, listing[side]) for side in sidecars if side in listing)]
        bits = sum(1 << bit for bit, side in enumerate(sidecars) if side in listing)
        yield _ListedImage(tuple(files), None, bits)


def _sorted_images(listing: dict[str, FileInfo], *, extensions: tuple[str, ...]) -> list[str]:
    """Return the names of images in torchvision's order: all of a folder, then those of the folders in it."""
    images = [name for name in listing if name.lower().endswith(extensions)]
    return sorted(images, key=lambda name: name.rpartition("/"))


def _unseen_extensions(names: Iterable[str], *, images: Iterable[str]) -> Iterator[str]:
    """Yield the extension of each file that is none of the images."""
    for name in set(names).difference(images):
        yield posixpath.splitext(name)[1] or "none"


def _tell_of_unseen(num_of: Counter[str], *, where: str) -> None:
    """Say in the log how many files of which extensions are not seen, the commonest first."""
    if not num_of:
        return
    ordered = sorted(num_of.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{printable(extension)[:MAX_EXTENSION_CHARS]} {number}" for extension, number in ordered]
    num_more = len(named) - MAX_NAMED_EXTENSIONS
    logger.warning(
        "plan source: %d files below %s are not seen, since their names do not end as those of images: %s",
        num_of.total(),
        where,
        ", ".join(named[:MAX_NAMED_EXTENSIONS]) + (f" and {num_more} other endings" if num_more > 0 else ""),
    )
