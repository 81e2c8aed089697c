"""A shard set as one HTML page: decoded codes beside captions, codebook usage, ledger totals, rejects, shards.

The page is self-contained (inline CSS, SVG and PNG, no scripts), escapes all that comes from the corpus, and refuses to
decode with another tokenizer than the one that made the codes. Its cost does not grow with the set: samples are taken
at even distances, and long tables are cut, saying so.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.ledger import Manifest, read_manifest, read_record, stem_of
from pipeline.local_storage import write_bytes
from pipeline.rejects import Reject, read_rejects
from pipeline.set_tokenizer import load_set_tokenizer
from pipeline.shards import ShardSample, open_shard
from pipeline.storage import Storage
from tokenization.tokenizer import Tokenizer

PAGE_NAME = "preview.html"
MAX_USAGE_SAMPLES = 20_000
MAX_SHARD_LINES = 200
MAX_REJECT_LINES = 50
NUM_HISTOGRAM_BARS = 96


@dataclass(frozen=True, kw_only=True)
class CodebookUsage:
    """How often codes occur.

    Attributes:
        num_used: different codes seen.
        codebook_size: codes there are.
        perplexity: effective number of codes, 2 to the entropy; equals `codebook_size` if all are equally frequent.
        num_samples: samples looked at.
        bars: mean share of all codes that a code of the bar has, most frequent codes first, each in [0, 1].
    """

    num_used: int
    codebook_size: int
    perplexity: float
    num_samples: int
    bars: tuple[float, ...]


def write_preview(storage: Storage, *, output: Path | None = None, num_samples: int = 48) -> str:
    """Write the page of a finished shard set and return its path or URL.

    Args:
        storage: the `run_dir` of a tokenize job.
        output: the page; `preview.html` in the set if none.
        num_samples: pictures to show, taken at even distances over the set.

    Raises:
        ArtifactError: the set is not finished or damaged, or its tokenizer has changed since.
    """
    manifest = read_manifest(storage)
    tokenizer = load_set_tokenizer(manifest, manifest.tokenizer, doing=f"preview {storage}")
    shown = list(_spread_samples(storage, manifest, num_samples=num_samples))
    page = (
        _environment()
        .get_template("preview.html.j2")
        .render(
            name=storage.url.rpartition("/")[2] or storage.url,
            manifest=manifest,
            totals=manifest.totals,
            num_bytes=sum(shard.bytes for shard in manifest.shards),
            samples=_picture_fields(shown, tokenizer, class_names=manifest.class_names),
            usage=_codebook_usage(storage, manifest),
            rejects=list(islice(_rejects(storage), MAX_REJECT_LINES)),
            shards=_shard_fields(storage, manifest),
        )
    )
    if output is not None:
        write_bytes(output, page.encode())
        return str(output)
    storage.write_bytes(PAGE_NAME, page.encode())
    return storage.url_of(PAGE_NAME)


def png_data_uri(image_HWC: npt.NDArray[np.uint8]) -> str:
    """Return an image, uint8 RGB `(H, W, 3)`, as a PNG `data:` URI."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["size"] = _readable_size
    environment.filters["number"] = lambda value: f"{value:,}"
    return environment


def _readable_size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _spread_samples(storage: Storage, manifest: Manifest, *, num_samples: int) -> Iterator[ShardSample]:
    """Yield up to `num_samples` samples at even distances over the set, opening each shard at most once."""
    num_shown = min(num_samples, manifest.num_samples)
    wanted = [number * manifest.num_samples // num_shown for number in range(num_shown)]
    start = next_wanted = 0
    for shard in manifest.shards:
        end = start + shard.num_samples
        if next_wanted < num_shown and wanted[next_wanted] < end:
            reader = open_shard(storage, f"shards/{shard.name}")
            while next_wanted < num_shown and wanted[next_wanted] < end:
                yield reader.sample(wanted[next_wanted] - start)
                next_wanted += 1
        start = end


def _picture_fields(
    samples: list[ShardSample], tokenizer: Tokenizer, *, class_names: list[str] | None
) -> list[dict[str, str]]:
    """Return what the template shows of each sample: the picture of view 0, key, class and caption."""
    if not samples:
        return []
    images_NHWC = tokenizer.decode(np.stack([sample.codes_VT[0] for sample in samples]))
    fields = []
    for sample, image_HWC in zip(samples, images_NHWC, strict=True):
        label = sample.metadata["label"]
        class_name = "" if label is None else str(label)
        if class_names is not None and label is not None and label < len(class_names):
            class_name = class_names[label]
        fields.append(
            {
                "image": png_data_uri(image_HWC),
                "key": sample.key,
                "class_name": class_name,
                "caption": sample.metadata["caption"] or "",
                "source": f"{sample.metadata['source']} ({sample.metadata['width']} x {sample.metadata['height']} px)",
            }
        )
    return fields


def _codebook_usage(storage: Storage, manifest: Manifest) -> CodebookUsage:
    codebook_size = manifest.fingerprint.network.codebook_size
    counts = np.zeros(codebook_size, dtype=np.int64)
    num_samples = 0
    for sample in _spread_samples(storage, manifest, num_samples=MAX_USAGE_SAMPLES):
        counts += np.bincount(sample.codes_VT.ravel(), minlength=codebook_size)
        num_samples += 1
    share = np.sort(counts)[::-1] / max(1, counts.sum())
    positive = share[share > 0]
    bars = [float(part.mean()) for part in np.array_split(share, min(NUM_HISTOGRAM_BARS, codebook_size))]
    return CodebookUsage(
        num_used=int((counts > 0).sum()),
        codebook_size=codebook_size,
        perplexity=float(2 ** -(positive * np.log2(positive)).sum()) if len(positive) else 0.0,
        num_samples=num_samples,
        bars=tuple(bars),
    )


def _rejects(storage: Storage) -> Iterator[Reject]:
    for name in storage.list("rejects/"):
        yield from read_rejects(storage, name)


def _shard_fields(storage: Storage, manifest: Manifest) -> list[dict[str, object]]:
    """Return a line per shard for the table, the first `MAX_SHARD_LINES` of them."""
    fields: list[dict[str, object]] = []
    for shard in manifest.shards[:MAX_SHARD_LINES]:
        record = read_record(storage, stem_of(shard.name))
        seconds = sum(record.seconds_of_stage.values())
        fields.append({"shard": shard, "unit": record.unit, "counts": record.counts, "seconds": seconds})
    return fields
