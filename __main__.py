"""``python -m rowscope``."""

from .cli import main

main()
