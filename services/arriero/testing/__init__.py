"""Fakes and fixtures that ship, for tests only.

Responsibility: small real inputs and in-process seams. Does not know pytest.
"""
