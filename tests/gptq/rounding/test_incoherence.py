"""Rotations: orthogonal, structured, the same everywhere."""

from __future__ import annotations

import pytest
import torch
from rlo_gptq.rounding.random_streams import (
    random_normals,
    random_permutation,
    random_signs,
    random_words,
)
from rlo_gptq.rounding.rotation import Rotation, Transform, balanced_factors, hadamard_matrix

# 521 is a prime above the largest dense factor, so that Hadamard windows overlap.
WIDTHS = [("hadamard", n) for n in (1, 2, 3, 12, 64, 172, 576, 521)]
WIDTHS += [("kronecker", n) for n in (1, 2, 3, 13, 64, 172, 240)]


def splitmix64(state: int):
    """The published generator, in Python's unbounded integers."""
    mask = (1 << 64) - 1
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        yield z ^ (z >> 31)


def signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (7, 3), (-5, 1), (2**62, 40)])
def test_words_are_splitmix64s_of_a_state_hashed_from_seed_and_stream(seed, stream):
    origin = next(splitmix64(seed & ((1 << 64) - 1)))
    state = (origin + 0x9E3779B97F4A7C15 * (1 + stream)) & ((1 << 64) - 1)
    # One more mix of the stream, then the counter.
    state = next(splitmix64((state - 0x9E3779B97F4A7C15) & ((1 << 64) - 1)))
    generator = splitmix64(state)
    expected = [signed(next(generator)) for _ in range(50)]
    assert random_words(seed, stream, 50).tolist() == expected


def test_a_word_does_not_depend_on_how_many_are_asked_for():
    assert torch.equal(random_words(3, 1, 100)[:10], random_words(3, 1, 10))


def test_streams_and_seeds_differ():
    words = [random_words(seed, stream, 64) for seed in range(4) for stream in range(4)]
    assert len({tuple(w.tolist()) for w in words}) == len(words)


def test_normals_and_signs_have_the_moments_of_their_distribution():
    x = random_normals(1, 0, 200_000)
    assert abs(x.mean()) < 0.01
    assert abs(x.var() - 1) < 0.02
    assert abs((x**4).mean() - 3) < 0.1
    assert abs(random_signs(1, 0, 100_000).mean()) < 0.02


def test_a_permutation_holds_every_index_once():
    assert random_permutation(5, 2, 777).sort().values.tolist() == list(range(777))


@pytest.mark.parametrize(
    ("n", "factors"), [(4096, (64, 64)), (11008, (688, 16)), (576, (24, 24)), (172, (86, 2))]
)
def test_factors_are_quips(n, factors):
    assert balanced_factors(n) == factors


@pytest.mark.parametrize(("kind", "n"), WIDTHS)
def test_a_rotation_is_orthogonal_to_1e_6_and_its_inverse_undoes_it(kind, n):
    rotation = Rotation(kind, n, seed=11)
    dense = rotation.apply(torch.eye(n, dtype=torch.float64))
    assert (dense @ dense.T - torch.eye(n)).abs().max() < 1e-12
    x = torch.randn(5, n)
    assert (rotation.apply_T(rotation.apply(x)) - x).abs().max() < 1e-5
    single = rotation.apply(torch.eye(n)).double()  # rotated in float32, measured in float64
    assert (single @ single.T - torch.eye(n)).abs().max() < 1e-6
    # Rows of `apply(eye)` are the images of unit vectors: apply(x) = x V^T.
    torch.testing.assert_close(rotation.apply(x.double()), x.double() @ dense)


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_every_kronecker_variant_is_orthogonal(variant):
    dense = Rotation("kronecker", 24, seed=2, variant=variant).apply(
        torch.eye(24, dtype=torch.float64)
    )
    assert (dense @ dense.T - torch.eye(24)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [64, 172, 576, 521])
def test_a_unit_vector_is_spread_over_the_whole_width(n):
    dense = Rotation("hadamard", n, seed=4).apply(torch.eye(n, dtype=torch.float64))
    assert dense.abs().max() < 0.5


def test_a_power_of_two_rotation_is_the_signed_hadamard_matrix():
    rotation = Rotation("hadamard", 256, seed=9, stream=32)
    dense = rotation.apply(torch.eye(256, dtype=torch.float64))
    signs = random_signs(9, 32, 256).double()
    torch.testing.assert_close(dense, signs[:, None] * hadamard_matrix(256))


@pytest.mark.parametrize("sides", ["in", "both"])
@pytest.mark.parametrize("kind", ["none", "hadamard", "kronecker"])
def test_a_layer_computes_the_same_before_and_after_the_transform(kind, sides):
    weight, x = torch.randn(12, 40, dtype=torch.float64), torch.randn(7, 40, dtype=torch.float64)
    transform = Transform(kind, sides, 3, 40, 12)
    turned = transform.rotate_weight(weight)
    output = transform.apply_output_T(transform.apply_input(x) @ turned.T)
    torch.testing.assert_close(output, x @ weight.T)
    torch.testing.assert_close(transform.restore_weight(turned), weight)


def test_rotating_weight_and_hessian_keeps_the_loss():
    weight, x = torch.randn(12, 40, dtype=torch.float64), torch.randn(90, 40, dtype=torch.float64)
    hessian = x.T @ x
    transform = Transform("hadamard", "both", 3, 40, 12)
    turned, moment = transform.rotate_weight(weight), transform.rotate_hessian(hessian)
    torch.testing.assert_close(
        (turned @ moment @ turned.T).trace(), (weight @ hessian @ weight.T).trace()
    )


def test_two_seeds_give_two_rotations_and_one_seed_gives_one():
    x = torch.randn(3, 96)
    first, again = (Rotation("hadamard", 96, seed=1).apply(x) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, Rotation("hadamard", 96, seed=2).apply(x))


def test_a_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"^the last axis must have 8 elements, got 9$"):
        Rotation("hadamard", 8, seed=0).apply(torch.zeros(2, 9))
