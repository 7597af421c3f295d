"""What vLLM does not serve it refuses; nothing is served wrongly."""

import pytest

pytestmark = pytest.mark.vllm

NO_SCHEME = "No compressed-tensors compatible scheme was found"
NO_KERNEL = "Failed to find a kernel"
#: Here, on a CPU, and why.
REFUSED = {
    ("analog-fp", "bfloat16"): "ValidationError",
    ("w4a8", "bfloat16"): NO_SCHEME,
    ("w3a8", "bfloat16"): NO_SCHEME,
    ("w2a8", "bfloat16"): NO_SCHEME,
    ("mixed", "bfloat16"): NO_SCHEME,
    ("w8a8o8", "bfloat16"): NO_KERNEL,
    ("w4a8o8", "float32"): "not implemented for 'Float'",
}


@pytest.fixture(scope="module")
def refused(checkpoint, in_vllm):
    """vLLM's report, by profile and dtype."""
    made = in_vllm([(checkpoint("llama", profile), dtype) for profile, dtype in REFUSED])
    return dict(zip(REFUSED, made, strict=True))


@pytest.mark.parametrize("case", REFUSED, ids="-".join)
def test_vllm_refuses(case, refused, computes):
    computes(case[0])
    assert REFUSED[case] in refused[case]["error"]
