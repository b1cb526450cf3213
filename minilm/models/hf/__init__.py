"""The border to Hugging Face: Llama-like models in, our `original` out, and any causal LM behind our interface.

ours = from_hf("folder")          weights copied, every difference in architecture refused by name
llama = to_hf(ours)               transformers.LlamaForCausalLM with the same logits
model = HuggingFaceModel(theirs)  model(inputs, segments, positions, cache) -> Output for any causal LM

Whole folders, of any of our models, are written by `minilm.export`.
"""

from minilm.models.hf.foreign import HuggingFaceCache, HuggingFaceConfig, HuggingFaceModel, WholeOutput
from minilm.models.hf.llama import from_hf, to_hf

__all__ = [
    "HuggingFaceCache",
    "HuggingFaceConfig",
    "HuggingFaceModel",
    "WholeOutput",
    "from_hf",
    "to_hf",
]
