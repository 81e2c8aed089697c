"""The members of a tar as samples, by webdataset's rules.

The invariant: every member that webdataset would see is in a sample, and so is a link that is named as one. What is odd
about a sample is that sample's problem, what is odd about the tar an error (`pipeline.tars`), never a shorter corpus.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipeline.config import S3Config
from pipeline.sources.fields import checked_caption, checked_label, parse_caption, parse_json, parse_label
from pipeline.sources.sample import InputSample, UnusableSampleError
from pipeline.storage import ArtifactError, next_action, open_storage, split_url
from pipeline.tars import read_members
from tokenization.decoding import IMAGE_SUFFIXES

IMAGE_EXTENSIONS = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
TEXT_EXTENSIONS = frozenset(("txt", "json", "cls"))
_MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META_NAME = re.compile(r"__[^/]*__($|/)")

Members = list[tuple[str, bytes | None]]
"""The members of one sample: lower-case extension and data, None for a link."""


def read_groups(url: str, *, s3: S3Config) -> Iterator[tuple[str, Members]]:
    """Yield (key, members) of a tar by webdataset's rules: first dot splits, neighbours with one key belong together.

    Raises:
        ArtifactError: the tar cannot be opened, is cut short, damaged or compressed.
    """
    directory, name = split_url(url)
    key, members = "", Members()
    try:
        with open_storage(directory, s3=s3).open(name) as file:
            for member in read_members(file, where=url):
                match = _MEMBER_NAME.match(member.name)
                if match is None or _META_NAME.match(member.name):
                    continue
                extension = match.group(2).lower()
                if member.data is None and extension not in IMAGE_EXTENSIONS | TEXT_EXTENSIONS:
                    continue
                if members and match.group(1) != key:
                    yield key, members
                    members = []
                key = match.group(1)
                members.append((extension, member.data))
    except OSError as error:
        action = next_action(error, otherwise="fetch or write it again")
        raise ArtifactError(f"read {url}: must be readable, got {error}; {action}") from error
    if members:
        yield key, members


def make_sample(
    members: Members,
    *,
    position: int,
    source: str,
    caption_field: str = "caption",
    label_field: str = "label",
    num_classes: int | None = None,
) -> InputSample:
    """Return a sample of one image with what its `json`, `txt` and `cls` members say; `txt` and `cls` win.

    Args:
        members: as `read_groups` yields them.
        position: its place in the work unit.
        source: its key, printable.
        caption_field: the JSON field that holds the caption.
        label_field: the JSON field that holds the label.
        num_classes: labels must be below it; None if the classes are not known.

    Raises:
        UnusableSampleError: there is not exactly one image, or a field cannot be used.
    """
    image, texts = split_members(members)
    fields = parse_json(texts["json"]) if "json" in texts else {}
    caption, label = fields.pop(caption_field, None), fields.pop(label_field, None)
    if "txt" in texts:
        caption = parse_caption(texts["txt"])
    if "cls" in texts:
        label = parse_label(texts["cls"])
    return InputSample(
        position=position,
        source=source,
        data=image,
        caption=checked_caption(caption),
        label=checked_label(label, num_classes=num_classes),
        extra=fields,
    )


def split_members(members: Members) -> tuple[bytes, dict[str, bytes]]:
    """Return the image of a sample and its other members by extension.

    Raises:
        UnusableSampleError: a member is a link, an extension stands there twice, or there is not exactly one image.
    """
    texts = {extension: data for extension, data in members if data is not None}
    if any(data is None for _, data in members):
        detail = f"{_named(members)}, a link among them; write the tar with --dereference and --hard-dereference"
        raise UnusableSampleError("link", detail)
    if len(texts) < len(members):
        raise UnusableSampleError("duplicate_member", _named(members))
    images = [extension for extension in texts if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise UnusableSampleError("several_images" if images else "no_image", _named(members))
    return texts.pop(images[0]), texts


def _named(members: Members) -> str:
    return f"members {', '.join(extension for extension, _ in members)}"
