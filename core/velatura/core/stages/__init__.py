"""One readable file per stage. A stage reads finished stages by name and leaves a folder with a manifest."""
