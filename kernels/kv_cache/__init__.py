"""The paged KV cache: layout, append, attention over pages, compaction, tiers."""
