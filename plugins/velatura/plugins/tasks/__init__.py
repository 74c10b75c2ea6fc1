"""Tasks that belong to no world of their own."""
