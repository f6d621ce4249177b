"""specforge_lite: train EAGLE draft models for your own LLM and serve them in SGLang or vLLM."""

__version__ = "0.1.0"
