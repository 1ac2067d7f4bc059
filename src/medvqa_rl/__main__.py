"""``python -m medvqa_rl`` is ``medvqa-rl``."""

from medvqa_rl.cli import main

main()
