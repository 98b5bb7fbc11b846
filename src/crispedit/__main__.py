"""``python -m crispedit``."""

from .cli import main

main()
