"""The doors: what `afferent <command>` runs."""
