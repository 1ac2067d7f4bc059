"""``python -m medvqa_rl`` is ``medvqa-rl``."""

from medvqa_rl.cli.app import main

main()
