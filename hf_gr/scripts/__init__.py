"""The scripts behind `hf-gr vit`, `hf-gr compare` and the others, with their recipes and grids."""
