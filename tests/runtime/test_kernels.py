"""Every product agrees with the matrix that its weight unpacks to."""

import pytest
import torch

from decoct.runtime import kernels
from decoct.weights import Weight
from tests.weights.samples import samples


@pytest.mark.parametrize("kind", sorted(samples()))
def test_product_is_that_of_the_matrix(kind: str) -> None:
    weight: Weight = samples()[kind]
    product = kernels.linear(weight)
    assert product.shape == weight.shape
    assert product.nbytes == weight.nbytes
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.allclose(product(x), weight.apply(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(product.unpack(torch.float32), weight.unpack(torch.float32))
    ids = torch.tensor([[0, 2], [1, 0]]) % weight.shape[0]
    assert torch.equal(product.rows(ids), weight.unpack_rows(ids))
