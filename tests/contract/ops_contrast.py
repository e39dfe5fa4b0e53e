"""Entries of this family."""

from contract.registry import Operation

OPERATIONS: list[Operation] = []
