"""What a run left on disk, as cards, pictures, tables and comparisons. Nothing here needs the live trainer."""
