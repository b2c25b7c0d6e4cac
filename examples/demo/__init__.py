"""The demo's own task: a tiny Qwen3-shaped teacher and student that add three-digit numbers."""
