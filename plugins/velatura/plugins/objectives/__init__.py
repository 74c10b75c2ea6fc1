"""Objectives: losses in velocities."""
