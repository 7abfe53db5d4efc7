"""The orchestrator: drives runs, serves endpoints, answers for the store.

Responsibility: order, durability and state of what other services do. Does not
know what a stage does inside.
"""
