"""The demo with a real language model: SmolLM2 without some of its blocks learns from the complete SmolLM2."""
