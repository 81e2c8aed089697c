"""The library of native ops: what is told, before training starts, where it is missing, stale or lacks CUDA."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from synthetic_shards import train_config, write_shard_set

from jobs.demo import run_demo
from jobs.inputs import check_inputs
from tokenization.compiler import BuildError, compile_library, digest_of
from training import build_ops, ops
from training.build_ops import build_library, nvcc_for_build
from training.loop import train
from training.ops import NativeOpError, check_ops


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the library is looked for, as by a process that has not loaded it yet."""
    path = tmp_path / "_ops.so"
    monkeypatch.setattr(ops, "LIBRARY", path)
    monkeypatch.setattr(ops, "_loaded", False)
    return path


NEXT = "run `tensorar build-ops`, or set engine.ops (of a sample job: ops): reference"


def test_a_run_without_the_library_is_told_what_to_do_before_it_starts(library: Path, tmp_path: Path) -> None:
    config = train_config(tmp_path / "run", shards=write_shard_set(tmp_path / "set"))
    told = re.escape(f"load native ops {library}: there is no such file; {NEXT}")
    with pytest.raises(NativeOpError, match=told):
        check_inputs(config, is_new=True)
    with pytest.raises(NativeOpError, match=told):
        train(config)
    engine = config.engine.model_copy(update={"ops": "reference"})
    check_inputs(config.model_copy(update={"engine": engine}), is_new=True)


def test_the_demo_tells_of_a_missing_library_before_its_first_stage(library: Path, tmp_path: Path) -> None:
    told = f"{NEXT}; for the demo: tensorar demo --set base.engine.ops=reference --set tensorar.engine.ops=reference"
    with pytest.raises(NativeOpError, match=re.escape(told)):
        run_demo(run_root=tmp_path / "runs", data_root=tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_what_editors_leave_beside_the_sources_makes_no_library_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(build_ops.SOURCES, sources)
    (sources / ".ipynb_checkpoints").mkdir()
    for name in (".mix_windows.cu.swp", "mix_windows.cu~", ".#philox.h"):
        (sources / name).write_text("half a line")
    monkeypatch.setattr(build_ops, "SOURCES", sources)
    check_ops(with_cuda=False)


def test_sources_have_the_same_digest_wherever_their_directories_lie(tmp_path: Path) -> None:
    digests = set()
    for place in ("a/one.cpp", "z/one.cpp"):
        paths = [tmp_path / place, tmp_path / "m" / "two.h"]
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"// {path.name}\n")
        digests |= {digest_of(paths), digest_of(reversed(paths))}
    assert len(digests) == 1


def test_a_library_of_other_sources_is_refused(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(build_ops.LIBRARY, library)
    sources = tmp_path / "csrc"
    shutil.copytree(build_ops.SOURCES, sources)
    with (sources / "philox.h").open("a") as file:
        file.write("\n")
    monkeypatch.setattr(build_ops, "SOURCES", sources)
    with pytest.raises(NativeOpError, match=re.escape(f"built from the sources beside it, which have changed; {NEXT}")):
        check_ops(with_cuda=False)


def test_a_library_that_does_not_load_is_an_error(library: Path) -> None:
    library.write_bytes(ops.sources_mark().encode())
    with pytest.raises(NativeOpError, match=re.escape(NEXT)):
        check_ops(with_cuda=False)


def test_a_library_without_cuda_kernels_is_refused_for_a_run_on_cuda(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.write_bytes(ops.sources_mark().encode())
    monkeypatch.setattr(ops, "_loaded", True)
    with pytest.raises(NativeOpError, match="TENSORAR_CUDA=1"):
        check_ops(with_cuda=True)
    library.write_bytes(ops.sources_mark(has_cuda=True).encode())
    check_ops(with_cuda=True)


def test_a_missing_compiler_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"C\+\+20 compiler must be on PATH or named by CXX, got no-such-compiler"):
        build_library([build_ops.SOURCES / "library.cpp"], tmp_path / "_ops.so")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_compiler_is_shown_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("this is no C++;\n")
    with pytest.raises(BuildError, match=r"(?s)failed:.*broken\.cpp"):
        build_library([source], tmp_path / "_ops.so")
    assert list(tmp_path.iterdir()) == [source]


def test_a_build_that_is_killed_leaves_nothing_beside_the_library(tmp_path: Path) -> None:
    compiler, package = tmp_path / "compiler", tmp_path / "package"
    compiler.write_text("#!/bin/sh\nkill -9 $PPID\n")
    compiler.chmod(0o755)
    package.mkdir()
    code = (
        "from pathlib import Path; from tokenization.compiler import compile_library; "
        f"compile_library([Path('x.cpp')], Path({str(package / '_ops.so')!r}), flags=())"
    )
    environment = os.environ | {"CXX": str(compiler), "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -9
    assert list(package.iterdir()) == []


def test_builds_at_the_same_time_in_containers_that_share_the_checkout_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, package, copied = tmp_path / "one.cpp", tmp_path / "package", threading.Barrier(2)
    source.write_text(
        '#ifdef IS_BASELINE\nextern "C" __attribute__((visibility("default"))) int one() { return 1; }\n#endif\n'
    )
    package.mkdir()

    def copy_beside_another(linked: Path, staged: Path) -> None:
        shutil.copyfile(linked, staged)
        copied.wait(timeout=60)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(os, "getpid", lambda: 1)  # as each container has it
        patch.setattr(shutil, "copy", copy_beside_another)
        builds = [pool.submit(compile_library, [source], package / "_one.so", flags=()) for _ in range(2)]
        assert [build.exception() for build in builds] == [None, None]
    assert [path.name for path in package.iterdir()] == ["_one.so"]
    assert ctypes.CDLL(str(package / "_one.so")).one() == 1


def test_cuda_is_built_where_it_can_be_and_insisted_on_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORAR_CUDA", "0")
    assert nvcc_for_build() is None
    monkeypatch.setenv("TENSORAR_CUDA", "yes")
    with pytest.raises(BuildError, match="must be auto, 0 or 1, got 'yes'"):
        nvcc_for_build()
    monkeypatch.setenv("TENSORAR_CUDA", "1")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match="TENSORAR_CUDA=1 needs nvcc on PATH"):
        nvcc_for_build()
