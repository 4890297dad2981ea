"""``python -m dynamollm`` is ``dynamollm``."""

from dynamollm.cli import main

main()
