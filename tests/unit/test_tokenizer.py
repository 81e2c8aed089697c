"""The tokenizer: shapes, padding, fingerprint, file kinds, errors, and the shipped weights."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tokenization.config import NETWORKS, TokenizerConfig, VQConfig
from tokenization.fingerprint import Fingerprint
from tokenization.reconstruction import psnr_of_images
from tokenization.tokenizer import Tokenizer
from tokenization.vq import VQNetwork
from tokenization.weights_file import SHIPPED_DIR, hash_weights, read_weights, write_weights

TINY = VQConfig(codebook_size=64, channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=32)
SHIPPED = TokenizerConfig(weights="open-emoji-64", image_size_px=64)
HELD_OUT = Path(__file__).parents[1] / "data" / "held_out_emoji"


def tiny_state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return VQNetwork(TINY).state_dict()


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.safetensors"
    write_weights(path, network=TINY, state=tiny_state(), metadata={})
    return path


def tiny_config(path: Path, **changes: object) -> TokenizerConfig:
    return TokenizerConfig.model_validate({"weights": str(path), "image_size_px": 16, "batch_size": 4, **changes})


def noise(num_images: int, side_px: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_images, side_px, side_px, 3), dtype=np.uint8)


def test_encode_and_decode_have_the_promised_shapes(tiny_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_config(tiny_path))
    assert (tokenizer.codebook_size, tokenizer.codes_per_side, tokenizer.codes_per_image) == (64, 8, 64)
    for num_images in (0, 1, 4, 7):
        codes_NT = tokenizer.encode(noise(num_images))
        assert (codes_NT.shape, codes_NT.dtype) == ((num_images, 64), np.int32)
        images_NHWC = tokenizer.decode(codes_NT.astype(np.uint16))
        assert (images_NHWC.shape, images_NHWC.dtype) == ((num_images, 16, 16, 3), np.uint8)


def test_codes_do_not_depend_on_neighbours_or_number_of_images() -> None:
    tokenizer = Tokenizer.load(SHIPPED)
    images = held_out_images()
    together = tokenizer.encode(images)
    order = np.random.default_rng(0).permutation(len(images))
    np.testing.assert_array_equal(tokenizer.encode(images[order]), together[order])
    np.testing.assert_array_equal(tokenizer.encode(images[3:8]), together[3:8])
    np.testing.assert_array_equal(tokenizer.decode(together[order])[:5], tokenizer.decode(together[order[:5]]))


def test_codes_equal_those_of_the_bare_network(tiny_path: Path) -> None:
    network = VQNetwork(TINY)
    network.load_state_dict(tiny_state())
    images = noise(4)
    with torch.no_grad():
        codes = network.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    np.testing.assert_array_equal(Tokenizer.load(tiny_config(tiny_path)).encode(images), codes.numpy())


def test_bfloat16_changes_some_codes_and_float32_is_the_default() -> None:
    images = held_out_images()[:32]
    exact = Tokenizer.load(SHIPPED).encode(images)
    rough = Tokenizer.load(SHIPPED.model_copy(update={"dtype": "bfloat16"})).encode(images)
    assert 0.8 < (exact == rough).mean() < 1.0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (noise(2).astype(np.float32), "got float32"),
        (noise(2, side_px=32), r"got uint8 \(2, 32, 32, 3\)"),
        (noise(2)[..., 0], r"got uint8 \(2, 16, 16\)"),
    ],
    ids=["dtype", "side", "grey"],
)
def test_encode_refuses_other_images(tiny_path: Path, images: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=r"encoding images: they must be uint8 of shape \(N, 16, 16, 3\).*" + message):
        Tokenizer.load(tiny_config(tiny_path)).encode(images)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full((1, 64), 64), r"in 0\.\.63, got 64\.\.64; decode with the tokenizer that made the codes"),
        (np.full((1, 64), -1), r"in 0\.\.63, got -1\.\.-1"),
        (np.zeros((1, 2, 64), dtype=np.int64), r"shape \(N, 64\), got int64 \(1, 2, 64\)"),
        (np.zeros((1, 64)), r"integers of shape \(N, 64\), got float64"),
    ],
    ids=["above", "below", "views", "dtype"],
)
def test_decode_refuses_other_codes(tiny_path: Path, codes: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tiny_config(tiny_path)).decode(codes)


def test_fingerprint_changes_with_everything_that_changes_codes(tiny_path: Path, tmp_path: Path) -> None:
    other_weights = tmp_path / "other.safetensors"
    write_weights(other_weights, network=TINY, state=tiny_state(seed=1), metadata={})
    configs = [
        tiny_config(tiny_path),
        tiny_config(other_weights),
        tiny_config(tiny_path, image_size_px=32),
        tiny_config(tiny_path, batch_size=8),
        tiny_config(tiny_path, dtype="bfloat16"),
    ]
    fingerprints = [Tokenizer.load(config).fingerprint for config in configs]
    first = fingerprints[0]
    fingerprints.append(first.model_copy(update={"network": VQConfig()}))
    fingerprints.append(first.model_copy(update={"code_version": 2}))
    fingerprints.append(first.model_copy(update={"preprocessing": "another"}))
    assert len({fingerprint.digest for fingerprint in fingerprints}) == len(fingerprints)
    assert Fingerprint.model_validate_json(first.model_dump_json()).digest == first.digest


def test_digest_is_the_hash_of_the_canonical_json() -> None:
    fingerprint = Fingerprint(
        weights_sha256="ab", network=TINY, image_size_px=16, batch_size=4, dtype="float32", code_version=1
    )
    canonical = (
        '{"batch_size":4,"code_version":1,"compile_mode":"none","dtype":"float32","image_size_px":16,"network":{"channel_multipliers":[1,1],'
        '"channels":32,"code_dim":8,"codebook_size":64,"num_norm_groups":32,"num_res_blocks":1,"stem_patch_px":1,"z_channels":32},'
        '"preprocessing":"adm_bicubic_v1","weights_sha256":"ab"}'
    )
    assert fingerprint.digest == hashlib.sha256(canonical.encode()).hexdigest()[:16]


def test_llamagens_file_gives_the_same_weights_as_ours(tmp_path: Path) -> None:
    path = tmp_path / "vq_ds2.pt"
    torch.save({"model": tiny_state()}, path)
    weights = read_weights(path, network=TINY)
    assert "quantize.codebook_used" not in weights.state
    assert weights.sha256 == hash_weights(tiny_state())
    bare = tmp_path / "bare.safetensors"
    save_file({name: value for name, value in tiny_state().items() if name != "quantize.codebook_used"}, bare)
    assert read_weights(bare, network=TINY).sha256 == weights.sha256


@pytest.mark.slow
def test_full_size_pt_file_loads_and_encodes(tmp_path: Path) -> None:
    path = tmp_path / "vq_ds8_c2i.pt"
    torch.manual_seed(0)
    torch.save({"model": VQNetwork(NETWORKS["vq8"]).state_dict()}, path)
    tokenizer = Tokenizer.load(TokenizerConfig(weights=str(path), network="vq8", image_size_px=64, batch_size=1))
    assert tokenizer.encode(noise(1, side_px=64)).shape == (1, 64)
    assert tokenizer.codebook_size == 16384


def damaged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = dict(state)
    state["extra.weight"] = state.pop("quant_conv.bias")
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"][:, :2].clone()
    return state


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "misfit.safetensors"
    write_weights(path, network=TINY, state=damaged(tiny_state()), metadata={})
    with pytest.raises(ValueError, match="must fit the network") as caught:
        read_weights(path)
    message = str(caught.value)
    assert "quant_conv.bias is missing" in message
    assert "extra.weight is unexpected" in message
    assert "encoder.conv_in.weight has shape (32, 2, 3, 3) instead of (32, 3, 3, 3)" in message


def test_changed_and_cut_files_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    whole = tiny_path.read_bytes()
    changed, cut = tmp_path / "changed.safetensors", tmp_path / "cut.safetensors"
    changed.write_bytes(whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:])
    cut.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"sha256 of the weights must be .*the file is damaged, get it again"):
        read_weights(changed)
    with pytest.raises(ValueError, match="the file must be whole safetensors"):
        read_weights(cut)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    state = tiny_state()
    state["decoder.conv_out.bias"][1] = value
    write_weights(tmp_path / "ours.safetensors", network=TINY, state=state, metadata={})
    torch.save({"model": state}, tmp_path / "theirs.pt")
    for name in ("ours.safetensors", "theirs.pt"):
        with pytest.raises(ValueError, match=r"NaN or infinity in 1 tensors, decoder.conv_out.bias first; use other"):
            read_weights(tmp_path / name, network=TINY)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "invalid JSON"),
        ("[]", "should be an object"),
        ('{"format_version": 1, "weights_sha256": "ab"}', "network: field required"),
        ('{"format_version": 2, "network": {}, "weights_sha256": "ab"}', "format_version: input should be 1"),
        ('{"format_version": 1, "network": {"channels": "many"}, "weights_sha256": "ab"}', "network.channels: input"),
    ],
    ids=["no JSON", "a list", "no network", "a later version", "no shape"],
)
def test_a_file_whose_metadata_is_not_ours_is_named(tmp_path: Path, metadata: str, message: str) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"quant_conv.bias": torch.zeros(1)}, path, metadata={"tensorar-tokenizer": metadata})
    with pytest.raises(
        ValueError, match=f"loading tokenizer {path}: metadata .* a version 1 header, got .*{message}.*; use the tensor"
    ):
        read_weights(path)


def test_a_tilde_is_the_home_directory(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_path.parent))
    assert Tokenizer.load(tiny_config(Path("~") / tiny_path.name)).codebook_size == 64


class TouchesOnLoading:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_file_that_runs_code_on_loading_is_refused_and_does_not_run_it(tmp_path: Path) -> None:
    path, trace = tmp_path / "pickled.pt", tmp_path / "trace"
    torch.save({"model": tiny_state(), "args": TouchesOnLoading(trace)}, path)
    with pytest.raises(ValueError, match="must hold nothing but tensors and plain values"):
        read_weights(path, network=NETWORKS["vq8"])
    assert not trace.exists()


def test_other_wrong_files_say_what_to_do(tiny_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.pt"
    text.write_text("not weights")
    with pytest.raises(ValueError, match="must hold nothing but tensors"):
        read_weights(text, network=NETWORKS["vq8"])
    model = tmp_path / "model.pt"
    torch.save({"model": tiny_state()}, model)
    with pytest.raises(ValueError, match=r"set tokenizer\.network to one of vq16, vq8"):
        read_weights(model)
    with pytest.raises(ValueError, match=r"must be the spec's, VQConfig\(.*leave tokenizer\.network out"):
        Tokenizer.load(tiny_config(tiny_path, network="vq8"))
    with pytest.raises(FileNotFoundError, match=r"loading tokenizer nowhere: .*shipped name \(open-emoji-64\)"):
        Tokenizer.load(tiny_config(Path("nowhere")))
    with pytest.raises(ValueError, match="image_size_px must be a multiple of 2, got 17; use 16 or 18"):
        Tokenizer.load(tiny_config(tiny_path, image_size_px=17))


@pytest.mark.gpu
def test_a_gpu_gives_nearly_the_same_codes() -> None:
    images = held_out_images()
    on_gpu = Tokenizer.load(SHIPPED, device="cuda").encode(images)
    assert (on_gpu == Tokenizer.load(SHIPPED).encode(images)).mean() > 0.995


def held_out_images() -> np.ndarray:
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(HELD_OUT.glob("*.png"))])


def test_shipped_weights_reconstruct_held_out_images() -> None:
    images = held_out_images()
    assert images.shape == (64, 64, 64, 3)
    tokenizer = Tokenizer.load(SHIPPED)
    codes_NT = tokenizer.encode(images)
    assert psnr_of_images(tokenizer.decode(codes_NT), images).mean() > 22.5
    assert len(np.unique(codes_NT)) > 400


def test_shipped_file_is_small_and_says_what_it_is() -> None:
    path = SHIPPED_DIR / "open-emoji-64.safetensors"
    assert path.stat().st_size <= 6_000_000
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["tensorar-tokenizer"])
        assert file.get_tensor("quant_conv.weight").dtype == torch.float16
    fingerprint = Fingerprint.model_validate(metadata["fingerprint"])
    assert fingerprint == Tokenizer.load(SHIPPED).fingerprint
    assert fingerprint.network.codebook_size == metadata["train_codes_used"] == 512
    assert metadata["step"] == metadata["fit"]["num_steps"]
    assert metadata["held_out_psnr_db"] >= 22.5


def test_psnr_of_known_errors() -> None:
    black = np.zeros((3, 2, 2, 3), dtype=np.uint8)
    off = black.copy()
    off[1] += 1
    off[2] += 255
    np.testing.assert_allclose(psnr_of_images(off, black), [78.13, 48.13, 0.0], atol=0.01)


@pytest.mark.slow
def test_a_compiled_encoder_gives_nearly_the_same_codes_under_a_fingerprint_of_its_own() -> None:
    images = held_out_images()
    compiled = Tokenizer.load(SHIPPED.model_copy(update={"compile_mode": "default"}))
    assert (compiled.encode(images) == Tokenizer.load(SHIPPED).encode(images)).mean() > 0.995
    assert compiled.fingerprint.digest != Tokenizer.load(SHIPPED).fingerprint.digest


def test_the_network_sees_one_batch_shape_only(tiny_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_config(tiny_path))
    seen: list[tuple[int, ...]] = []
    network = tokenizer._network
    network.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    network.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:1])))
    tokenizer.decode(tokenizer.encode(noise(7)))
    assert seen == [(4, 3, 16, 16), (4, 3, 16, 16), (4,), (4,)]
