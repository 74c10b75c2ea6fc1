"""Distillers: objectives whose target is a teacher."""
