"""An engine for many callers at once: `AsyncEngine` for programs, an OpenAI-compatible HTTP API for everybody else."""
