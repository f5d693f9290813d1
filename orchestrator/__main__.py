"""``python -m billhook.orchestrator`` is the same as ``billhook``."""

from billhook.orchestrator.cli import main

main()
