"""The `arriero` command and the supervisor of one machine.

Responsibility: what a person types and sees. Does not know any room's insides.
"""
