"""`edgevlm compare`: ways of doing a step side by side, on one run."""
