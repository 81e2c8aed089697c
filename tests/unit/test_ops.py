"""The native ops: equal to their references and to a brute force of the documented rule; whole for torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training import noise, ops

WORD = 2**32 - 1


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & WORD, p0 >> 32 ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def test_the_brute_force_draws_random123s_words() -> None:
    assert philox((0,) * 4, (0,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((WORD,) * 4, (WORD,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    assert philox(pi[:4], pi[4:]) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def arguments_of(*, batch: int, window_size: int, coupling: Any = "independent") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(window_size)
    chances = torch.rand(window_size, generator=generator).mul(1.5).clamp(max=1.0)
    return {
        "betas": (0.0, *(0.0 if chance < 0.2 else chance for chance in chances.tolist()[1:])),
        "codebook_size": 16384,
        "coupling": coupling,
        "seed": 2**55 + 2**33 + 12345,
        "step": 2**31 + 7,
        "sample_counters_B": torch.randint(0, 2**62, (batch,), generator=generator),
    }


@pytest.mark.parametrize("coupling", ["independent", "shared"])
def test_any_element_follows_from_its_counter_alone(coupling: Any) -> None:
    codes = torch.randint(0, 16384, (2, 11))
    arguments = arguments_of(batch=2, window_size=6, coupling=coupling)
    windows = ops.noise_windows(codes, **arguments)
    seed = arguments["seed"]
    for b in range(2):
        sample = int(arguments["sample_counters_B"][b])
        for i in range(11):
            for j, beta in enumerate(arguments["betas"]):
                cell, purpose = (i << 16 | j, 1) if coupling == "independent" else (i + j << 16, 2)
                counter = (sample & WORD, sample >> 32, arguments["step"], cell)
                words = philox(counter, (seed & WORD, purpose | seed >> 32 << 8))
                clean = int(codes[b, i + j]) if i + j < 11 else 0
                assert int(windows[b, i, j]) == (words[1] * 16384 >> 32 if words[0] < int(beta * 2**32) else clean)


def test_a_code_is_replaced_from_the_very_threshold_of_its_word_on() -> None:
    words = philox((5, 0, 7, 1), (3, 1))  # sample 5, step 7, window 0 and offset 1, seed 3, independent
    for threshold, expected in ((words[0], 99), (words[0] + 1, words[1] * 50 >> 32)):
        windows = ops.noise_windows(
            torch.full((1, 2), 99),
            betas=(0.0, threshold / 2**32),
            codebook_size=50,
            coupling="independent",
            seed=3,
            step=7,
            sample_counters_B=torch.tensor([5]),
        )
        assert int(windows[0, 0, 1]) == expected


@pytest.mark.parametrize("coupling", ["independent", "shared"])
@pytest.mark.parametrize(
    ("batch", "positions", "window_size"),
    [
        (64, 256, 4),
        (3, 1000, 8),
        (0, 16, 4),
        (1, 1, 1),
        (5, 3, 7),
        (2, 9, 9),
        (4, 513, 2),
        (2, 600, 256),
        (1, 2**15, 3),
    ],
)
def test_windows_are_the_references(batch: int, positions: int, window_size: int, coupling: Any) -> None:
    codes = torch.randint(0, 16384, (batch, positions))
    arguments = arguments_of(batch=batch, window_size=window_size, coupling=coupling)
    assert torch.equal(ops.noise_windows(codes, **arguments), noise.noise_windows(codes, **arguments))


def test_codes_and_counters_may_be_views() -> None:
    codes, arguments = torch.randint(0, 50, (16, 6)).T, arguments_of(batch=6, window_size=4)
    arguments["sample_counters_B"] = torch.arange(12)[::2]
    assert torch.equal(ops.noise_windows(codes, **arguments), noise.noise_windows(codes, **arguments))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("coupling", ["independent", "shared"])
def test_windows_do_not_depend_on_the_threads(coupling: Any) -> None:
    codes, arguments = torch.randint(0, 50, (7, 1111)), arguments_of(batch=7, window_size=5, coupling=coupling)
    torch.set_num_threads(1)
    alone = ops.noise_windows(codes, **arguments)
    torch.set_num_threads(3)
    assert torch.equal(ops.noise_windows(codes, **arguments), alone)


@pytest.mark.parametrize("coupling", ["independent", "shared"])
def test_the_op_is_what_it_declares(coupling: str) -> None:
    ops.load_ops()
    inputs = (torch.randint(0, 50, (3, 16)), torch.arange(3), [0, 2**31, 2**32], 50, coupling, 3, 7)
    torch.library.opcheck(torch.ops.tensorar.noise_windows.default, inputs)


def test_torch_compile_keeps_the_op_in_one_graph() -> None:
    torch.compiler.reset()
    codes, arguments = torch.randint(0, 50, (3, 16)), arguments_of(batch=3, window_size=4)
    compiled = torch.compile(
        lambda codes: ops.noise_windows(codes, **arguments) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(codes), noise.noise_windows(codes, **arguments) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coupling": "both"}, "coupling must be 'independent' or 'shared', got 'both'"),
        ({"seed": 2**56}, r"seed must be in \[0, 72057594037927935\], got 72057594037927936"),
        ({"step": -1}, r"step must be in \[0, 4294967295\], got -1"),
        ({"codebook_size": 0}, r"codebook_size must be in \[1, 2147483647\], got 0"),
        ({"betas": (0.0, 1.5)}, r"threshold must be in \[0, 4294967296\], got 6442450944"),
        ({"betas": (0.0,) * 257}, r"window_size must be in \[1, 256\], got 257"),
        ({"betas": (0.5, 1.0)}, r"beta of offset 0 must be 0, got 0\.5"),
        ({"sample_counters_B": torch.arange(2)}, r"sample_counters must be contiguous int64 of shape \(B,\) = \(3,\)"),
    ],
)
def test_an_argument_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.noise_windows(torch.zeros(3, 16, dtype=torch.int64), **(arguments_of(batch=3, window_size=2) | change))


def test_codes_must_be_int64_in_two_dimensions() -> None:
    for codes in (torch.zeros(3, 16), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int32)):
        with pytest.raises(RuntimeError, match=r"codes must be contiguous int64 of shape \(B, T\)"):
            ops.noise_windows(codes, **arguments_of(batch=3, window_size=2))
