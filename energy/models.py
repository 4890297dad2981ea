"""ModelArchitecture: the sizes of a model that fix how many bytes and operations a token costs.

Values from the models' published config.json files; never reads one.
"""

from dataclasses import dataclass

from energy.profile import ProfileError

BYTES_PER_WEIGHT: dict[str, float] = {"bf16": 2.0, "fp8": 1.0}
# What an engine keeps for activations, CUDA graphs and buffers, per GPU, beside weights and KV cache.
RESERVED_BYTES_PER_GPU = 4e9
# vLLM's default gpu_memory_utilization.
MEMORY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class ModelArchitecture:
    """A decoder-only transformer with grouped-query attention."""

    name: str
    parameters: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    kv_bytes: float = 2.0  # per KV element

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of KV cache of one token, over all GPUs."""
        return 2.0 * self.layers * self.kv_heads * self.head_size * self.kv_bytes

    @property
    def flops_per_token(self) -> float:
        """Dense matrix operations of one token, without attention."""
        return 2.0 * self.parameters

    @property
    def attention_flops_per_token2(self) -> float:
        """Attention operations of one token per token it attends to (QK and AV)."""
        return 4.0 * self.layers * self.heads * self.head_size

    def weight_bytes(self, precision: str) -> float:
        """Bytes of the weights, over all GPUs."""
        return self.parameters * BYTES_PER_WEIGHT[precision]

    def kv_capacity_tokens(self, tp: int, gpu_memory_bytes: float, precision: str) -> int:
        """Tokens of KV cache that fit beside the weights on ``tp`` GPUs; 0 or less if the weights do not fit."""
        free = tp * (gpu_memory_bytes * MEMORY_SHARE - RESERVED_BYTES_PER_GPU) - self.weight_bytes(precision)
        return int(free / self.kv_bytes_per_token)


_MODELS = (
    ModelArchitecture("meta-llama/Llama-3.1-8B-Instruct", 8.03e9, 32, 4096, 32, 8, 128),
    ModelArchitecture("meta-llama/Llama-3.1-70B-Instruct", 70.55e9, 80, 8192, 64, 8, 128),
    ModelArchitecture("meta-llama/Llama-2-70b-hf", 68.98e9, 80, 8192, 64, 8, 128),
)
MODELS: dict[str, ModelArchitecture] = {model.name: model for model in _MODELS}


def model_architecture(name: str) -> ModelArchitecture:
    """The model of this name. Raises ``ProfileError`` naming the known ones."""
    try:
        return MODELS[name]
    except KeyError:
        raise ProfileError(f"unknown model {name!r}; known: {', '.join(MODELS)}") from None
