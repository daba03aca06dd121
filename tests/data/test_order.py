import numpy as np
import pytest

from jaxtrain.data.order import permute

SIZES = (1, 2, 3, 7, 64, 100, 1009, 4096, 65537)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", [(0, 0), (1, 0), (0, 1), (2**64 - 1, 12345)])
def test_bijection(size, key):
    order = permute(np.arange(size), size, key)
    assert order.dtype == np.int64
    assert np.sort(order).tolist() == list(range(size))


def test_pinned_order():
    # Resumed runs depend on it: if this fails, old checkpoints would resume with other data.
    assert permute(np.arange(10), 10, (0, 0)).tolist() == [0, 2, 3, 5, 7, 8, 4, 1, 9, 6]
    assert permute(np.arange(4), 10**12, (7, 3)).tolist() == [418986050935, 690249568335, 531890075612, 659361733647]


@pytest.mark.parametrize("size", [64, 100, 1009, 4096])
def test_each_part_of_the_key_matters(size):
    orders = {tuple(permute(np.arange(size), size, key).tolist()) for key in [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0)]}
    assert len(orders) == 5


@pytest.mark.parametrize("size", [1009, 65537, 1024, 100, 30])
def test_order_looks_random(size):
    # For a random order both correlations have mean about 0 and standard deviation about size**-0.5.
    index = np.arange(size)
    positions, neighbours, fixed = [], [], []
    num_keys = 40
    for epoch in range(num_keys):
        order = permute(index, size, (5, epoch))
        positions.append(np.corrcoef(index, order)[0, 1])
        neighbours.append(np.corrcoef(order[:-1], order[1:])[0, 1])
        fixed.append(np.sum(order == index))
    for values in (positions, neighbours):
        assert np.max(np.abs(values)) < 4.5 / np.sqrt(size)
        assert abs(np.mean(values) + 1 / size * (values is neighbours)) < 4 / np.sqrt(size * num_keys)
        assert 0.6 < np.std(values) * np.sqrt(size) < 1.5
    assert 0.3 < np.mean(fixed) < 2.0  # a random order has one fixed point on average


def test_places_are_even_over_keys():
    # Where one index lands, over many keys: 2000 draws into 10 places.
    places = [int(permute(3, 10, (seed, 0))) for seed in range(2000)]
    counts = np.bincount(places, minlength=10)
    assert np.sum((counts - 200.0) ** 2 / 200.0) < 33.7  # chi-square, 9 degrees of freedom: 1 in 10,000


def test_shape_and_single_indices():
    order = permute(np.arange(100), 100, (1, 2))
    grid = permute(np.arange(100).reshape(4, 25), 100, (1, 2))
    assert grid.tolist() == order.reshape(4, 25).tolist()
    assert permute(17, 100, (1, 2)).shape == ()
    assert int(permute(17, 100, (1, 2))) == order[17]
    large = permute(np.array([0, 2**62 - 1]), 2**62, (1, 2))
    assert 0 <= large.min() < large.max() < 2**62


def test_refusals():
    with pytest.raises(ValueError, match="size must be"):
        permute(0, 0, (0, 0))
    for index in (-1, 5):
        with pytest.raises(ValueError, match=r"must lie in \[0, 5\)"):
            permute(index, 5, (0, 0))
