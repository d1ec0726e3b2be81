"""EdgeLM's version, for whoever records it; pyproject.toml says it again."""

__version__ = "0.2.0"
