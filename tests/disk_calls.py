"""What a process asks of its disk, in order: which file or directory is synced, renamed or removed."""

import os
from pathlib import Path

import pytest

from pipeline.local_storage import STAGED_PREFIX


def record_disk_calls(monkeypatch: pytest.MonkeyPatch, *, root: Path) -> list[str]:
    """A list that fills with `fsync NAME`, `rename to NAME`, `unlink NAME`; names are below `root`, staged ones `*`."""
    calls: list[str] = []
    fsync, unlink = os.fsync, os.unlink

    def told(path: str | os.PathLike[str]) -> str:
        name = Path(path).relative_to(root)
        return str(name.with_name("*") if name.name.startswith(STAGED_PREFIX) else name)

    def watched_fsync(descriptor: int) -> None:
        calls.append(f"fsync {told(Path(f'/proc/self/fd/{descriptor}').readlink())}")
        fsync(descriptor)

    def watched_unlink(path: Path) -> None:
        calls.append(f"unlink {told(path)}")
        unlink(path)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "unlink", watched_unlink)
    for name in ("replace", "rename"):
        rename = getattr(os, name)

        def watched_rename(old: Path, new: Path, rename: object = rename) -> None:
            calls.append(f"rename to {told(new)}")
            rename(old, new)  # type: ignore[operator]

        monkeypatch.setattr(os, name, watched_rename)
    return calls
