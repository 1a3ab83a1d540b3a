"""edgevlm: vision-language models from a training GPU to phones, Jetsons and PCs, in one flow."""

__version__ = "0.1.0"
