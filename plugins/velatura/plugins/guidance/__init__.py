"""Guidance policies: where the unconditional branch enters, role by role."""
