"""The paper, reproduced and judged: ``python -m examples.paper run`` and ``report``."""
