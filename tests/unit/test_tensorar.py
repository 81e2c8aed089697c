"""TensorAR modules: exact around a base at the start, equal to plain attention, blind beyond the image's end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training.config import ModelConfig
from training.gpt import RMSNorm, attend
from training.noise import make_windows
from training.tensorar import InputEncoder, OutputDecoder, TensorAR, build_model, has_tables, split_heads


def _config(*, window_size: int = 4, codebook_size: int = 24) -> ModelConfig:
    return ModelConfig(
        num_layers=2,
        num_heads=2,
        model_dim=16,
        codebook_size=codebook_size,
        codes_per_side=3,
        num_classes=5,
        window_size=window_size,
        dropout=0.0,
    )


def _base_with_a_head() -> TensorAR:
    torch.manual_seed(0)
    base = build_model(_config(window_size=1))
    torch.nn.init.normal_(base.base.output.weight)
    return base


def _randomise(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window_size", [2, 4, 9])
@pytest.mark.parametrize("codebook_size", [24, 200])  # with tables of (code, offset), and without
def test_fresh_modules_leave_the_base_logits_untouched_at_every_offset(
    dtype: torch.dtype, window_size: int, codebook_size: int
) -> None:
    torch.manual_seed(0)
    plain = build_model(_config(window_size=1, codebook_size=codebook_size))
    torch.nn.init.normal_(plain.base.output.weight)
    wrapped = build_model(_config(window_size=window_size, codebook_size=codebook_size))
    wrapped.base.load_state_dict(plain.base.state_dict())
    plain, wrapped = plain.to(dtype), wrapped.to(dtype)
    codes, labels = torch.randint(0, codebook_size, (5, 9)), torch.tensor([0, 1, 2, 4, 5])
    windows = torch.randint(0, codebook_size, (5, 9, window_size))
    windows[:, :, 0] = codes
    expected = plain(codes[:, :, None], labels)
    logits = wrapped(windows, labels)
    assert logits.shape == (5, 9, window_size, codebook_size)
    assert logits.dtype == dtype
    for offset in range(window_size):
        assert torch.equal(logits[:, :, offset], expected[:, :, 0])


def test_window_size_1_is_the_base_model() -> None:
    model = _base_with_a_head()
    assert model.input_encoder is None
    assert model.output_decoder is None
    codes, labels = torch.randint(0, 24, (2, 9)), torch.tensor([0, 5])
    assert torch.equal(model(codes[:, :, None], labels)[:, :, 0], model.base(codes, labels))


def test_logits_at_a_position_depend_only_on_the_windows_before_it() -> None:
    model = build_model(_config()).double()
    _randomise(model)
    windows, labels = torch.randint(0, 24, (1, 9, 4)), torch.tensor([2])
    before = model(windows, labels)
    changed = windows.clone()
    changed[:, 4, 3] = (changed[:, 4, 3] + 1) % 24
    after = model(changed, labels)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-12)
    assert not torch.allclose(after[:, 5], before[:, 5])


def _naive_encoder(encoder: InputEncoder, window: list[int], num_valid: int, table: Tensor) -> Tensor:
    """One window, by plain multi-head attention of one query over the valid keys."""
    attention, heads, norm = encoder.attention, encoder.attention.heads, RMSNorm(table.shape[1]).to(table.dtype)
    norm.load_state_dict(encoder.key_norm.state_dict())
    keys = torch.stack([norm(table[window[j]] + encoder.offset_embeddings[j]) for j in range(num_valid)])
    q = split_heads(attention.wq(encoder.query_norm(encoder.query)), heads).transpose(0, 1)
    k = split_heads(F.linear(keys, attention.wk.weight), heads).transpose(0, 1)
    v = split_heads(F.linear(keys, attention.wv.weight), heads).transpose(0, 1)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(-1)
    e = table[window[0]] + attention.wo(attended)
    result: Tensor = e + encoder.feed_forward(encoder.ffn_norm(e))
    return result


@pytest.mark.parametrize("codebook_size", [6, 200])  # 6 < 2 * 9 window entries: tables; 200: none
def test_input_encoder_is_attention_of_one_query_over_the_valid_codes(codebook_size: int) -> None:
    model = build_model(_config(codebook_size=codebook_size)).double()
    _randomise(model)
    encoder, table = model.input_encoder, model.base.tok_embeddings.weight
    assert encoder is not None
    windows, _ = make_windows(torch.randint(0, codebook_size, (2, 9)), window_size=4)
    got = model.embed_windows(windows)
    for image in range(2):
        for position in range(9):
            expected = _naive_encoder(encoder, windows[image, position].tolist(), min(4, 9 - position), table)
            torch.testing.assert_close(got[image, position], expected, rtol=0, atol=1e-6)


def test_codes_beyond_the_image_do_not_reach_the_encoder() -> None:
    model = build_model(_config())
    _randomise(model)
    windows = torch.randint(0, 24, (1, 9, 4))
    tail = windows.clone()
    for position in range(9):
        tail[:, position, 9 - position :] = 0
    assert torch.equal(model.embed_windows(windows), model.embed_windows(tail))


def test_one_window_is_encoded_as_among_all_of_them() -> None:
    model = build_model(_config()).double()
    _randomise(model)
    windows = torch.randint(0, 24, (2, 9, 4))
    whole = model.embed_windows(windows)
    for position in (0, 5, 7, 8):
        alone = model.embed_windows(windows[:, position : position + 1], start=position)
        torch.testing.assert_close(alone[:, 0], whole[:, position], rtol=0, atol=1e-6)


def _naive_decoder(decoder: OutputDecoder, h: Tensor) -> Tensor:
    """One state, by plain joint multi-head self-attention over [h; q_1 .. q_k], output at the queries' places."""
    attention, heads = decoder.attention, decoder.attention.heads
    queries = decoder.query_norm(decoder.queries)
    sequence = torch.cat([decoder.state_norm(h)[None], queries])
    q, k, v = (
        split_heads(F.linear(sequence, projection.weight), heads).transpose(0, 1)
        for projection in (attention.wq, attention.wk, attention.wv)
    )
    attended = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)[1:]
    z = h + attention.wo(attended)
    result: Tensor = z + decoder.feed_forward(decoder.ffn_norm(z))
    return result


def test_output_decoder_is_joint_attention_over_the_state_and_the_queries() -> None:
    model = build_model(_config()).double()
    _randomise(model)
    assert model.output_decoder is not None
    h = torch.randn(2, 9, 16, dtype=torch.float64)
    got = model.output_decoder(h)
    for image in range(2):
        for position in range(9):
            expected = _naive_decoder(model.output_decoder, h[image, position])
            torch.testing.assert_close(got[image, position], expected, rtol=0, atol=1e-6)


def test_every_new_parameter_gets_a_gradient_once_the_projections_moved() -> None:
    model = build_model(_config())
    _randomise(model)
    windows, labels = torch.randint(0, 24, (2, 9, 4)), torch.tensor([0, 1])
    model(windows, labels).logsumexp(-1).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_windows_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="window_size = 4 codes, got 3"):
        build_model(_config())(torch.zeros(1, 9, 3, dtype=torch.int64), torch.tensor([0]))


@pytest.mark.parametrize("causal", [True, False])
def test_plain_attention_on_a_cpu_in_bfloat16_equals_the_fused_kernel(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    got = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=causal)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.03)


def test_the_input_encoder_projects_the_codes_where_they_are_fewer_than_the_windows() -> None:
    assert has_tables(codebook_size=16384, num_windows=16385)
    assert not has_tables(codebook_size=16384, num_windows=16384)
