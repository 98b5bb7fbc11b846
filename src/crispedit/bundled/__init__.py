"""The bundled model: a small Llama that knows an invented world, made by :mod:`crispedit.bundled.train`."""

from pathlib import Path

MODEL_DIRECTORY = Path(__file__).parent / "model"
