"""ModelArchitecture: bytes and operations against numbers worked out from the published model cards."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy.gpus import GPUS
from energy.models import BYTES_PER_WEIGHT, MODELS, model_architecture
from energy.profile import ProfileError

models = st.sampled_from(sorted(MODELS)).map(MODELS.__getitem__)


def test_kv_cache_of_one_token():
    """2 (K and V) x layers x KV heads x head size x 2 bytes: 320 KiB for 70B, 128 KiB for 8B."""
    assert model_architecture("meta-llama/Llama-3.1-70B-Instruct").kv_bytes_per_token == 320 * 1024
    assert model_architecture("meta-llama/Llama-3.1-8B-Instruct").kv_bytes_per_token == 128 * 1024


@pytest.mark.parametrize(
    ("model", "precision", "gigabytes"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "bf16", 16.06),
        ("meta-llama/Llama-3.1-70B-Instruct", "bf16", 141.1),
        ("meta-llama/Llama-3.1-70B-Instruct", "fp8", 70.55),
        ("meta-llama/Llama-2-70b-hf", "bf16", 137.96),
    ],
)
def test_weights_as_they_lie_on_disk(model, precision, gigabytes):
    assert model_architecture(model).weight_bytes(precision) == pytest.approx(gigabytes * 1e9, rel=1e-3)


def test_a_70b_model_in_bf16_does_not_fit_one_80_gb_board():
    model = model_architecture("meta-llama/Llama-3.1-70B-Instruct")
    assert model.kv_capacity_tokens(1, 80e9, "bf16") < 0
    assert model.kv_capacity_tokens(4, 80e9, "bf16") > 100_000
    assert model.kv_capacity_tokens(2, 80e9, "fp8") > 100_000


@given(models, st.sampled_from(sorted(BYTES_PER_WEIGHT)), st.floats(20e9, 200e9), st.sampled_from([1, 2, 4, 8]))
def test_what_is_said_to_fit_does_and_one_token_more_does_not(model, precision, memory_bytes, tp):
    tokens = model.kv_capacity_tokens(tp, memory_bytes, precision)
    if tokens <= 0:
        return
    free = tp * (0.9 * memory_bytes - 4e9) - model.weight_bytes(precision)
    assert tokens * model.kv_bytes_per_token <= free < (tokens + 1) * model.kv_bytes_per_token


@given(models, st.sampled_from(sorted(BYTES_PER_WEIGHT)), st.sampled_from([1, 2, 4]))
def test_twice_the_gpus_hold_more_than_twice_the_tokens(model, precision, tp):
    """The weights are there once, however many GPUs share them."""
    memory = GPUS["H100-SXM"].memory_bytes
    few, many = (model.kv_capacity_tokens(n, memory, precision) for n in (tp, 2 * tp))
    assert many > 2 * few


@given(models, st.integers(1, 100_000))
def test_attention_passes_the_dense_work_only_for_very_long_contexts(model, context):
    """Attention of a token over ``context`` against its dense operations: for Llamas they meet beyond 25,000 tokens."""
    attention = model.attention_flops_per_token2 * context
    assert (attention > model.flops_per_token) == (
        context > model.parameters / (2.0 * model.layers * model.heads * model.head_size)
    )
    if context < 25_000:
        assert attention < model.flops_per_token


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ProfileError, match=r"unknown model 'gpt-2'; known: meta-llama/Llama-3.1-8B-Instruct, "):
        model_architecture("gpt-2")
