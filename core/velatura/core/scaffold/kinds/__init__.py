"""What `velatura new-plugin` writes from: one module for each kind, complete, typed and tested as it stands."""
