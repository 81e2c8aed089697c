"""The preview page: self-contained, escaped, true, and refused for codes of another tokenizer."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from toy_corpus import png, sample_members, tokenize_config, tokenize_here, write_tar, write_tiny_tokenizer

from jobs.cli import main
from pipeline.ledger import read_manifest
from pipeline.preview import write_preview
from pipeline.shards import read_shard
from pipeline.storage import ArtifactError, open_storage
from tokenization.tokenizer import Tokenizer

EVIL = '<script>alert(1)</script> & "friends"'


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preview")
    weights = write_tiny_tokenizer(root / "tiny.safetensors")
    for tar in range(3):
        members = [member for number in range(6) for member in sample_members(6 * tar + number)]
        write_tar(root / "tars" / f"{tar}.tar", members)
    write_tar(
        root / "tars" / "3.tar",
        [*sample_members(18, caption=EVIL, label=1), (f"{EVIL}.png", b"no image"), ("x.png", png(0)[:-30])],
    )
    (root / "classes.txt").write_text("apple\nb<e>ar\ncar\n")
    source = {"kind": "webdataset", "urls": [f"{root}/tars/*.tar"], "class_names": f"{root}/classes.txt"}
    tokenize_here(tokenize_config(root / "set", source=source, weights=weights))
    return root / "set"


@pytest.fixture(scope="module")
def page(shard_set: Path) -> str:
    path = write_preview(open_storage(str(shard_set)), num_samples=100)
    assert path == str(shard_set / "preview.html")
    return Path(path).read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    assert set(re.findall(r'(?:src|href)="(.{0,15})', page)) == {"data:image/png;"}
    assert "http" not in page
    assert "<script" not in page


def test_what_comes_from_the_corpus_is_escaped(page: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;friends&#34;" in page
    assert "b&lt;e&gt;ar" in page


def test_pictures_are_the_decoded_codes_of_all_samples_in_order(shard_set: Path, page: str) -> None:
    storage = open_storage(str(shard_set))
    names = [f"shards/{path.name}" for path in sorted(shard_set.glob("shards/*.tar"))]
    codes = [sample.codes_VT[0] for name in names for sample in read_shard(storage, name)]
    expected = Tokenizer.load(read_manifest(storage).tokenizer).decode(np.stack(codes))
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]
    assert len(shown) == 19
    np.testing.assert_array_equal(np.stack(shown), expected)


def test_figures_are_those_of_the_codes_and_the_ledger(shard_set: Path, page: str) -> None:
    used = {
        int(code)
        for path in shard_set.glob("shards/*.tar")
        for sample in read_shard(open_storage(str(shard_set)), f"shards/{path.name}")
        for code in sample.codes_VT.flat
    }
    assert f"<strong>{len(used)}</strong> of 64 codes used" in page
    assert "21 read =" in page
    assert "19 written" in page
    assert "decode/truncated" in page
    assert "decode/unknown_format" in page
    assert page.count('<td class="mono">0000') == 4 + 2


def test_few_pictures_are_spread_over_the_set(shard_set: Path, tmp_path: Path) -> None:
    write_preview(open_storage(str(shard_set)), output=tmp_path / "p.html", num_samples=4)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert re.findall(r"<code>(\d+)</code>\s*</figcaption>", page) == ["0000000", "0000004", "0000103", "0000202"]


def test_the_page_goes_where_the_command_says_below_the_home_of_the_user(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = CliRunner().invoke(main, ["preview", str(shard_set), "--output", "~/page.html"])
    assert (result.exit_code, result.output) == (0, f"preview: {tmp_path}/page.html\n")
    assert (tmp_path / "page.html").is_file()


def test_another_tokenizer_is_refused(shard_set: Path, tmp_path: Path) -> None:
    text = (shard_set / "manifest.json").read_text()
    other = write_tiny_tokenizer(tmp_path / "tiny.safetensors", seed=1)
    (tmp_path / "manifest.json").write_text(re.sub(r'"weights": "[^"]+"', f'"weights": "{other}"', text))
    with pytest.raises(ArtifactError, match="put the old weights back"):
        write_preview(open_storage(str(tmp_path)))
