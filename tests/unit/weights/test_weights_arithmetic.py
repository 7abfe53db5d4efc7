"""The sums."""

import pytest
import torch

from arriero.weights import delta, spacing


def test_the_delta_is_scaled_after_the_product() -> None:
    a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [10.0]])
    assert delta(b, a, 0.5).tolist() == [[0.5, 1, 1.5], [5, 10, 15]]
    assert delta(b.bfloat16(), a.bfloat16(), 0.5).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.5, 2.0, -3.0, 0.1, 1e-3], dtype=dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    following = (values.view(bits) + 1).view(dtype)
    expected = (following.double() - values.double()).abs()
    assert spacing(values.double(), dtype).equal(expected)
